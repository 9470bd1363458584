"""Rectification of changes: what the engine of ``occlusion_map`` is made of. No gradient."""

from __future__ import annotations

import torch

from zfcore import reference
from zfcore.errors import ShapeError
from zfcore.ops import _boundary, _change, _checks
from zfcore.ops._library import choosing, native, triton_kernel
from zfcore.reference._params import Limits, Places


def _reference(delta, before, rectifier, places, out):
    _change.check_images(places, before)
    result = reference.relu_delta(delta, before, rectifier, places)
    return result if out is None else out.copy_(result)


def _cpu(delta, before, rectifier, places, out):
    out = _change.empty(delta, delta.size(1), places, out)
    change, _held = _change.native_change(delta, before, before, places, out)
    _change.on_cpu(native.relu_delta_cpu, places, (before,), change, *rectifier, _boundary.threads())
    return out


def _triton(delta, before, rectifier, places, out):
    out = _change.empty(delta, delta.size(1), places, out)
    image, origin = (x.contiguous() for x in places[:2])
    return triton_kernel("relu_delta")(*_change.for_triton(delta, before), image, origin, out, *rectifier)


_run = choosing("relu_delta", {"reference": _reference, "cpu": _cpu, "triton": _triton})


def check_rectifier(rectifier: Limits) -> Limits:
    """``rectifier`` as two floats."""
    _checks.record("rectifier", rectifier, Limits)
    if type(rectifier.slope) is float and type(rectifier.upper) is float:
        return rectifier
    return Limits(_checks.number("slope", rectifier.slope), _checks.number("upper", rectifier.upper))


def relu_delta(
    delta: torch.Tensor,
    before: torch.Tensor,
    rectifier: Limits,
    places: Places,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What rectified maps change by, as ``zfcore.reference.relu_delta`` defines it.

    Args:
        delta: [B, C, h, w] float32 or float64: what the input changes by inside a patch.
        before: [N, C, H, W], the clean input.
        rectifier: see ``Limits``.
        places: see ``Places``; the result lies where the patch does.
        out: [B, C, h, w], channels last, to write into; may be delta itself.

    Returns:
        [B, C, h, w], channels last.

    Raises:
        ShapeError, DtypeError: the arguments do not belong together.
        ArgumentError: a patch is not inside its map (the CPU's kernel).

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
    """
    delta, places, before = _change.check(delta, places, before)
    rectifier = check_rectifier(rectifier)
    if before.size(1) != delta.size(1) or places.size != tuple(delta.shape[2:]):
        raise ShapeError(
            f"delta {tuple(delta.shape)}, before {tuple(before.shape)}, a result of {tuple(places.size)}: they do not "
            "belong together"
        )
    out = _change.check_out(out, delta, delta.size(1), places, delta, before)
    return _run(delta, before, rectifier, places, out)
