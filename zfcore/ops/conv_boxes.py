"""A convolution of what boxes change pictures by: the first product of the engine of ``occlusion_map``. No gradient."""

from __future__ import annotations

import torch

from zfcore.errors import DtypeError, ShapeError
from zfcore.ops import _change, _checks
from zfcore.ops._library import choosing, triton_kernel
from zfcore.ops.conv_delta import ConvChange, DeltaFilters, check_filters, conv_delta, for_triton, is_depthwise
from zfcore.ops.paste_boxes import check_boxes, paste_boxes
from zfcore.reference._geometry import check_result
from zfcore.reference._params import Pair, Places


def _pasted(change, boxes, patch, filters, step, places, clean, out):
    """Patch by patch, in two ops on their backend: those of the CPU pass zeros by, so that patches pay there."""
    nothing = change.new_zeros(()).expand(change.shape)
    delta = paste_boxes(nothing, change, boxes, places._replace(size=patch))
    return conv_delta(delta, filters, step, places, clean, out)


def _triton(change, boxes, patch, filters, step, places, clean, out):
    if is_depthwise(filters.weight.shape, step.groups):
        return _pasted(change, boxes, patch, filters, step, places, clean, out)
    filters = for_triton(filters)
    out = _change.empty(change, len(filters.weight), places, out)
    change, clean = _change.for_triton(change, clean)
    own = (x.contiguous() for x in places[:3])
    return triton_kernel("conv_boxes")(
        change.to(filters.packed.dtype), boxes.contiguous(), patch, filters.packed, step.window, step.groups, *own, out,
        clean, *step.rectifier, tf32=filters.precision == "tf32",
    )  # fmt: skip


_run = choosing("conv_boxes", {"reference": _pasted, "cpu": _pasted, "triton": _triton})


def conv_boxes(
    change: torch.Tensor,
    boxes: torch.Tensor,
    patch: Pair,
    filters: DeltaFilters,
    step: ConvChange,
    places: Places,
    clean: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a convolution's output changes by where boxes cover its pictures, as ``zfcore.reference.conv_boxes`` defines it.

    Args:
        change: [N, C, H, W] float32 or float64: what each picture changes by where it is covered.
        boxes: [B, 4] int64: y0, x0, y1, x1 in pixels; y1 and x1 are not covered.
        patch: the size of the patches, which begin at ``places.origin``; what lies outside of them is under no box.
        filters: of ``delta_filters``, finite.
        step: the geometry and the rectifier, see ``ConvChange``.
        places: see ``Places``; the result must hold all outputs that see a patch.
        clean: [N, K, *step.above], the clean outputs: the change is then that of the rectified outputs.
        out: [B, K, *places.size], channels last, to write into.

    Returns:
        [B, K, *places.size], channels last.

    Raises:
        ShapeError, DtypeError, DeviceError: the arguments do not belong together.
        ArgumentError: a patch is not inside its picture, or reaches outputs outside of the result (the CPU's kernels).

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
    """
    change = _checks.tensor("change", change)
    if change.dim() != 4 or change.dtype not in _change.DTYPES:
        raise DtypeError(f"change of {change.dtype} {tuple(change.shape)}: expected float32 or float64 [N, C, H, W]")
    if 0 in change.shape[1:]:
        raise ShapeError(f"change of {tuple(change.shape)}: expected none of 0")
    patch = _checks.pair("patch", patch, 1)
    boxes = check_boxes(boxes, change.device)
    places = _change.check_places(places, change.device, len(boxes))
    clean = _checks.optional("clean", clean, change.device)
    filters, step = check_filters(change, filters, step, clean)
    if clean is not None and (clean.dtype != change.dtype or len(clean) != len(change)):
        raise ShapeError(
            f"clean of {clean.dtype} {tuple(clean.shape)} on {clean.device}: expected {change.dtype}, {len(change)} maps, on "
            f"{change.device}"
        )
    check_result(change, len(boxes), change.size(1), *patch)
    out = _change.check_out(out, change, len(filters.weight), places, change, clean)
    return _run(change, boxes, patch, filters, step, places, clean, out)
