"""The memory of a recorded forward: what each storage holds, and how views of it are made."""

from __future__ import annotations

import torch
from torch import Tensor

from zfcore.network.values import Unread, Value


class Memory:
    """One storage.

    tensor:  the one that it was met by, which keeps it alive. base: its geometry, where it is all of the storage.
    value:   what that tensor stands for; None for a constant. views: what others do, by their geometry.
    recipes: how each geometry is made of another: (that geometry, operation, arguments, which result, results' shapes).
    twins:   memories that may be the same as this one, or a copy: strides that are not known decide.
    lost:    why its views stand for nothing any more, where that is so.
    copy:    what a constant holds since it was written to, where it is the model's own or an expression holds it.
    fresh:   made in this forward. held: an expression refers to it. blank: nothing that can be seen has written to it.
    """

    __slots__ = (
        "_base", "blank", "copy", "fresh", "held", "lost", "read", "recipes", "tensor", "twins", "value", "views",
    )  # fmt: skip

    def __init__(self, t: Tensor, fresh: bool, value: Value | Unread | None = None):
        self.tensor, self.fresh, self.value = t, fresh, value
        self.read = value is not None  # computed from the images
        self._base: tuple | None = None
        self.views: dict[tuple, Value | Unread] = {}
        self.recipes: dict[tuple, tuple] = {}
        self.twins: list[Memory] = []
        self.lost: Unread | None = None
        self.copy: Tensor | None = None
        self.held = self.blank = False

    @property
    def base(self) -> tuple | None:
        if self._base is None:
            t = self.tensor
            if self.fresh or (t.untyped_storage().nbytes() == t.numel() * t.element_size() and not t.storage_offset()):
                self._base = geometry(t)
        return self._base

    def holds(self, base: Value | Unread | None) -> None:
        """From now on it holds this, and nothing that was known of views is left."""
        self.value, self.views, self.read = base, {}, True

    def lose(self, why: Unread) -> None:
        self.holds(None)
        self.lost = why

    def link(self, other: Memory) -> None:
        self.twins.append(other)
        other.twins.append(self)

    def all_twins(self) -> list[Memory]:
        """Its twins, and theirs: a reshape of a reshape may be the same memory too."""
        found = [self]
        for memory in found:
            found += [twin for twin in memory.twins if all(twin is not each for each in found)]
        return found[1:]

    def shadow(self, t: Tensor) -> None:
        """From now on a copy holds the values of this constant; a new one, where an expression holds the last."""
        self.held = False
        if self.copy is not None:
            self.copy = self.copy.clone()
            return
        storage = t.untyped_storage()
        length = storage.nbytes() // t.element_size()
        self.copy = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, 0, (length,)).clone()


def geometry(t: Tensor) -> tuple:
    """Which values of a storage a tensor is."""
    return tuple(t.shape), t.stride(), t.storage_offset(), t.dtype


def has_storage(t: Tensor) -> bool:
    return t.layout is torch.strided


def overlaps(t: Tensor) -> bool:
    """Whether several places of a tensor are one place of its memory."""
    return any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True))
