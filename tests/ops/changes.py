"""What the tests of the ops on changes share: patches and places drawn from a seed, layouts, and how results compare."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from zfcore.reference._params import Places

EXAMPLES = int(os.environ.get("ZFCORE_FUZZ_EXAMPLES", 200))
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
VALUES = ("dense", "dense", "sparse", "channels", "zero", "minus zero")
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded", "stepped")


@dataclass
class Sample:
    """A call of an op on changes: run(function, cast) calls it, or its definition, with every float tensor cast."""

    delta: torch.Tensor
    places: Places
    call: Callable

    def run(self, out=None):
        return self.call(self, out, None)

    def wanted(self):
        """By the definition, in float64."""
        return self.call(self, None, torch.float64)

    def rows(self, index) -> Sample:
        """The same for some of the batch."""
        image, origin, out_origin, size = self.places
        places = Places(image[index], origin[index], out_origin[index], size)
        return replace(self, delta=self.delta[index], places=places)


def cast(x, dtype):
    return x if x is None or dtype is None else x.to(dtype)


def window_size(size, window, after=None):
    """How many windows a map holds on each axis; after: what lies below and right, if not the padding."""
    after = window[2] if after is None else after
    return tuple((n + p + a - d * (k - 1) - 1) // s + 1 for n, a, k, s, p, d in zip(size, after, *window, strict=True))


def reached(start, length, axis, window, above):
    """The outputs of an axis whose window, its gaps with it, lies over some of [start, start + length): the first, and
    one past the last.
    """
    k, s, p, d = (value[axis] for value in window)
    seen = [o for o in range(above) if o * s - p < start + length and start <= o * s - p + d * (k - 1)]
    return (seen[0], seen[-1] + 1) if seen else None


def draw_length(choose: random.Random, most: int) -> int:
    """One pixel and the whole axis as often as all between."""
    return choose.choice([1, most, choose.randint(1, most)])


def draw_starts(choose: random.Random, batch: int, room: int) -> list[int]:
    """Where patches begin that may begin at 0 to `room`: together, apart, or at the two ends."""
    kind = choose.choice(["clustered", "scattered", "ends"])
    middle = choose.randint(0, room)
    if kind == "clustered":
        return [min(max(middle + choose.randint(-2, 2), 0), room) for _ in range(batch)]
    return [choose.choice([0, room]) if kind == "ends" else choose.randint(0, room) for _ in range(batch)]


def draw_values(choose: random.Random, shape) -> torch.Tensor:
    x, kind = torch.randn(shape), choose.choice(VALUES)
    if kind == "sparse":
        x = x * (torch.rand(shape) < 0.3)
    elif kind == "channels":  # the same ones changed everywhere
        x = x * (torch.rand(shape[1]) < 0.4)[:, None, None]
    elif kind == "zero":
        x = x * 0
    elif kind == "minus zero":
        x = torch.where(torch.rand(shape) < 0.5, torch.full(shape, -0.0), x)
    return x


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another layout; "expanded" repeats the first of the batch without memory of its own."""
    b, c, h, w = x.shape
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full((b, c + 3, h + 2, w + 1), torch.nan, dtype=x.dtype)
        wide[:, 2 : c + 2, 1 : h + 1, :w] = x
        return wide[:, 2 : c + 2, 1 : h + 1, :w]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return x[:1].expand(b, -1, -1, -1)
    if layout == "stepped":
        return x.repeat_interleave(2, 3)[..., ::2]
    return x.contiguous()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = BITS[a.dtype]
    return a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def close(ours: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, about: float = 0.0) -> None:
    """about: the largest of the clean values that the change was added to, whose last bit is no change's business."""
    assert ours.shape == wanted.shape and ours.dtype == dtype
    assert torch.equal(ours.isnan(), wanted.isnan())
    infinite = wanted.isinf()
    assert torch.equal(ours[infinite].double(), wanted[infinite])
    finite = wanted.isfinite()
    if finite.any():
        error = (ours.double() - wanted)[finite].abs().max()
        assert error <= TOLERANCE[dtype] * wanted[finite].abs().max() + 2 * torch.finfo(dtype).eps * about


def does_not_depend_on_batch_or_threads(sample: Sample, choose: random.Random) -> None:
    """The same bits twice, on two threads, in a result that is given, and for any part of the batch."""
    ours = sample.run()
    assert same_bits(sample.run(), ours)
    torch.set_num_threads(2)
    assert same_bits(sample.run(), ours)
    torch.set_num_threads(1)
    some = [i for i in range(len(ours)) if choose.random() < 0.5] or [0]
    choose.shuffle(some)
    assert same_bits(sample.rows(some).run(), ours[some])
    one = slice(len(ours) // 2, len(ours) // 2 + 1)
    assert same_bits(sample.rows(one).run(), ours[one])


def writes_nothing_else(sample: Sample) -> None:
    """`out` as a part of a larger tensor, of its channels, its rows and its batch: all else stays as it was."""
    ours = sample.run()
    b, c, h, w = ours.shape
    for poison in (7.0, torch.nan):
        wide = torch.full((b + 2, h + 3, w + 2, c + 21), poison, dtype=ours.dtype).permute(0, 3, 1, 2)
        part = (slice(1, b + 1), slice(5, c + 5), slice(2, h + 2), slice(1, w + 1))
        assert sample.run(wide[part]).data_ptr() == wide[part].data_ptr()
        assert same_bits(wide[part], ours)
        wide[part] = poison
        assert same_bits(wide, torch.full_like(wide, poison))
