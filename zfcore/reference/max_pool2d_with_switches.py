"""Max-pooling that records, for every output, which tap of its window held the maximum."""

from __future__ import annotations

import torch

from zfcore.reference._geometry import check_map, pool_window, pooled_size
from zfcore.reference._params import pool_params


def max_pool2d_with_switches(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    """y[n,c,oy,ox] = max over taps (ky,kx) of x[n,c, oy*s-p+ky*d, ox*s-p+kx*d]; switches = ky*kw + kx.

    Taps outside the map take no part. Ties: the first tap in raster order. NaN wins over numbers, the last
    NaN over the others. All -inf: the first tap in the map.
    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (switches).
    """
    if x.dim() == 3:
        y, switches = max_pool2d_with_switches(
            x.unsqueeze(0), kernel_size, stride, padding, dilation, ceil_mode
        )
        return y.squeeze(0), switches.squeeze(0)
    check_map("x", x)
    pool = pool_params(kernel_size, stride, padding, dilation, ceil_mode)
    size = x.shape[2:]
    pooled = pooled_size(size, pool)
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = pool_window(size, pooled, pool)

    shape = (x.size(0), x.size(1), *pooled)
    y = x.new_full(shape, -torch.inf)
    switches = torch.zeros(shape, dtype=torch.uint8, device=x.device)
    seen = torch.zeros(pooled, dtype=torch.bool, device=x.device)
    rows = torch.arange(pooled[0], device=x.device) * sh - ph
    columns = torch.arange(pooled[1], device=x.device) * sw - pw
    for ky in range(kh):
        row = rows + ky * dh
        line = x[:, :, row.clamp(0, size[0] - 1)]
        for kx in range(kw):
            column = columns + kx * dw
            value = line[:, :, :, column.clamp(0, size[1] - 1)]  # [N, C, Oh, Ow]
            inside = ((row >= 0) & (row < size[0]))[:, None] & (column >= 0) & (column < size[1])
            better = inside & (~seen | (value > y) | value.isnan())
            y = torch.where(better, value, y)
            switches = torch.where(better, ky * kw + kx, switches)
            seen |= inside
    return y, switches
