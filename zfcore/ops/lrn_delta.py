"""Contrast normalisation of changes: what the engine of ``occlusion_map`` is made of. No gradient."""

from __future__ import annotations

import torch

from zfcore import reference
from zfcore.errors import ShapeError
from zfcore.ops import _boundary, _change, _checks
from zfcore.ops._library import choosing, native, triton_kernel
from zfcore.reference._params import INT32_MAX, Lrn, Places, integer


def _reference(delta, before, after, lrn, places, out):
    _change.check_images(places, before, after)
    result = reference.lrn_delta(delta, before, after, lrn, places)
    return result if out is None else out.copy_(result)


def _cpu(delta, before, after, lrn, places, out):
    out = _change.empty(delta, delta.size(1), places, out)
    change, _held = _change.native_change(delta, before, after, places, out)
    _change.on_cpu(native.lrn_delta_cpu, places, (before, after), change, *lrn, _boundary.threads())
    return out


def _triton(delta, before, after, lrn, places, out):
    out = _change.empty(delta, delta.size(1), places, out)
    image, origin = (x.contiguous() for x in places[:2])
    return triton_kernel("lrn_delta")(*_change.for_triton(delta, before, after), lrn, image, origin, out)


_run = choosing("lrn_delta", {"reference": _reference, "cpu": _cpu, "triton": _triton})


def lrn_delta(
    delta: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    lrn: Lrn,
    places: Places,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What contrast-normalised maps change by, as ``zfcore.reference.lrn_delta`` defines it.

    Args:
        delta: [B, C, h, w] float32 or float64: what the input changes by inside a patch.
        before, after: [N, C, H, W], the clean input and output.
        lrn: see ``Lrn``.
        places: see ``Places``; the result lies where the patch does.
        out: [B, C, h, w], channels last, to write into.

    Returns:
        [B, C, h, w], channels last.

    Raises:
        ShapeError, DtypeError: the arguments do not belong together.
        ArgumentError: a patch is not inside its map (the CPU's kernel).

    Paper: Zeiler & Fergus, arXiv:1311.2901, sections 3 and 4.2.
    """
    delta, places, before, after = _change.check(delta, places, before, after)
    _checks.record("lrn", lrn, Lrn)
    size = integer("size", lrn.size, lrn.size, 1, INT32_MAX)
    lrn = Lrn(size, *(_checks.number(name, getattr(lrn, name)) for name in ("alpha", "beta", "k")))
    if before.shape != after.shape or before.size(1) != delta.size(1) or places.size != tuple(delta.shape[2:]):
        raise ShapeError(
            f"delta {tuple(delta.shape)}, before {tuple(before.shape)}, after {tuple(after.shape)}, a result of "
            f"{tuple(places.size)}: they do not belong together"
        )
    out = _change.check_out(out, delta, delta.size(1), places, delta, before, after)
    return _run(delta, before, after, lrn, places, out)
