"""The change that boxes make to pictures: where the engine of ``occlusion_map`` begins. No gradient."""

from __future__ import annotations

import torch

from zfcore import reference
from zfcore.errors import DtypeError, ShapeError
from zfcore.ops import _boundary, _change, _checks
from zfcore.ops._library import choosing, native
from zfcore.reference._params import Places


def _reference(images, fill, boxes, places, out):
    result = reference.paste_boxes(images, fill, boxes, places)
    return result if out is None else out.copy_(result)


def _native_paste(images, fill, boxes, places, out):
    """The result's memory, the tuple that the kernels take, and what has to live while they run."""
    out = _change.empty(images, images.size(1), places, out)
    held = tuple(x.contiguous() for x in (*places[:2], boxes))
    return out, (*map(_boundary.view, (images, fill, out)), *map(_boundary.address, held)), held


def _cpu(images, fill, boxes, places, out):
    out, paste, _held = _native_paste(images, fill, boxes, places, out)
    native.paste_boxes_cpu(paste, _boundary.threads())
    return out


def _cuda(images, fill, boxes, places, out):
    out, paste, _held = _native_paste(images, fill, boxes, places, out)
    native.paste_boxes_cuda(paste, images.device.index, _boundary.stream(images.device))
    return out


_run = choosing("paste_boxes", {"reference": _reference, "cpu": _cpu, "cuda": _cuda})


def check_boxes(boxes: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``boxes`` when they are [B, 4] int64."""
    count = len(boxes) if isinstance(boxes, torch.Tensor) and not boxes.is_nested and boxes.dim() else 0
    return _change.check_index("boxes", boxes, device, (count, 4))


def paste_boxes(
    images: torch.Tensor,
    fill: torch.Tensor,
    boxes: torch.Tensor,
    places: Places,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What boxes of ``fill`` change pictures by, as ``zfcore.reference.paste_boxes`` defines it.

    Args:
        images: [N, C, H, W] float32 or float64, any strides.
        fill: the same, what the boxes show; may be expanded.
        boxes: [B, 4] int64: y0, x0, y1, x1 in pixels.
        places: which picture, and where the patch begins in it; ``out_origin`` is not read.
        out: [B, C, *places.size], channels last, to write into.

    Returns:
        [B, C, *places.size], channels last: fill - images under the box, zero elsewhere.

    Raises:
        ShapeError, DtypeError, DeviceError: the arguments do not belong together.
        ArgumentError: a patch is not inside its picture.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
    """
    images = _checks.tensor("images", images)
    fill = _checks.tensor("fill", fill)
    if images.dim() != 4 or images.dtype not in _change.DTYPES:
        raise DtypeError(f"images of {images.dtype} {tuple(images.shape)}: expected float32 or float64 [N, C, H, W]")
    if fill.shape != images.shape or fill.dtype != images.dtype or fill.device != images.device:
        raise ShapeError(
            f"fill of {fill.dtype} {tuple(fill.shape)} on {fill.device}: expected the images' {images.dtype} "
            f"{tuple(images.shape)} on {images.device}"
        )
    boxes = check_boxes(boxes, images.device)
    _checks.record("places", places, Places)
    places = Places(
        _change.check_index("image", places.image, images.device, (len(boxes),)),
        _change.check_index("origin", places.origin, images.device, (len(boxes), 2)),
        places.out_origin,
        _checks.pair("places.size", places.size, 1),
    )
    out = _change.check_out(out, images, images.size(1), places, images, fill)
    return _run(images, fill, boxes, places, out)
