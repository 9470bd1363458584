"""What this machine can do at most, measured in the process that runs the benchmarks, once.

Bandwidth: the best of several copies between two buffers, 128 MiB each, that are reused, so that no page is
new. Read and written bytes both count; the line that is fetched before it is overwritten does not.
Peak: the best float32 rate of torch's large matrix products and convolutions, multiplies and adds counted
apart. Both on torch.get_num_threads() threads. They are what software reaches, not data-sheet figures: an op
whose tensors fit in the last-level cache passes the bandwidth.

On a GPU: the median of several copies of 4 GiB, which no cache holds, and of matrix products of 8192 x 8192 random
numbers (zeros would run faster than any data) in true float32, in TF32 and in bfloat16.

    python bench/ceilings.py [cpu|cuda]
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import device
import torch
import torch.nn.functional as F
from timing import timed

COPY_FLOATS = 32 << 20  # 128 MiB a buffer
ROUNDS = 6
GPU_COPY_FLOATS = 1 << 30  # 4 GiB a buffer
GPU_SIDE = 8192  # of the matrices
EXACT = "float32"


class Ceilings(NamedTuple):
    """Copy bandwidth, multiply-add peaks by what the factors are rounded to, and which computation reached float32's."""

    bytes_per_second: float
    flops_per_second: dict[str, float]
    peak_by: str

    def peak(self, precision: str = EXACT) -> float:
        """In "float32", "tf32" or "bf16". A CPU's is float32's for all."""
        return self.flops_per_second.get(precision, self.flops_per_second[EXACT])

    def __str__(self) -> str:
        where = torch.cuda.get_device_name() if device.on_gpu() else f"{torch.get_num_threads()} threads"
        peaks = (f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in self.flops_per_second.items())
        return f"{where}: copy {self.bytes_per_second / 1e9:.1f} GB/s, {', '.join(peaks)} ({self.peak_by})"


def best_time(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The shortest of `rounds` runs in seconds, after one that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def copy_bandwidth() -> float:
    source, target = torch.ones(COPY_FLOATS), torch.zeros(COPY_FLOATS)
    return 2 * source.nbytes / best_time(lambda: target.copy_(source))


def multiply_add_peak() -> tuple[float, str]:
    size = 1536
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    n, k, c, side = 8, 256, 256, 28
    contenders = {"matmul": (2 * size**3, lambda: torch.mm(a, b, out=out))}
    for name, layout in (("conv2d", torch.contiguous_format), ("conv2d channels_last", torch.channels_last)):
        x = torch.randn(n, c, side, side).to(memory_format=layout)
        weight = torch.randn(k, c, 3, 3).to(memory_format=layout)
        # Without padding, so that every counted multiply-add is one that is done.
        flops = 2 * n * k * c * 9 * (side - 2) ** 2
        contenders[name] = (flops, functools.partial(F.conv2d, x, weight))
    rates = {name: flops / best_time(run) for name, (flops, run) in contenders.items()}
    best = max(rates, key=rates.get)
    return rates[best], best


def median_time(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Seconds of the median run on the GPU, after two that are not counted."""
    for _ in range(2):
        run()
    return statistics.median(timed(run) for _ in range(rounds))


def gpu_copy_bandwidth(floats: int = GPU_COPY_FLOATS) -> float:
    source = torch.ones(floats, device=device.device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_time(lambda: target.copy_(source))


def gpu_multiply_add_peaks(side: int = GPU_SIDE) -> dict[str, float]:
    a, b = (torch.randn(side, side, device=device.device()) for _ in range(2))
    out, peaks = torch.empty_like(a), {}
    for name in (EXACT, "tf32"):
        with device.arithmetic(name):
            peaks[name] = 2 * side**3 / median_time(lambda: torch.mm(a, b, out=out))
    a, b, out = (x.bfloat16() for x in (a, b, out))
    return {**peaks, "bf16": 2 * side**3 / median_time(lambda: torch.mm(a, b, out=out))}


@functools.cache
def ceilings() -> Ceilings:
    """Measured at the first call, about two seconds on two cores."""
    with torch.inference_mode():
        if device.on_gpu():
            return Ceilings(gpu_copy_bandwidth(), gpu_multiply_add_peaks(), "matmul")
        rate, best = multiply_add_peak()
        return Ceilings(copy_bandwidth(), {EXACT: rate}, best)


if __name__ == "__main__":
    device.choose(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    print(ceilings())
