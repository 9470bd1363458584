"""Compiles the deconvnet's Triton kernel for one GPU, without one, at every tile: python compiled_steps.py 90 > report.json."""

from __future__ import annotations

import json
import sys

import triton.language as tl
from compiled import built, report
from zfcore.kernels import deconv_step

KERNEL = deconv_step.deconv_step_kernel
POINTERS = {"switches": "*u8", "passes": "*u8", "finite": "*i1", "image": "*i64", "origin": "*i64", "frame": "*i64"}
VALUES = ("signal", "filters", "out")
HALVES = ("bf16", "fp16")
# What takes the most registers: every option, over a pool whose windows overlap, one of many windows, and none.
POOLS = {"3x3/2": (3, 2, 1), "5x5/1": (5, 1, 1), "none": None}


def compile_for(
    capability: int, dtype: str, config, pool, thin: bool, last: bool = False, ones: tuple[str, ...] = (), whole: bool = True
):
    apart = config is deconv_step.APART
    constants = {
        "POOL_Y": pool,
        "POOL_X": pool,
        "AT_ONCE": 1 if thin else 4,
        "LAST": last,
        "RECTIFY": True,
        "PASSES": whole,
        "WHOLE": whole,
        "FRAMED": whole,
        "DENSE": not thin,
        "TYPE": tl.float64 if dtype == "fp64" else tl.float32,
        "TILED": not apart,
        "CHOSEN": dtype != "fp64",
        "SPLIT": dtype in HALVES and pool is not None and not last,
        "UPCAST": False,
        "PRECISION": "ieee",
        **{name: getattr(config, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
        **dict.fromkeys(ones, 1),
    }
    signature, multiples = {}, []
    for at, parameter in enumerate(KERNEL.params):
        name = parameter.name
        pointer = POINTERS.get(name) or (f"*{dtype}" if name in VALUES else None)
        signature[name] = "constexpr" if name in constants else pointer or "i32"
        if name not in constants and not thin and (pointer or not parameter.do_not_specialize):
            multiples.append(at)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": deconv_step.MOST_REGISTERS}
    return built(KERNEL, capability, signature, constants, multiples, **options)


def cases(capability: int):
    """dtype, tile, pool, whether thin, whether the last of the windows counts, and whether maps are whole."""
    for dtype, precision in (("fp32", "ieee"), ("bf16", "bf16")):
        for thin in (False, True):
            for config in deconv_step.configs(precision, capability, thin):
                yield dtype, config, "3x3/2", thin, True, True
                yield dtype, config, "3x3/2", thin, False, True
                yield dtype, config, "none", thin, False, True
    for dtype in ("fp32", "fp64"):
        yield dtype, deconv_step.APART, "3x3/2", False, True, True
        yield dtype, deconv_step.APART, "5x5/1", False, False, True
    largest = deconv_step.configs("ieee", capability)[-1]
    yield "fp32", largest, "5x5/1", False, False, True
    for dtype, pool in (("fp32", "3x3/2"), ("fp32", "none"), ("bf16", "3x3/2"), ("fp16", "none")):  # a projection's own
        config = largest if dtype == "fp32" else deconv_step.configs("bf16", capability)[-1]
        yield dtype, config, pool, False, False, False


def main(capability: int) -> list[dict]:
    found = []
    for dtype, config, pool, thin, last, whole in cases(capability):
        compiled = compile_for(capability, dtype, config, POOLS[pool], thin, last, whole=whole)
        names = {
            "kernel": "deconv_step apart" if config is deconv_step.APART else "deconv_step",
            "precision": "bf16" if dtype in HALVES else "ieee",
            "config": list(config),
            "pool": pool,
            "thin": thin,
            "last": last,
            "whole": whole,
        }
        found.append({**names, **report(compiled, capability)})
    return found


def with_ones(capability: int) -> int:
    """Compiles the kernel with ones among its numbers, which a launch makes constants of; returns how often."""
    numbers = [p.name for p in KERNEL.params if not (p.do_not_specialize or p.is_constexpr)]
    numbers = [name for name in numbers if name not in POINTERS and name not in VALUES]
    for ones in (numbers, numbers[::2], numbers[1::2]):
        compile_for(capability, "fp32", deconv_step.THIN["ieee"], POOLS["3x3/2"], True, ones=tuple(ones))
    return 3


if __name__ == "__main__":
    what = with_ones if "ones" in sys.argv else main
    json.dump(what(int(sys.argv[1])), sys.stdout)
