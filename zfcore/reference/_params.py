"""The arguments of the ops as users write them, checked and brought to one form.

Every number is checked as a Python int, so no value overflows on the way to its error message.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from zfcore.errors import ArgumentError, DtypeError

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
MAX_TAPS = 255  # a switch is one byte

Pair = tuple[int, int]


class PoolParams(NamedTuple):
    """A pooling window, as in ``nn.MaxPool2d``: each an int or a pair (rows, columns), in pixels."""

    kernel_size: int | Pair
    stride: int | Pair | None = None
    padding: int | Pair = 0
    dilation: int | Pair = 1
    ceil_mode: bool = False


class ConvParams(NamedTuple):
    """A convolution that is run backwards, as in ``nn.Conv2d``: each an int or a pair, in pixels.

    ``output_padding`` adds rows and columns at the bottom and right of the result, as in
    ``nn.ConvTranspose2d``.
    """

    stride: int | Pair = 1
    padding: int | Pair = 0
    dilation: int | Pair = 1
    groups: int = 1
    output_padding: int | Pair = 0


class Places(NamedTuple):
    """Where a batch of patches of changes lies in the clean maps, and where the changes that come of them do.

    image:      [B] int64, which of the clean maps.
    origin:     [B, 2] int64, rows then columns: a patch's corner in the map before the operation.
    out_origin: [B, 2] int64, the result's corner in the map after it.
    size:       of the result.

    All patches lie inside their maps.
    """

    image: torch.Tensor
    origin: torch.Tensor
    out_origin: torch.Tensor
    size: Pair


class Limits(NamedTuple):
    """A member of the ReLU family: slope * v where v < 0, upper where v > upper, else v."""

    slope: float = 0.0
    upper: float = float("inf")


class Lrn(NamedTuple):
    """Local response normalisation, as in ``nn.LocalResponseNorm``."""

    size: int
    alpha: float
    beta: float
    k: float


class ConvChange(NamedTuple):
    """A convolution of changes, of which ``conv_delta`` is the op. Pairs are (rows, columns).

    window:    (kernel, stride, padding, dilation). padding: what lies above and left.
    map:       the size of its input.
    above:     the size of its output.
    rectifier: of the ReLU above it.
    """

    window: tuple[Pair, Pair, Pair, Pair]
    groups: int
    map: Pair
    above: Pair
    rectifier: Limits = Limits()


class StepParams(NamedTuple):
    """One step of the way down, of which ``deconv_step`` is the op. Pairs are (rows, columns).

    pool:    (kernel, stride, padding, dilation) of the pool that is undone first, or None.
    conv:    likewise of the convolution.
    map:     the size of the convolution's output, and so of the map that is unpooled to.
    below:   the size of its input.
    whole:   the result is the map below, not the patch of it that the signal reaches.
    rectify: drop what is negative before the filters.
    overlap: as of ``unpool2d``.
    """

    pool: tuple[Pair, Pair, Pair, Pair] | None
    conv: tuple[Pair, Pair, Pair, Pair]
    groups: int
    map: Pair
    below: Pair
    whole: bool
    rectify: bool
    overlap: str

    def reach(self, size: Pair) -> tuple[Pair, Pair]:
        """The sizes of the unpooled patch and of the patch below it, for a signal of ``size``."""
        places = size
        if self.pool is not None:
            places = _reach(size, self.pool)
        return places, self.below if self.whole else _reach(places, self.conv)


def _reach(size: Pair, window: tuple[Pair, Pair, Pair, Pair]) -> Pair:
    kernel, stride, _, dilation = window
    return tuple((n - 1) * s + d * (k - 1) + 1 for n, k, s, d in zip(size, kernel, stride, dilation))


# What says all of itself in a line. The repr of other things may hold a tensor, whose values may lie nowhere.
_PLAIN = (numbers.Number, str, bytes, type(None), range, torch.dtype, torch.device, torch.layout)
_MOST_SHOWN = 8


def show(value: Any, depth: int = 4) -> str:
    """The value for an error message: short, and safe for ints too long to print and tensors that hold nothing."""
    if depth == 0:
        return "..."
    if isinstance(value, (tuple, list)):
        shown = [show(each, depth - 1) for each in value[:_MOST_SHOWN]]
        inside = ", ".join([*shown, *["..."] * (len(value) > _MOST_SHOWN)])
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if isinstance(value, dict):
        pairs = list(value.items())[:_MOST_SHOWN]
        return "{" + ", ".join(f"{show(name, depth - 1)}: {show(each, depth - 1)}" for name, each in pairs) + "}"
    if isinstance(value, torch.Tensor):
        try:
            return f"<a tensor of shape {tuple(value.shape)}>"
        except RuntimeError:  # nested ones have none
            return f"<a {type(value).__name__}>"
    if type(value) is int and value.bit_length() > 1024:
        return f"<an int of {value.bit_length()} bits>"
    if not isinstance(value, _PLAIN):
        return f"<a {type(value).__name__}>"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def integer(name: str, value: Any, given: Any, low: int, high: int) -> int:
    """``value`` as an int within ``low`` and ``high``; ``given`` is what the user wrote, for the message."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise DtypeError(f"{name}={show(given)}: expected an int or a pair of ints")
        try:
            value = operator.index(value)
        except (TypeError, RuntimeError):  # a tensor of floats, or without a value, has __index__ and refuses it
            raise DtypeError(f"{name}={show(given)}: expected an int or a pair of ints") from None
    if value < low:
        raise ArgumentError(f"{name}={show(given)}: expected at least {low}")
    if value > high:
        raise ArgumentError(f"{name}={show(given)}: expected at most {high}")
    return value


def is_sequence(value: Any) -> bool:
    """Whether ``value`` is a tuple, list or the like; asking the builtins first is much the faster."""
    return isinstance(value, (tuple, list)) or (isinstance(value, Sequence) and not isinstance(value, str))


def pair(name: str, value: Any, low: int, high: int = INT64_MAX) -> Pair:
    """``value``, an int or a sequence of two, as a checked pair (rows, columns)."""
    if type(value) is int:
        checked = integer(name, value, value, low, high)
        return checked, checked
    if is_sequence(value):
        if len(value) == 1:
            return pair(name, value[0], low, high)
        if len(value) != 2:
            raise ArgumentError(f"{name}={show(value)}: expected an int or a pair (rows, columns)")
        return integer(name, value[0], value, low, high), integer(name, value[1], value, low, high)
    checked = integer(name, value, value, low, high)
    return checked, checked


def pool_params(
    kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: Any = False
) -> PoolParams:
    """The pooling arguments as pairs, checked for everything that does not depend on a tensor."""
    kernel = pair("kernel_size", kernel_size, 1)
    if kernel[0] * kernel[1] > MAX_TAPS:
        raise ArgumentError(
            f"kernel_size={show(kernel_size)}: expected at most {MAX_TAPS} taps, since a switch is one byte"
        )
    # An empty stride means the kernel's, as in torch.
    empty = isinstance(stride, (tuple, list)) and len(stride) == 0
    step = kernel if stride is None or empty else pair("stride", stride, 1)
    pad = pair("padding", padding, 0)
    if pad[0] > kernel[0] // 2 or pad[1] > kernel[1] // 2:
        raise ArgumentError(
            f"padding={show(padding)}: expected at most half of kernel_size={show(kernel_size)}"
        )
    spread = pair("dilation", dilation, 1)
    if type(ceil_mode) is not bool:
        raise DtypeError(f"ceil_mode={show(ceil_mode)}: expected True or False")
    return PoolParams(kernel, step, pad, spread, ceil_mode)


def conv_params(
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1, output_padding: Any = 0
) -> ConvParams:
    """The convolution's arguments as pairs, checked for everything that does not depend on a tensor."""
    step = pair("stride", stride, 1, INT32_MAX)
    pad = pair("padding", padding, 0, INT32_MAX)
    spread = pair("dilation", dilation, 1, INT32_MAX)
    groups = integer("groups", groups, groups, 1, INT32_MAX)
    extra = pair("output_padding", output_padding, 0, INT32_MAX)
    for axis in (0, 1):
        if extra[axis] >= max(step[axis], spread[axis]):
            raise ArgumentError(
                f"output_padding={show(output_padding)}: expected less than the larger of "
                f"stride={show(stride)} and dilation={show(dilation)}"
            )
    return ConvParams(step, pad, spread, groups, extra)


def as_pool(pool: Any) -> PoolParams:
    """A ``PoolParams``, a dict or tuple of its fields, a kernel size or an ``nn.MaxPool2d``, checked."""
    if isinstance(pool, tuple):
        if not 1 <= len(pool) <= len(PoolParams._fields):
            raise ArgumentError(f"pool={show(pool)}: expected the fields of PoolParams {PoolParams._fields}")
        return pool_params(*pool)
    if isinstance(pool, torch.nn.MaxPool2d):
        return pool_params(pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    if isinstance(pool, Mapping):
        if "kernel_size" not in pool:
            raise ArgumentError(f"pool={show(pool)}: expected a kernel_size in it")
        return pool_params(**_known("pool", pool, PoolParams))
    if isinstance(pool, bool) or not hasattr(pool, "__index__"):
        raise DtypeError(f"pool={show(pool)}: expected a PoolParams, dict, tuple, int or nn.MaxPool2d")
    return pool_params(pool)


def as_conv(conv: Any) -> ConvParams:
    """A ``ConvParams``, a dict or tuple of its fields, an ``nn.Conv2d`` or None (the defaults), checked."""
    if conv is None:
        return conv_params()
    if isinstance(conv, tuple):
        if len(conv) > len(ConvParams._fields):
            raise ArgumentError(f"conv={show(conv)}: expected the fields of ConvParams {ConvParams._fields}")
        return conv_params(*conv)
    if isinstance(conv, torch.nn.Conv2d):
        if conv.padding_mode != "zeros":
            raise ArgumentError(f"conv has padding_mode={conv.padding_mode!r}: expected 'zeros'")
        return conv_params(conv.stride, _conv_padding(conv), conv.dilation, conv.groups)
    if isinstance(conv, Mapping):
        return conv_params(**_known("conv", conv, ConvParams))
    raise DtypeError(f"conv={show(conv)}: expected a ConvParams, dict, tuple, nn.Conv2d or None")


def _known(name: str, fields: Mapping, kind: type) -> dict:
    unknown = [key for key in fields if key not in kind._fields]
    if unknown:
        raise ArgumentError(f"{name} has {show(unknown)}: expected only the fields {kind._fields}")
    return dict(fields)


def _conv_padding(conv: torch.nn.Conv2d) -> Pair:
    if conv.padding == "valid":
        return 0, 0
    if conv.padding != "same":
        return conv.padding
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(r % 2 for r in reach):
        raise ArgumentError(
            f"conv has padding='same' with kernel_size={conv.kernel_size} and dilation={conv.dilation}, "
            "which pads one side more: expected a symmetric padding"
        )
    return reach[0] // 2, reach[1] // 2


def overlap_mode(overlap: Any) -> str:
    """``overlap`` when it is one of the two modes."""
    if not isinstance(overlap, str):
        raise DtypeError(f"overlap={show(overlap)}: expected 'sum' or 'last'")
    if overlap not in ("sum", "last"):
        raise ArgumentError(f"overlap={show(overlap)}: expected 'sum' or 'last'")
    return overlap


def two(name: str, value: Sequence[int]) -> Pair:
    """``value``, whose elements are ints, when there are two of them; that they fit is for others to say."""
    if len(value) != 2:
        raise ArgumentError(f"{name}={show(value)}: expected two sizes (H, W)")
    return tuple(value)


def size_pair(output_size: Any) -> Pair:
    """``output_size`` as two sizes (H, W) of at least one pixel."""
    if not is_sequence(output_size):
        raise DtypeError(f"output_size={show(output_size)}: expected a pair of ints (H, W)")
    if len(output_size) != 2:
        raise ArgumentError(f"output_size={show(output_size)}: expected two sizes (H, W)")
    height, width = output_size
    return (
        integer("output_size", height, output_size, 1, INT64_MAX),
        integer("output_size", width, output_size, 1, INT64_MAX),
    )
