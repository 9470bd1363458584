"""What this machine can do at most, measured in the process that runs the benchmarks, once.

Bandwidth: the best of several copies between two buffers, 128 MiB each, that are reused, so that no page is
new. Read and written bytes both count; the line that is fetched before it is overwritten does not.
Peak: the best float32 rate of torch's large matrix products and convolutions, multiplies and adds counted
apart. Both on torch.get_num_threads() threads. They are what software reaches, not data-sheet figures: an op
whose tensors fit in the last-level cache passes the bandwidth.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

COPY_FLOATS = 32 << 20  # 128 MiB a buffer
ROUNDS = 6


class Ceilings(NamedTuple):
    """Copy bandwidth, float32 multiply-add peak, and which computation reached that peak."""

    bytes_per_second: float
    flops_per_second: float
    peak_by: str


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


@functools.cache
def ceilings() -> Ceilings:
    """Measured at the first call, about two seconds on two cores."""
    with torch.inference_mode():
        return Ceilings(copy_bandwidth(), *multiply_add_peak())


if __name__ == "__main__":
    measured = ceilings()
    print(
        f"{torch.get_num_threads()} threads: copy {measured.bytes_per_second / 1e9:.1f} GB/s, "
        f"float32 {measured.flops_per_second / 1e9:.0f} GFLOP/s ({measured.peak_by})"
    )
