"""The number of images as a model's code sees it while its forward is recorded."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from zfcore.network.guard import recording


class BatchSize(int):
    """The number of images, or what follows from it. What a model does with it besides giving sizes is noted."""


def _counting(name: str) -> Callable:
    plain = getattr(int, f"__{name}__")

    def operation(self, *others):
        result = plain(self, *others)
        if result is NotImplemented:
            return result
        if any(isinstance(other, float) for other in others):
            _count_used()
        return BatchSize(result)

    return operation


def _telling(name: str) -> Callable:
    plain = getattr(int, f"__{name}__")

    def operation(self, *others):
        if not (others and type(others[0]) is BatchSize):  # two of them compare alike for any number of images
            _count_used(compared=name in _COMPARISONS)
        return plain(self, *others)

    return operation


_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "neg"):
    setattr(BatchSize, f"__{_name}__", _counting(_name))
for _name in (
    "truediv", "rtruediv", "rfloordiv", "mod", "rmod", "pow", "rpow", "float", "int", "index", "bool", "lt", "le", "gt",
    "ge", "eq", "ne", "round", "abs", "str", "repr", "format", "divmod", "rdivmod", "and", "or", "lshift", "rshift",
):  # fmt: skip
    if hasattr(int, f"__{_name}__"):
        setattr(BatchSize, f"__{_name}__", _telling(_name))
BatchSize.__hash__ = int.__hash__


def _count_used(compared: bool = False) -> None:
    record = getattr(recording, "record", None)
    if record is not None:
        record.count_used = True
        record.count_compared |= compared


class Sizes(tuple):
    """A map's shape. That its number of images was taken is noted: Python may use a number where nobody sees it."""

    axis: int

    @classmethod
    def of(cls, shape: torch.Size, axis: int) -> Sizes:
        made = cls(BatchSize(n) if d == axis else n for d, n in enumerate(shape))
        made.axis = axis
        return made

    def __getitem__(self, place):
        part = super().__getitem__(place)
        if isinstance(part, tuple):
            if any(type(n) is BatchSize for n in tuple.__iter__(part)):
                _count_used()
                return tuple(part)
            return torch.Size(part)
        if type(part) is BatchSize:
            _count_used()
        return part

    def __iter__(self):
        _count_used()
        return super().__iter__()

    def numel(self) -> BatchSize:
        _count_used()
        return BatchSize(math.prod(int.__int__(n) for n in tuple.__iter__(self)))
