"""Memory for the signals of one call, used again from stage to stage and from batch to batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from zfcore.ops import _boundary
from zfcore.ops._library import native


class Buffers:
    """Fresh memory is slow: the system clears each page of it when it is first written."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.spare: list[Tensor] = []
        self.used: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}  # by the id of the storage, kept alive by it

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """[B, C, h, w], channels last, or of any other rank; its contents undefined."""
        count = torch.Size(shape).numel()
        fitting = [i for i, memory in enumerate(self.spare) if count <= len(memory) <= 2 * count]
        if fitting:
            memory = self.spare.pop(min(fitting, key=lambda i: len(self.spare[i])))
        else:
            memory = torch.empty(count, dtype=self.dtype, device=self.device)
            if self.device.type == "cpu" and native is not None:
                native.advise_huge_pages(_boundary.address(memory), memory.nbytes)
        storage = memory.untyped_storage()
        self.used[id(storage)] = storage, memory
        if len(shape) != 4:
            return memory[:count].view(shape)
        b, c, h, w = shape
        return memory[:count].view(b, h, w, c).permute(0, 3, 1, 2)

    def only(self, tensor: Tensor, others: Iterable[Tensor]) -> bool:
        """Whether it lies in this memory, and no other does there."""
        storage = tensor.untyped_storage()
        return id(storage) in self.used and all(other.untyped_storage() is not storage for other in others)

    def give_back(self, tensor: Tensor) -> None:
        """Nothing reads the memory that it lies in any more."""
        self.spare.append(self.used.pop(id(tensor.untyped_storage()))[1])

    def give_all_back(self) -> None:
        self.spare += [memory for _, memory in self.used.values()]
        self.used.clear()
