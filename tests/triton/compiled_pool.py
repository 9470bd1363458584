"""Compiles pooling's Triton kernel for one GPU, without one: python compiled_pool.py 90 > report.json."""

from __future__ import annotations

import json
import sys

import triton.language as tl
from compiled import built, report
from zfcore.kernels import max_pool2d_with_switches as pool

KERNEL = pool.max_pool2d_with_switches_kernel
POINTERS = ("x", "y", "switches")
BYTES = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}


def compile_for(capability: int, dtype: str, kernel: tuple[int, int], last: bool, wide: bool, ones: tuple[str, ...] = ()):
    """last: channels last, in multiples of 16, for which everything is one; wide: in 64 bits."""
    block, warps = pool.SHARED[BYTES[dtype]] if last else pool.APART
    constants = {
        "KERNEL_Y": kernel[0],
        "KERNEL_X": kernel[1],
        "UNROLL": kernel[0] * kernel[1] <= pool.UNROLLED,
        "LAST": last,
        "RUN": pool.CHANNELS if last else 1,
        "INDEX": tl.int64 if wide else tl.int32,
        "TYPE": tl.float64 if dtype == "fp64" else tl.float32,
        "BLOCK": block,
        "x_c" if last else "x_x": 1,
        **dict.fromkeys(ones, 1),
    }
    signature, multiples = {}, []
    for at, parameter in enumerate(KERNEL.params):
        name = parameter.name
        pointer = "*u8" if name == "switches" else f"*{dtype}" if name in POINTERS else None
        signature[name] = "constexpr" if name in constants else pointer or "i32"
        if name not in constants and (pointer or last and not parameter.do_not_specialize):
            multiples.append(at)
    return built(KERNEL, capability, signature, constants, multiples, num_warps=warps)


def main(capability: int) -> list[dict]:
    found = []
    cases = [(dtype, (3, 3), last, False) for dtype in BYTES for last in (True, False)]
    cases += [("fp32", (5, 5), True, False), ("fp64", (4, 4), True, False), ("fp32", (3, 3), True, True)]
    for dtype, kernel, last, wide in cases:
        compiled = compile_for(capability, dtype, kernel, last, wide)
        names = {
            "kernel": "max_pool2d_with_switches" + ("" if last else " apart"),
            "precision": dtype,
            "config": list(pool.SHARED[BYTES[dtype]] if last else pool.APART),
            "taps": kernel[0] * kernel[1],
            "unrolled": kernel[0] * kernel[1] <= pool.UNROLLED,
            "wide_index": wide,
        }
        found.append({**names, **report(compiled, capability)})
    return found


def with_ones(capability: int) -> int:
    """Compiles the kernel with ones among its numbers, which a launch makes constants of; returns how often."""
    numbers = [p.name for p in KERNEL.params if not (p.do_not_specialize or p.is_constexpr)]
    numbers = [name for name in numbers if name not in POINTERS]
    for ones in (numbers, numbers[::2], numbers[1::2]):
        compile_for(capability, "fp32", (3, 3), False, False, tuple(ones))
    return 3


if __name__ == "__main__":
    what = with_ones if "ones" in sys.argv else main
    json.dump(what(int(sys.argv[1])), sys.stdout)
