"""Unpooling: every pooled value goes to the place that its switch recorded, zeros elsewhere."""

from __future__ import annotations

import torch

from zfcore.reference._geometry import (
    accumulator,
    check_map,
    check_result,
    check_switches,
    check_unpooled_size,
    pool_window,
    switch_targets,
    unpooled_size,
)
from zfcore.reference._params import overlap_mode, pool_params, size_pair


def unpool2d(y, switches, kernel_size, stride=None, padding=0, dilation=1, output_size=None, overlap="sum"):
    """out[n,c,Y,X] = sum of y[n,c,oy,ox] over the windows whose switch names (Y,X).

    overlap="last" keeps the last such window in raster order instead of the sum. Sums run in raster order of
    the windows; half types accumulate in float32 and are rounded once.
    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (unpooling).
    """
    if y.dim() == 3:
        out = unpool2d(
            y.unsqueeze(0),
            switches.unsqueeze(0),
            kernel_size,
            stride,
            padding,
            dilation,
            output_size,
            overlap,
        )
        return out.squeeze(0)
    check_map("y", y)
    check_switches(y, switches)
    overlap = overlap_mode(overlap)
    pool = pool_params(kernel_size, stride, padding, dilation)
    pooled = y.shape[2:]
    size = unpooled_size(pooled, pool, None if output_size is None else size_pair(output_size))
    check_unpooled_size(pooled, pool, size)
    check_result(y, *y.shape[:2], *size)
    window = pool_window(size, pooled, pool)

    targets = switch_targets(switches, size, window).flatten(2)
    last = last_window(targets, size[0] * size[1])  # [N, C, H*W]
    named = last >= 0
    if overlap == "last":
        values = y.flatten(2).gather(2, last.clamp(min=0))
    else:
        values = _sum_windows(y, switches, size, window).flatten(2)
    return torch.where(named, values, 0).unflatten(2, tuple(size))


def last_window(targets: torch.Tensor, places: int) -> torch.Tensor:
    """For each of ``places`` the last window o = oy*Ow + ox that names it, or -1: int64 [N, C, places]."""
    n, c, windows = targets.shape
    order = torch.arange(windows, device=targets.device).expand(n, c, windows)
    return targets.new_full((n, c, places), -1).scatter_reduce(2, targets, order, "amax")


def _sum_windows(y, switches, size, window):
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = window
    n, c, oh, ow = y.shape
    values = y.to(accumulator(y.dtype))
    # The canvas starts at the first window's corner. -0 is the sum of nothing, so that a lone -0 stays -0.
    reach = ((oh - 1) * sh + 1, (ow - 1) * sw + 1)
    extent = (max(ph + size[0], reach[0] + (kh - 1) * dh), max(pw + size[1], reach[1] + (kw - 1) * dw))
    canvas = values.new_full((n, c, *extent), -0.0)
    # Of the windows that name one place, a later one names it by an earlier tap.
    for tap in reversed(range(kh * kw)):
        top, left = tap // kw * dh, tap % kw * dw
        seen = canvas[:, :, top : top + reach[0] : sh, left : left + reach[1] : sw]
        seen += torch.where(switches == tap, values, -0.0)
    return canvas[:, :, ph : ph + size[0], pw : pw + size[1]].to(y.dtype)
