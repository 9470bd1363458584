"""What boxes painted over pictures change them by, in patches."""

from __future__ import annotations

import torch

from zfcore.reference._params import Places
from zfcore.reference.deconv_step import cut


def paste_boxes(images, fill, boxes, places: Places):
    """[B, C, *places.size]: fill - images under box b, zero elsewhere, in the patch at places.origin of its picture.

    images, fill: [N, C, H, W]. boxes: [B, 4] int64, y0, x0, y1, x1 in pixels; y1 and x1 are not covered.
    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
    """
    change, picture = (cut(maps, places.image, places.origin, places.size) for maps in (fill, images))
    change = change - picture
    covered = []
    for axis in (0, 1):
        pixel = places.origin[:, axis, None] + torch.arange(places.size[axis], device=boxes.device)
        covered.append((boxes[:, axis, None] <= pixel) & (pixel < boxes[:, axis + 2, None]))
    return change.masked_fill_(~(covered[0][:, None, :, None] & covered[1][:, None, None, :]), 0)
