"""What the ops should give, in float64, written a second time from torch's own functions and numpy.

Only what torch gets right is taken from it: max_pool2d's values and indices on a contiguous float64 CPU
tensor, and conv_transpose2d.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def pooled_size(size, pool) -> tuple[int, ...]:
    return tuple(F.max_pool2d(torch.empty(1, 1, *size, device="meta"), *pool).shape[2:])


def fits(size, pool) -> bool:
    """Whether there is a window, and each has a tap inside a map of this size."""
    try:
        pooled = pooled_size(size, pool)
    except RuntimeError:
        return False
    for n, o, k, s, p, d in zip(size, pooled, *pool[:4], strict=True):
        for start in range(-p, min(o * s - p, 0), s):
            if not any(0 <= start + tap * d < n for tap in range(k)):
                return False
    return True


def unpooled_size(pooled, window) -> tuple[int, ...]:
    """The smallest size of at least one pixel that pools to ``pooled`` without ceil_mode."""
    sizes = []
    for o, k, s, p, d in zip(pooled, *window, strict=True):
        sizes.append(max(1, (o - 1) * s - 2 * p + d * (k - 1) + 1))
    return tuple(sizes)


def transposed_size(unpooled, kernel, conv) -> tuple[int, ...]:
    return tuple(
        (u - 1) * conv["stride"][a]
        - 2 * conv["padding"][a]
        + conv["dilation"][a] * (kernel[a] - 1)
        + 1
        + conv["output_padding"][a]
        for a, u in enumerate(unpooled)
    )


def pool(x, kernel, stride, padding, dilation, ceil_mode):
    """Pooled values of x's dtype, switches, and the linear index in the map of each."""
    exact = x.double().contiguous()
    if x.size(0) == 0:
        shape = (0, x.size(1), *pooled_size(x.shape[2:], (kernel, stride, padding, dilation, ceil_mode)))
        return (
            x.new_zeros(shape),
            torch.zeros(shape, dtype=torch.uint8),
            torch.zeros(shape, dtype=torch.int64),
        )
    _, index = F.max_pool2d(exact, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    width = x.size(3)
    row = index // width - (torch.arange(index.size(2)) * stride[0] - padding[0])[:, None]
    column = index % width - (torch.arange(index.size(3)) * stride[1] - padding[1])
    assert not (row % dilation[0]).any() and not (column % dilation[1]).any()
    switches = row // dilation[0] * kernel[1] + column // dilation[1]
    y = x.contiguous().flatten(2).gather(2, index.flatten(2)).view_as(index)
    return y, switches.to(torch.uint8), index


def places(switches, size, kernel, stride, padding, dilation) -> np.ndarray:
    """The linear index in a map of ``size`` that each switch names: [N*C, Oh*Ow]."""
    tap = switches.long().numpy()
    n, c, oh, ow = tap.shape
    row = np.arange(oh)[:, None] * stride[0] - padding[0] + tap // kernel[1] * dilation[0]
    column = np.arange(ow) * stride[1] - padding[1] + tap % kernel[1] * dilation[1]
    assert ((row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])).all()
    return (row * size[1] + column).reshape(n * c, oh * ow)


def unpool(y, switches, size, window, overlap) -> torch.Tensor:
    """The unpooled map in float64."""
    n, c = y.shape[:2]
    index = places(switches, size, *window)
    values = y.double().numpy().reshape(index.shape)
    maps = np.arange(n * c)[:, None]
    out = np.full((n * c, size[0] * size[1]), -0.0)  # the sum of nothing, which keeps the sign of a lone -0
    if overlap == "sum":
        with np.errstate(invalid="ignore"):  # inf - inf
            np.add.at(out, (maps, index), values)
    else:
        out[maps, index] = values  # of an index that repeats, the last value stays
    named = np.zeros(out.shape, dtype=bool)
    named[maps, index] = True
    return torch.from_numpy(np.where(named, out, 0.0).reshape(n, c, *size))


def naming(switches, size, window) -> torch.Tensor:
    """How many windows name each place of a map of ``size``."""
    index = places(switches, size, *window)
    count = np.zeros((index.shape[0], size[0] * size[1]), dtype=np.int64)
    np.add.at(count, (np.arange(index.shape[0])[:, None], index), 1)
    return torch.from_numpy(count.reshape(*switches.shape[:2], *size))


def relu(u) -> torch.Tensor:
    return torch.where(u < 0, 0.0, u)  # NaN and -0 stay


def gather(x, switches, window, overlap) -> torch.Tensor:
    """What each window reads, exactly, in x's dtype."""
    n, c, h, w = x.shape
    index = places(switches, (h, w), *window)
    values = x.contiguous().flatten(2).gather(2, torch.from_numpy(index).view(n, c, index.shape[1]))
    if overlap == "last":
        maps, order = np.arange(n * c)[:, None], np.arange(index.shape[1])
        last = np.zeros((n * c, h * w), dtype=np.int64)
        last[maps, index] = order
        values = torch.where(torch.from_numpy(last[maps, index] == order).view(values.shape), values, 0)
    return values.view(switches.shape)


def step(y, switches, weight, unpooled, window, conv, overlap) -> torch.Tensor:
    """The fused op in float64: the zeros of the unpooled map are multiplied too."""
    u = relu(unpool(y, switches, unpooled, window, overlap))
    return F.conv_transpose2d(
        u,
        weight.double(),
        None,
        conv["stride"],
        conv["padding"],
        conv["output_padding"],
        conv["groups"],
        conv["dilation"],
    )


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal values, NaN where NaN, and zeros of equal sign."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if not actual.dtype.is_floating_point:
        return torch.equal(actual, expected)
    equal = (actual == expected) & (torch.signbit(actual) == torch.signbit(expected))
    return bool((equal | (actual.isnan() & expected.isnan())).all())
