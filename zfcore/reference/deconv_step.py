"""One step of the deconvnet on a batch of patches: unpool, rectify, transposed filter, cut to the map."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zfcore.reference._geometry import accumulator
from zfcore.reference._params import StepParams
from zfcore.reference.pool_gather2d import pool_gather2d
from zfcore.reference.unpool2d import unpool2d
from zfcore.reference.unpool_relu_conv_transpose2d import skipping_zeros


def deconv_step(signal, weight, step: StepParams, image, origin, switches=None, passes=None, scale=None, frame=None):
    """[B, C, h', w'] below the signal patches [B, K, h, w] at ``origin`` [B, 2] in the maps of ``image`` [B].

    weight: [K, C / groups, kh, kw]. switches: [N, K, Hp, Wp] uint8 of whole maps, with step.pool. passes: [N, K,
    *step.map] bool; what comes down elsewhere is dropped. scale: [K], multiplies the filters. Windows and
    places outside their maps bring nothing, and the result is zero outside its map. frame: with step.whole,
    ([B, 2] where the result begins in the map below, its size), instead of the map. Products with an exact zero
    are left out, so 0 x inf and 0 x NaN of the weight give 0; half types accumulate in float32, rounded once.
    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1.
    """
    size = tuple(signal.shape[2:])
    places, reached = step.reach(size)
    own = step.map if step.pool is None else tuple(switches.shape[2:])
    g = torch.where(inside(origin, size, own), signal, 0).to(accumulator(signal.dtype))
    if step.pool is not None:
        kernel, stride, padding, dilation = step.pool
        if step.overlap == "last":
            ones = g.new_ones((*switches.shape[:2], *step.map))
            winners = pool_gather2d(ones, switches, kernel, stride, padding, dilation, overlap="last")
            g = torch.where(cut(winners, image, origin, size) > 0, g, 0)
        # In a patch no window is clipped: the patch holds all that its windows can name.
        g = unpool2d(g, cut(switches, image, origin, size), kernel, stride, 0, dilation, places)
        origin = origin * _pair(stride, origin) - _pair(padding, origin)
    if step.rectify:
        g = F.relu(g)
    if passes is not None:
        g = torch.where(cut(passes, image, origin, places), g, 0)
    if scale is not None:
        weight = weight * scale[:, None, None, None]
    kernel, stride, padding, dilation = step.conv

    def transposed(u, weight):
        return F.conv_transpose2d(u, weight, None, stride, 0, 0, step.groups, dilation)

    z = skipping_zeros(transposed, g, weight.to(g.dtype)).to(signal.dtype)
    origin = origin * _pair(stride, origin) - _pair(padding, origin)
    if step.whole:
        each = torch.arange(len(z), device=z.device)
        z = cut(z, each, -origin, step.below)
        return z if frame is None else cut(z, each, *frame)
    return torch.where(inside(origin, reached, step.below), z, 0)


def cut(maps, which, origin, size):
    """Windows of ``size`` at ``origin`` [B, 2] out of maps[which]: [B, C, h, w], channels last in memory.

    Zeros where a window reaches past its map.
    """
    y, x = _places(origin, size)
    cut = maps.permute(0, 2, 3, 1)[
        which[:, None, None],
        y.clamp(0, maps.size(2) - 1)[:, :, None],
        x.clamp(0, maps.size(3) - 1)[:, None, :],
    ]  # [B, h, w, C]
    outside = ~inside(origin, size, maps.shape[2:]).squeeze(1).unsqueeze(-1)
    return cut.masked_fill_(outside, 0).permute(0, 3, 1, 2)


def _places(origin, size):
    rows, columns = (torch.arange(n, device=origin.device) for n in size)
    return origin[:, :1] + rows, origin[:, 1:] + columns  # [B, h], [B, w]


def inside(origin, size, map_size):
    """Which places of the patches lie in their maps: [B, 1, h, w]."""
    y, x = _places(origin, size)
    return (((y >= 0) & (y < map_size[0]))[:, :, None] & ((x >= 0) & (x < map_size[1]))[:, None, :]).unsqueeze(1)


def _pair(pair, like):
    return torch.tensor(pair, device=like.device)
