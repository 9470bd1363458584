"""The number of images as a model's code sees it while its forward is recorded.

What the code does with it decides with which other numbers the forward is recorded too, and compared. Where it only
gives sizes, rules say where the images are, and no other number is needed. Where it was taken, a smaller one is, for
what counts or cuts by it. Where it was told from other numbers, the smallest are, and those around what it was compared
with or divided by. What becomes of a plain `int` (of `len`) nobody sees; for that the smallest stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from zfcore.network.guard import recording

IMAGES = 5  # how many the forward is recorded with; a rule says where they are, so any number above one would do
IMAGES_ON_A_GPU = 3  # whose memory is taken, where a CPU's is not before it is written to
FEWER = 2
SMALLEST = (1, 2, 4)
MOST = 64  # a forward is recorded with no more


class Count:
    """The other numbers of images that a forward must be recorded with."""

    def __init__(self) -> None:
        self.used = False  # the model did more with it than give sizes
        self.told = False  # it went by what the number is
        self.others: set[int] = set()

    def use(self) -> None:
        self.used = True

    def tell(self, *others: object) -> None:
        """It was compared with others, divided by them, or made a plain number."""
        self.used = self.told = True
        for other in others:
            if isinstance(other, int | float) and math.isfinite(other) and other > 1:
                self.others |= {int(other) + step for step in (-1, 0, 1)}

    def numbers(self) -> set[int]:
        if not self.used:
            return set()
        return self.others.union(SMALLEST) - {0} if self.told else {FEWER}


class BatchSize(int):
    """The number of images, or what follows from it. What a model does with it besides giving sizes is noted."""


def _noted() -> Count:
    record = getattr(recording, "record", None)
    return Count() if record is None else record.count


def _counting(name: str) -> Callable:
    plain = getattr(int, name)

    def operation(self, *others):
        result = plain(self, *others)
        if result is NotImplemented:  # a float, which may be rounded
            _noted().tell()
            return result
        return BatchSize(result)

    return operation


def _telling(name: str) -> Callable:
    plain = getattr(int, name)

    def operation(self, *others):
        if not (others and type(others[0]) is BatchSize and int.__eq__(self, others[0])):  # alike, however many
            _noted().tell(*others)
        return plain(self, *others)

    return operation


def _dividing(name: str) -> Callable:
    plain = getattr(int, name)

    def operation(self, other):
        # What goes in without a rest, as the number of windows into that of all images' windows, does so for any number
        # of images, or leaves a rest with another one.
        if isinstance(other, int) and other and not int.__mod__(self, other):
            _noted().use()
            return BatchSize(plain(self, other))
        _noted().tell(other)
        return plain(self, other)

    return operation


for _name in ("floordiv", "mod"):
    setattr(BatchSize, f"__{_name}__", _dividing(f"__{_name}__"))
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "neg"):
    setattr(BatchSize, f"__{_name}__", _counting(f"__{_name}__"))
for _name in (
    "truediv", "rtruediv", "rfloordiv", "rmod", "pow", "rpow", "float", "int", "index", "bool", "lt",
    "le", "gt", "ge", "eq", "ne", "round", "abs", "str", "repr", "format", "divmod", "rdivmod", "and", "rand", "or", "ror",
    "xor", "rxor", "lshift", "rlshift", "rshift", "rrshift", "hash", "trunc", "ceil", "floor", "invert", "pos",
):  # fmt: skip
    setattr(BatchSize, f"__{_name}__", _telling(f"__{_name}__"))
for _name in ("bit_length", "bit_count", "to_bytes", "as_integer_ratio"):
    setattr(BatchSize, _name, _telling(_name))


class Sizes(tuple):
    """A map's shape. That its number of images was taken is noted: Python may use a number where nobody sees it."""

    __class__ = torch.Size  # to isinstance; no class can be derived from it

    @classmethod
    def of(cls, shape: torch.Size, axis: int) -> Sizes:
        return cls(BatchSize(n) if d == axis else n for d, n in enumerate(shape))

    def __getitem__(self, place):
        part = super().__getitem__(place)
        if isinstance(part, tuple):
            if any(type(n) is BatchSize for n in tuple.__iter__(part)):
                _noted().use()
                return tuple(part)
            return torch.Size(part)
        if type(part) is BatchSize:
            _noted().use()
        return part

    def __iter__(self):
        _noted().use()
        return super().__iter__()

    def __repr__(self) -> str:
        return f"torch.Size({list(self)})"

    def numel(self) -> BatchSize:
        _noted().use()
        return BatchSize(math.prod(int.__int__(n) for n in tuple.__iter__(self)))
