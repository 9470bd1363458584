"""Compiles every configuration of the Triton kernels for one GPU, without one: python compiled.py 90 > report.json."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zfcore.kernels import _places, conv_delta, conv_delta_depthwise, lrn_delta, pointwise_delta, pool_delta, relu_delta

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INDICES = ("image", "boxes", "origin", "out_origin")
STRIDED = ("delta", "clean", "before", "after", "out")
FLOATS = ("slope", "upper", "share", "beta", "k", "a", "b")


def multiples_of(kernel) -> list[int]:
    """Which arguments are multiples of 16 where channels are, addresses among them."""
    numbers = ("filters", "channels", "group_filters", "run", *STRIDED)
    return [
        i
        for i, name in enumerate(kernel.arg_names)
        if name in numbers or (name.rsplit("_", 1)[0] in STRIDED and name not in INDICES)
    ]


def compile_for(kernel, capability, dtype, constants, warps, stages, odd=()):
    """The kernel for pointers to `dtype`, and to float32 clean maps and results; odd: numbers that are no multiples."""
    names = kernel.arg_names
    signature = {}
    for name in names:
        signature[name] = "i32"
        if name in constants:
            signature[name] = "constexpr"
        elif name in INDICES:
            signature[name] = "*i64"
        elif name in ("delta", "filters"):
            signature[name] = f"*{dtype}"
        elif name in ("clean", "before", "after", "out"):
            signature[name] = "*fp32"
        elif name in FLOATS:
            signature[name] = "fp32"
    multiples = [i for i in multiples_of(kernel) if names[i] not in (*constants, *odd)]
    return built(kernel, capability, signature, constants, multiples, num_warps=warps, num_stages=stages)


def built(kernel, capability, signature, constants, multiples, **options):
    """The kernel for arguments of these types; multiples: the places of those that are multiples of 16."""
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in multiples},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(compiled, capability) -> dict:
    """What the machine code takes, and what shows how it multiplies and moves."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    text = compiled.asm["ptx"]
    return {
        "capability": capability,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "instructions": len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": compiled.metadata.shared,
        "wgmma": text.count("wgmma.mma_async"),
        "tcgen05": text.count("tcgen05.mma"),
        "mma_sync": len(re.findall(r"\bmma\.sync", text)),
        "copies": sorted(set(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)", text))),
        "wide": len(re.findall(r"(?:ld|st)\.global\S*\.(?:v4\.b32|v2\.b64)", text)),
    }


def with_ones(capability: int) -> int:
    """Compiles each kernel with ones among its numbers, which a launch makes constants of; returns how many."""
    done, drawn = 0, random.Random(0)
    product = {"BOXES": False, "RECTIFIED": True, "HAS_SLOPE": True, "PRECISION": "ieee", "UPCAST": False}
    pixels = {"BLOCK_P": 16, "BLOCK_C": 64}
    for kernel, constants in (
        (conv_delta.conv_delta_kernel, {**product, "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16}),
        (conv_delta.conv_delta_kernel, {**product, "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "BOXES": True}),
        (
            conv_delta_depthwise.conv_delta_depthwise_kernel,
            {**pixels, "RECTIFIED": True, "HAS_SLOPE": True},
        ),
        (pool_delta.pool_delta_kernel, pixels),
        (lrn_delta.lrn_delta_kernel, {**pixels, "ROOTS": False}),
        (relu_delta.relu_delta_kernel, {**pixels, "HAS_SLOPE": True}),
        (pointwise_delta.pointwise_delta_kernel, {**pixels, "NAME": "gelu"}),
    ):
        special = {p.name for p in kernel.params if not (p.do_not_specialize or p.is_constexpr)}
        numbers = sorted(special - {*INDICES, *FLOATS, "delta", "filters", "clean", "before", "after", "out"})
        assert numbers and set(numbers) <= {kernel.arg_names[i] for i in multiples_of(kernel)}, numbers
        for share in (1.0, 0.5, 0.2):
            ones = {name: 1 for name in numbers if drawn.random() < share}
            compile_for(kernel, capability, "fp32", {**constants, **ones}, 4, 3)
            done += 1
    return done


def main(capability: int) -> list[dict]:
    found = []
    for precision in conv_delta.CONFIGS[capability]:
        wide, thin = (conv_delta.configs(precision, capability, thin) for thin in (False, True))
        cases = (
            ("conv_delta", wide, True), ("conv_delta", wide, False), ("conv_delta thin", thin, True), ("conv_boxes", thin, True)
        )  # fmt: skip
        for name, configs, clean in cases:
            for config in configs:
                constants = {
                    "BOXES": name == "conv_boxes",
                    "RECTIFIED": clean,
                    "HAS_SLOPE": False,
                    "PRECISION": "tf32" if precision == "tf32" else "ieee",
                    "UPCAST": False,
                    **{name: getattr(config, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
                }
                dtype = "bf16" if precision == "bf16" else "fp32"
                odd = () if configs is wide else ("channels", "run", "delta_b", "delta_y")
                compiled = compile_for(
                    conv_delta.conv_delta_kernel, capability, dtype, constants, config.num_warps, config.num_stages, odd
                )
                names = {"kernel": name, "precision": precision, "config": list(config), "rectified": clean}
                found.append({**names, **report(compiled, capability)})
    others = {
        "conv_delta_depthwise": (
            conv_delta_depthwise.conv_delta_depthwise_kernel,
            _places.CONFIGS,
            {"RECTIFIED": True, "HAS_SLOPE": False},
        ),
        "pool_delta": (pool_delta.pool_delta_kernel, _places.CONFIGS, {}),
        "lrn_delta": (lrn_delta.lrn_delta_kernel, _places.CONFIGS, {"ROOTS": True}),
        "relu_delta": (relu_delta.relu_delta_kernel, _places.CONFIGS, {"HAS_SLOPE": False}),
        **{
            f"pointwise_delta {name}": (pointwise_delta.pointwise_delta_kernel, _places.CONFIGS, {"NAME": name})
            for name in ("gelu", "softplus", "tanh", "sqrt")  # the longest ones
        },
    }
    for name, (kernel, configs, extra) in others.items():
        for pixels, channels, warps in configs.values():
            constants = {**extra, "BLOCK_P": pixels, "BLOCK_C": channels}
            compiled = compile_for(kernel, capability, "fp32", constants, warps, 3)
            names = {"kernel": name, "precision": "ieee", "config": [pixels, channels, warps], "rectified": True}
            found.append({**names, **report(compiled, capability)})
    return found


if __name__ == "__main__":
    what = with_ones if "ones" in sys.argv else main
    json.dump(what(int(sys.argv[1])), sys.stdout)
