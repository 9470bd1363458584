"""Modes that refuse what a GPU would have to be waited for, or what mixes devices, on tensors that hold no values."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of several devices, which torch lets pass for the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        assert len({x.device for x in tensors}) <= 1 or "copy" in str(func), func
        return func(*args, **(kwargs or {}))


COPIES = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.cpu, torch.Tensor.cuda)
READS = (
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__bool__, torch.Tensor.__int__,
    torch.Tensor.__float__, torch.Tensor.__index__, torch.Tensor.nonzero, torch.nonzero, torch.Tensor.masked_select,
    torch.masked_select, torch.Tensor.unique, torch.unique, torch.equal,
)  # fmt: skip


class NothingWaits(TorchFunctionMode):
    """Refuses what a GPU would have to be waited for: numbers that are read from it, or copied to it out of plain memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in READS and function not in COPIES, function
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            for index in args[1] if isinstance(args[1], tuple) else (args[1],):
                assert not isinstance(index, list), "an index of numbers is copied to the device"
                assert getattr(index, "dtype", None) != torch.bool, "a mask as an index is counted first"
        result = function(*args, **(kwargs or {}))
        assert function is not torch.Tensor.to or result.device == args[0].device, "a copy to another device"
        return result
