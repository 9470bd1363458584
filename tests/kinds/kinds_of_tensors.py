"""The kinds of tensors that torch has besides plain values in memory, and how each is made of plain values."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Wrapper(Tensor):
    """A wrapper subclass without memory of its own, which hands operations on to what is inside."""

    results = True  # of operations are wrapped too

    @staticmethod
    def __new__(cls, inside: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, inside.shape, dtype=inside.dtype, device=inside.device, strides=inside.stride()
        )

    def __init__(self, inside: Tensor):
        self.inside = inside

    def __repr__(self) -> str:
        return f"{type(self).__name__}({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inside)

        def opened(leaf):
            return leaf.values() if isinstance(leaf, Wrapper) else leaf

        made = function(*pytree.tree_map(opened, args), **pytree.tree_map(opened, kwargs or {}))
        if cls.results:
            return pytree.tree_map(lambda leaf: cls(leaf) if isinstance(leaf, Tensor) else leaf, made)
        return made

    def values(self) -> Tensor:
        return self.inside


class Logging(Wrapper):
    """Says what is done with it."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        logging.getLogger("kinds").debug("%s", function)
        return super().__torch_dispatch__(function, types, args, kwargs)


class Halves(Wrapper):
    """A quantised weight, as libraries of quantisation have it: whole numbers of halves, made floats where they are read."""

    results = False

    @staticmethod
    def __new__(cls, inside: Tensor):
        return Tensor._make_wrapper_subclass(cls, inside.shape, dtype=torch.float32, strides=inside.stride())

    def values(self) -> Tensor:
        return self.inside.float() / 2


class Functions(Tensor):
    """A subclass that has functions of its own, and plain memory."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Named(nn.Parameter):
    """A parameter of a class of its own."""


def halved(t: Tensor) -> Tensor:
    return (t * 2).round()


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def shrunk(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.nbytes // 2)
    return t


def two(t: Tensor) -> Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(t.clone(), t.clone())


def masked(t: Tensor) -> Tensor:
    from torch.masked import masked_tensor

    return masked_tensor(t.clone(), torch.ones_like(t, dtype=torch.bool))


def mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


def distributed(t: Tensor) -> Tensor:
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(t.clone(), mesh(), [Replicate()])


def sharded(t: Tensor) -> Tensor:
    from torch.distributed._shard import sharded_tensor

    mesh()
    shard = sharded_tensor.Shard(t.clone(), sharded_tensor.ShardMetadata([0] * t.dim(), list(t.shape), "rank:0/cpu"))
    return sharded_tensor.init_from_local_shards([shard], *t.shape)


def negative(t: Tensor) -> Tensor:
    return torch._neg_view(-t)


def imaginary(t: Tensor) -> Tensor:
    """The imaginary part of a conjugate: a view with the negative bit and every second place of memory."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def conjugate(t: Tensor) -> Tensor:
    return torch.complex(t, t).conj()


def fake(t: Tensor) -> Tensor:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode().from_tensor(t)


def nested(t: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(t))


def jagged(t: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(t), layout=torch.jagged)


def per_channel(t: Tensor) -> Tensor:
    scales, zeros = torch.full((len(t),), 0.5), torch.zeros(len(t), dtype=torch.int64)
    return torch.quantize_per_channel(t, scales, zeros, 0, torch.qint8)


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def offset(t: Tensor) -> Tensor:
    return torch.cat([torch.full((7,), torch.nan), t.flatten()])[7:].view(t.shape)


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def reversed_axes(t: Tensor) -> Tensor:
    order = list(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def level(t: Tensor) -> Tensor:
    """A tensor of a transform that has ended."""
    kept = []
    torch.vmap(lambda x: kept.append(x) or x)(t[None])
    return kept[0]


def compressed(layout: torch.layout, **options):
    def make(t: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return t.to_sparse(layout=layout, **options)

    return make


def lazy(t: Tensor) -> Tensor:
    return nn.parameter.UninitializedParameter()


# How each is made of plain values.
KINDS = {
    "plain": lambda t: t,
    "freed": freed,
    "shrunk": shrunk,
    "two": two,
    "wrapper": Wrapper,
    "logging": Logging,
    "halves": lambda t: Halves(halved(t).to(torch.int8)),
    "functions": lambda t: t.clone().as_subclass(Functions),
    "named": lambda t: Named(t.clone(), requires_grad=False),
    "masked": masked,
    "distributed": distributed,
    "sharded": sharded,
    "zero": lambda t: torch._efficientzerotensor(tuple(t.shape)),
    "negative": negative,
    "imaginary": imaginary,
    "conjugate": conjugate,
    "fake": fake,
    "meta": lambda t: t.to("meta"),
    "functional": torch._to_functional_tensor,
    "coo": lambda t: t.to_sparse(),
    "hybrid": lambda t: t.to_sparse(1),
    "csr": compressed(torch.sparse_csr),
    "csc": compressed(torch.sparse_csc),
    "bsr": compressed(torch.sparse_bsr, blocksize=(1, 1)),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": nested,
    "jagged": jagged,
    "per tensor": lambda t: torch.quantize_per_tensor(t, 0.5, 0, torch.qint8),
    "per channel": per_channel,
    "level": level,
    "inference": inference,
    "gradient": lambda t: t.clone().requires_grad_(),
    "lazy": lazy,
    "complex": lambda t: torch.complex(t, t),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "half": lambda t: t.half(),
    "double": lambda t: t.double(),
    "bool": lambda t: t > 0,
    "int": lambda t: t.int(),
    "int8": lambda t: t.to(torch.int8),
    "expanded": expanded,
    "offset": offset,
    "strided": strided,
    "reversed": reversed_axes,
    "last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.clone(),
    "empty": lambda t: t[:0],
    "nan": lambda t: t.clone().fill_(torch.nan),
    "infinite": lambda t: t.clone().index_fill_(0, torch.tensor([0]), torch.inf),
    "huge": lambda t: t * 1e38,
}
# The plain values that one means, where those are not what it was made of.
VALUES = {
    "halves": lambda t: halved(t) / 2,
    "zero": torch.zeros_like,
    "per tensor": lambda t: halved(t) / 2,
    "per channel": lambda t: halved(t) / 2,
    "float8": lambda t: t.to(torch.float8_e4m3fn).float(),
    "half": lambda t: t.half().float(),
    "expanded": lambda t: expanded(t).contiguous(),
    "empty": lambda t: t[:0].clone(),
    "nan": lambda t: t.clone().fill_(torch.nan),
    "infinite": KINDS["infinite"],
    "huge": KINDS["huge"],
}
