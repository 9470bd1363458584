"""How max-pooled maps change where their input changes inside a patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zfcore.reference._geometry import Window
from zfcore.reference._params import Places
from zfcore.reference.deconv_step import cut


def pool_delta(delta, before, after, window: Window, places: Places):
    """max(x + delta) - y over each window: [B, C, *places.size].

    delta: [B, C, h, w]. x, y: the clean input ``before`` [N, C, H, W] and output ``after`` [N, C, H', W']. Windows are
    clipped at the edges.
    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
    """
    each = torch.arange(len(delta), device=delta.device)
    changed = before[places.image] + cut(delta, each, -places.origin, before.shape[2:])
    kernel, stride, padding, dilation = window
    reach = [(n - 1) * s + d * (k - 1) + 1 for n, k, s, d in zip(after.shape[2:], kernel, stride, dilation)]
    behind = [max(0, r - p - n) for r, p, n in zip(reach, padding, before.shape[2:])]
    padded = F.pad(changed, (padding[1], behind[1], padding[0], behind[0]), value=-torch.inf)
    pooled = F.max_pool2d(padded, kernel, stride, 0, dilation)
    pooled = pooled[:, :, : after.size(2), : after.size(3)]
    return cut(pooled - after[places.image], each, places.out_origin, places.size)
