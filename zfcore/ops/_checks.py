"""What the engines' ops refuse before a kernel sees it: tensors of other kinds and places, numbers out of range.

Numbers are checked as Python ints, so that none overflows on the way. csrc/checks.h looks once more at what would lead a
kernel out of its memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from zfcore.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from zfcore.ops import _boundary
from zfcore.ops._library import is_plain
from zfcore.reference._params import INT32_MAX, Pair, integer, is_sequence, show

MOST = INT32_MAX  # of a window's numbers, as of torch's, and of pixels along an axis, which the kernels count in 32 bits

Window = tuple[Pair, Pair, Pair, Pair]


def tensor(name: str, x: Any, device: torch.device | None = None) -> torch.Tensor:
    """``x`` when it is a dense tensor on ``device``; its negative and conjugate bits are carried out."""
    if is_plain(x) and _boundary.is_somewhere(x) and (device is None or x.device == device):
        return x
    if not isinstance(x, torch.Tensor):
        raise DtypeError(f"{name} is a {type(x).__name__}: expected a torch.Tensor")
    if x.layout is not torch.strided or x.is_nested or x.is_quantized:
        raise DtypeError(f"{name} is a {kind(x)} tensor: expected a dense one")
    if not (isinstance(x, FakeTensor) or x.is_meta):  # which have no values, and run on what needs none
        x = x.resolve_neg().resolve_conj()
        _boundary.pointer(x, name)
    if device is not None and x.device != device:
        raise DeviceError(f"{name} on {x.device}: expected {device}, where the others are")
    return x


def ends(name: str, values: torch.Tensor) -> tuple[int, int]:
    """The least and the largest of some ints; 0 and -1 of none."""
    if not len(values):
        return 0, -1
    try:
        return tuple(int(end) for end in torch.aminmax(values))
    except (RuntimeError, NotImplementedError) as error:
        raise DtypeError(f"{name}: a {type(values).__name__} on {values.device}, whose values cannot be read") from error


def explained(kernel: Callable, explain: Callable[[], None], *arguments: object) -> Any:
    """What a native kernel returns. Where it refuses, ``explain`` may say by name what it only knows to be wrong."""
    try:
        return kernel(*arguments)
    except ArgumentError:
        explain()
        raise


def batched(name: str, x: torch.Tensor) -> torch.Tensor:
    """A map [C, H, W] as a batch of one, which torch makes of no tensor that was freed."""
    if is_plain(x):
        _boundary.pointer(x, name)
    return x.unsqueeze(0)


def optional(name: str, x: Any, device: torch.device) -> torch.Tensor | None:
    """As ``tensor``, or None."""
    return None if x is None else tensor(name, x, device)


def kind(x: torch.Tensor) -> str:
    """What the tensor is, in a word, where it is not a dense one."""
    return "nested" if x.is_nested else "quantised" if x.is_quantized else str(x.layout).removeprefix("torch.")


def result(out: Any, like: torch.Tensor, shape: Sequence[int], *read: torch.Tensor | None, last: bool = False) -> torch.Tensor:
    """``out`` when it can be written into, as a result of this shape, of like's dtype and device.

    read: what the op reads, none of which may share memory with it but all of it. last: whether its channels have to lie
    next to each other.
    """
    if not isinstance(out, torch.Tensor):
        raise DtypeError(f"out is a {type(out).__name__}: expected a torch.Tensor")
    if not is_plain(out) and (out.layout is not torch.strided or out.is_quantized or out.is_neg() or out.is_nested):
        raise DtypeError(f"out: expected a dense tensor of plain values, not a {kind(out)} one or a negated view")
    if out.device != like.device:
        raise DeviceError(f"out on {out.device}: expected {like.device}, where the others are")
    if tuple(out.shape) != tuple(shape) or out.dtype != like.dtype or (last and out.stride(1) != 1 != out.size(1)):
        layout = ", channels last" if last else ""
        raise ShapeError(f"out of {out.dtype} {tuple(out.shape)}: expected {like.dtype} {tuple(shape)}{layout}")
    if out.requires_grad:
        raise ArgumentError("out requires grad, which nothing here records: expected one that does not")
    if not (_boundary.is_dense(out) or _apart(out)):
        raise ShapeError(f"out of strides {out.stride()}: expected no two of its values in one place")
    first, end = _boundary.span(out)
    for x in read:
        if x is None or x is out or x.device != out.device:
            continue
        low, high = _boundary.span(x)
        if first < high and low < end and not (first == low and out.stride() == x.stride() and out.shape == x.shape):
            raise ArgumentError("out shares memory with what is read: expected memory of its own")
    return out


def _apart(x: torch.Tensor) -> bool:
    """Whether each element has a place of its own."""
    below = 0  # what the axes of smaller strides span
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= below:
            return False
        below += stride * (size - 1)
    return True


def pair(name: str, value: Any, low: int, high: int = MOST) -> Pair:
    """``value`` as two ints (rows, columns) within ``low`` and ``high``."""
    if is_pair(value, low, high):
        return value
    if not is_sequence(value):
        raise DtypeError(f"{name}={show(value)}: expected a pair of ints (rows, columns)")
    if len(value) != 2:
        raise ArgumentError(f"{name}={show(value)}: expected a pair (rows, columns)")
    return tuple(integer(name, each, value, low, high) for each in value)


def window(name: str, value: Any) -> Window:
    """``value`` as (kernel, stride, padding, dilation), each a pair in pixels."""
    if is_window(value):
        return value
    if not is_sequence(value):
        raise DtypeError(f"{name}={show(value)}: expected (kernel, stride, padding, dilation)")
    if len(value) != 4:
        raise ArgumentError(f"{name}={show(value)}: expected (kernel, stride, padding, dilation)")
    kernel, stride, padding, dilation = value
    return (
        pair(f"{name} kernel", kernel, 1),
        pair(f"{name} stride", stride, 1),
        pair(f"{name} padding", padding, 0),
        pair(f"{name} dilation", dilation, 1),
    )


def is_window(value: Any) -> bool:
    """Whether ``value`` is a window as it should be: of tuples of ints."""
    if not isinstance(value, tuple) or len(value) != 4:
        return False
    kernel, stride, padding, dilation = value
    return is_pair(kernel, 1) and is_pair(stride, 1) and is_pair(padding, 0) and is_pair(dilation, 1)


def is_pair(value: Any, low: int, high: int = MOST) -> bool:
    """Whether ``value`` is a pair as it should be: a tuple of two ints in range."""
    if type(value) is not tuple or len(value) != 2:
        return False
    rows, columns = value
    return type(rows) is int and type(columns) is int and low <= rows <= high and low <= columns <= high


@functools.lru_cache(maxsize=4096)
def reach(name: str, count: Pair, of: Window) -> Pair:
    """The pixels, of rows and of columns, that ``count`` windows lie over."""
    kernel, stride, _, dilation = of
    pixels = tuple((count[a] - 1) * stride[a] + (kernel[a] - 1) * dilation[a] + 1 for a in (0, 1))
    if max(pixels) > MOST:
        raise ArgumentError(f"{name}={show(of)}: {show(tuple(count))} windows reach over 2**31 pixels or more")
    return pixels


def groups(value: Any, channels: int) -> int:
    """``value`` when it divides the channels."""
    value = integer("groups", value, value, 1, MOST)
    if channels % value:
        raise ArgumentError(f"groups={value}: expected a divisor of the {channels} channels")
    return value


def number(name: str, value: Any) -> float:
    """``value`` as a float; infinite and NaN are numbers too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DtypeError(f"{name}={show(value)}: expected a number")
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


def flag(name: str, value: Any) -> bool:
    """``value`` when it is True or False."""
    if type(value) is not bool:
        raise DtypeError(f"{name}={show(value)}: expected True or False")
    return value


def record(name: str, value: Any, kind_of: type) -> Any:
    """``value`` when it is one of these records of arguments."""
    if not isinstance(value, kind_of):
        raise DtypeError(f"{name}={show(value)}: expected a {kind_of.__name__}")
    return value
