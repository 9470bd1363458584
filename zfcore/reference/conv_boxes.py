"""How a convolution of pictures changes where boxes cover them."""

from __future__ import annotations

from zfcore.reference._params import ConvChange, Pair, Places
from zfcore.reference.conv_delta import conv_delta
from zfcore.reference.paste_boxes import paste_boxes


def conv_boxes(change, boxes, patch: Pair, weight, step: ConvChange, places: Places, clean=None, scale=None):
    """[B, K, *places.size]: what the output changes by where a picture changes by ``change`` under box b.

    change: [N, C, H, W], what each picture changes by where it is covered. boxes: [B, 4] int64, y0, x0, y1, x1 in pixels.
    patch: the size of the patches, which begin at places.origin; what lies outside of them is under no box. The others as
    of ``conv_delta``.
    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
    """
    delta = paste_boxes(change.new_zeros(()).expand(change.shape), change, boxes, places._replace(size=tuple(patch)))
    return conv_delta(delta, weight, step, places, clean, scale)
