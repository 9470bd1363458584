"""How contrast-normalised maps change where their input changes inside a patch."""

from __future__ import annotations

import torch.nn.functional as F

from zfcore.reference._params import Lrn, Places
from zfcore.reference.deconv_step import cut


def lrn_delta(delta, before, after, lrn: Lrn, places: Places):
    """local_response_norm(x + delta) - y: [B, C, h, w], with x and y the clean ``before`` and ``after``, [N, C, H, W].

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
    """
    x, y = (cut(maps, places.image, places.origin, places.size) for maps in (before, after))
    return F.local_response_norm(x + delta, *lrn) - y
