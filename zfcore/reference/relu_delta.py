"""How rectified maps change where their input changes inside a patch."""

from __future__ import annotations

import torch

from zfcore.reference._params import Limits, Places
from zfcore.reference.deconv_step import cut


def relu_delta(delta, before, rectifier: Limits, places: Places):
    """f(x + delta) - f(x): [B, C, h, w], with x the clean maps ``before`` [N, C, H, W].

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
    """
    return rectified(cut(before, places.image, places.origin, places.size), delta, rectifier)


def rectified(x, change, f: Limits):
    """f(x + change) - f(x)."""
    return _apply(x + change, f) - _apply(x, f)


def _apply(v, f):
    low = torch.where(v < 0, v * f.slope if f.slope else torch.zeros_like(v), v)
    upper = torch.tensor(f.upper, dtype=low.dtype, device=low.device)
    return torch.where(low > upper, upper, low)
