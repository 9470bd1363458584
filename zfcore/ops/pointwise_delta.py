"""A function of each value, of changes: what the engine of ``occlusion_map`` is made of. No gradient."""

from __future__ import annotations

import math

import torch

from zfcore import reference
from zfcore.errors import ArgumentError, DtypeError, ShapeError
from zfcore.ops import _boundary, _change, _checks
from zfcore.ops._library import choosing, native, triton_kernel
from zfcore.reference._params import Places, is_sequence, show
from zfcore.reference.pointwise_delta import FUNCTIONS

FLOAT32_MAX = torch.finfo(torch.float32).max
_CODES = {name: code for code, name in enumerate(FUNCTIONS)}


def _reference(change, clean, function, places, out):
    _change.check_images(places, clean)
    result = reference.pointwise_delta(change, clean, function, places)
    return result if out is None else out.copy_(result)


def _cpu(change, clean, function, places, out):
    out = _change.empty(change, change.size(1), places, out)
    patches, _held = _change.native_change(change, clean, clean, places, out)
    name, a, b = function
    _change.on_cpu(native.pointwise_delta_cpu, places, (clean,), patches, _CODES[name], a, b, _boundary.threads())
    return out


def _triton(change, clean, function, places, out):
    out = _change.empty(change, change.size(1), places, out)
    image, origin = (x.contiguous() for x in places[:2])
    return triton_kernel("pointwise_delta")(*_change.for_triton(change, clean), image, origin, out, *function)


_run = choosing("pointwise_delta", {"reference": _reference, "cpu": _cpu, "triton": _triton})


def _check_function(function: tuple[str, float, float], dtype: torch.dtype) -> tuple[str, float, float]:
    named = is_sequence(function) and len(function) == 3 and isinstance(function[0], str)
    if not named or function[0] not in FUNCTIONS:
        words = f"function={show(function)}: expected one of {', '.join(FUNCTIONS)}, and two numbers"
        raise (ArgumentError if named else DtypeError)(words)
    numbers = _checks.number("a", function[1]), _checks.number("b", function[2])
    if dtype is torch.float32 and any(FLOAT32_MAX < abs(number) < math.inf for number in numbers):
        raise ArgumentError(f"function={show(function)}: expected numbers that float32 holds")
    return function[0], *numbers


def pointwise_delta(
    change: torch.Tensor,
    clean: torch.Tensor,
    function: tuple[str, float, float],
    places: Places,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What maps of a function of each value change by, as ``zfcore.reference.pointwise_delta`` defines it.

    Args:
        change: [B, C, h, w] float32 or float64: what the input changes by inside a patch.
        clean: [N, C, H, W], the clean input.
        function: a name of ``zfcore.reference.pointwise_delta.FUNCTIONS`` and its parameters: softplus has beta and the
            threshold above which it is linear, elu has alpha; others ignore theirs.
        places: see ``Places``; the result lies where the patch does.
        out: [B, C, h, w], channels last, to write into; may be change itself.

    Returns:
        [B, C, h, w], channels last. Exactly zero where nothing changes and the function's value is finite.

    Raises:
        ArgumentError: there is no function of that name.
        ShapeError, DtypeError: the arguments do not belong together.
        ArgumentError: a patch is not inside its map (the CPU's kernel).
    """
    change, places, clean = _change.check(change, places, clean)
    function = _check_function(function, change.dtype)
    if clean.size(1) != change.size(1) or places.size != tuple(change.shape[2:]):
        raise ShapeError(
            f"change {tuple(change.shape)}, clean {tuple(clean.shape)}, a result of {tuple(places.size)}: they do not "
            "belong together"
        )
    out = _change.check_out(out, change, change.size(1), places, change, clean)
    return _run(change, clean, function, places, out)
