"""The kinds of tensors besides plain values in memory: named, and made plain where their values say all."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from zfcore.errors import DtypeError
from zfcore.ops import _boundary

_DISPATCH = Tensor.__torch_dispatch__
_FUNCTION = Tensor.__torch_function__
_FREED = ", the rest of which was freed"


class Freed(DtypeError):
    """An operation reads memory that is not there: some of torch's raise, others end the process."""


def check_memory(function: object, args: tuple | list) -> None:
    """That the tensors which an operation is given hold their values.

    Raises: Freed.
    """
    for each in args:
        if isinstance(each, list | tuple):
            check_memory(function, each)
        elif (type(each) is Tensor or type(each) is nn.Parameter) and (what := unusual(each)).endswith(_FREED):
            raise Freed(f"model: calls {function} on a tensor {what}")


def unusual(t: Tensor) -> str:
    """What a tensor is, in words, where it is not plain values in memory that holds them; else "".

    Views with the negative or the conjugate bit, and torch's zeros that have no memory, count as plain: `plain` makes
    them so. So do subclasses that have functions of their own and no more, and tensors on the meta device.
    """
    own = type(t)
    if own is Tensor or own is nn.Parameter:
        try:
            if _boundary.has_address(t) and not (t.is_quantized or t.is_nested or _reaches_outside(t)):
                return ""
        except RuntimeError:
            pass  # it has none, for one of the reasons below
    elif own.__torch_dispatch__ is not _DISPATCH:
        kept = "a nested tensor" if "Nested" in own.__name__ else ""
        return kept or f"a {own.__name__}, which computes in a way of its own"
    with torch._C.DisableTorchFunctionSubclass():
        return _described(t)


def without_values(t: Tensor) -> str:
    """As `unusual`, of an argument, which the meta device cannot hold."""
    meta = type(t).__torch_dispatch__ is _DISPATCH and t.is_meta
    return "on the meta device, which holds no values" if meta else unusual(t)


def _described(t: Tensor) -> str:
    if isinstance(t, UninitializedTensorMixin):
        return f"an {type(t).__name__}, which has no shape yet"
    if t.layout is not torch.strided:
        return f"a {t.layout} tensor"
    if t.is_nested or t.is_quantized:
        return "a nested tensor" if t.is_nested else "a quantised tensor"
    if t.is_meta:
        return ""
    if torch._is_functional_tensor(t) or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return "a tensor of a transform of torch.func"
    if t.numel() and not t._is_zerotensor() and (not _boundary.has_address(t) or _reaches_outside(t)):
        return f"of shape {tuple(t.shape)} in {t.untyped_storage().nbytes()} bytes of memory{_FREED}"
    return ""


def _reaches_outside(t: Tensor) -> bool:
    """Whether its last value lies behind the end of its memory."""
    length = t.numel()
    if length and not t.is_contiguous():
        length = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + length) * t.element_size() > t.untyped_storage().nbytes()


def plain(t: Tensor) -> Tensor:
    """A tensor that is not `unusual`, as values in memory and of no class of its own."""
    if type(t).__torch_function__ is not _FUNCTION and type(t) is not nn.Parameter:
        t = t.as_subclass(Tensor)
    if t._is_zerotensor():
        return torch.zeros(t.shape, dtype=t.dtype, device=t.device)
    if t.is_neg() or t.is_conj():
        return t.resolve_conj().resolve_neg()
    return t
