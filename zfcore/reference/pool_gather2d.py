"""The transpose of unpooling: every window reads the place that its switch names."""

from __future__ import annotations

import torch

from zfcore.reference._geometry import (
    check_gather_switches,
    check_map,
    check_unpooled_size,
    pool_window,
    switch_targets,
)
from zfcore.reference._params import overlap_mode, pool_params
from zfcore.reference.unpool2d import last_window


def pool_gather2d(x, switches, kernel_size, stride=None, padding=0, dilation=1, overlap="sum"):
    """out[n,c,oy,ox] = x[n,c, the place that switches[n,c,oy,ox] names].

    overlap="last": only the last window in raster order that names a place reads it, the others get 0, which
    is the transpose of unpooling with overlap="last".
    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (switches).
    """
    if x.dim() == 3:
        out = pool_gather2d(
            x.unsqueeze(0), switches.unsqueeze(0), kernel_size, stride, padding, dilation, overlap
        )
        return out.squeeze(0)
    check_map("x", x)
    check_gather_switches(x, switches)
    overlap = overlap_mode(overlap)
    pool = pool_params(kernel_size, stride, padding, dilation)
    size, pooled = x.shape[2:], switches.shape[2:]
    check_unpooled_size(pooled, pool, size)
    targets = switch_targets(switches, size, pool_window(size, pooled, pool)).flatten(2)
    values = x.flatten(2).gather(2, targets)
    if overlap == "last":
        order = torch.arange(targets.size(2), device=x.device)
        values = torch.where(last_window(targets, size[0] * size[1]).gather(2, targets) == order, values, 0)
    return values.unflatten(2, tuple(pooled))
