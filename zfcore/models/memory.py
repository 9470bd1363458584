"""Whether a tensor's values lie in memory as usual, and which tensors lie in the same memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


def unusable(tensor: Tensor) -> str:
    """Why the tensor's values can be neither read nor written in place, or an empty string.

    torch's own copy of a tensor whose memory was freed ends the process.
    """
    if is_lazy(tensor):
        return "no shape yet; expected a network that has run once"
    if tensor.is_meta:
        return "on the meta device, which holds no values"
    if tensor.is_quantized or tensor.is_nested or tensor.layout is not torch.strided:
        kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else tensor.layout
        return f"a {kind} tensor; expected a dense one"
    if not tensor.numel():
        return ""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}, which has no memory of its own; expected a plain tensor"
    needed = tensor.storage_offset() * tensor.itemsize + _extent(tensor)
    nowhere = tensor._is_zerotensor() or torch._is_functional_tensor(tensor)
    if nowhere or tensor.untyped_storage().nbytes() < needed:
        return "no memory holds its values: it was freed, or never there"
    return ""


class Span(NamedTuple):
    """From a tensor's first element to the end of its last: bytes of a storage."""

    storage: int
    start: int
    end: int

    @classmethod
    def of(cls, tensor: Tensor) -> Span:
        start = tensor.storage_offset() * tensor.itemsize
        return cls(storage(tensor), start, start + _extent(tensor))

    def overlaps(self, other: Span) -> bool:
        return self.storage == other.storage and self.start < other.end and other.start < self.end


def storage(tensor: Tensor) -> int:
    """Which storage holds the tensor, for comparison with another's."""
    return tensor.untyped_storage()._cdata


def covers(first: Tensor, second: Tensor) -> bool:
    """Whether each element of the second lies in memory that the first fills."""
    inner, outer = Span.of(second), Span.of(first)
    return inner.overlaps(outer) and outer.start <= inner.start and inner.end <= outer.end and is_whole(first)


def crowded(tensors: Iterable[Tensor]) -> set[Span]:
    """The spans of those that may share memory: with one another, or their elements among themselves."""
    found, last = set(), None
    for span, whole in sorted((Span.of(each), is_whole(each)) for each in tensors):
        if not whole:
            found.add(span)
        if last is not None and span.overlaps(last):
            found |= {span, last}
        if last is None or span.storage != last.storage or span.end > last.end:
            last = span
    return found


def is_whole(tensor: Tensor) -> bool:
    """Whether the elements fill the memory between the first and the last of them, each once."""
    return tensor.numel() * tensor.itemsize == _extent(tensor) and not is_expanded(tensor)


def is_expanded(tensor: Tensor) -> bool:
    """Whether some elements certainly are the same memory."""
    return any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize
