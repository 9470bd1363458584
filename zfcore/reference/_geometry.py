"""Sizes and windows of pooling, unpooling and transposed convolution. Sizes may be symbolic."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from zfcore.errors import ArgumentError, DeviceError, DtypeError, ShapeError, SwitchError
from zfcore.reference._params import INT64_MAX, ConvParams, Pair, PoolParams, show

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# ((kh, kw), (sh, sw), (ph, pw), (dh, dw))
Window = tuple[Pair, Pair, Pair, Pair]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: half types accumulate in float32 and are rounded once."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class Spec(NamedTuple):
    """What the checks below read of a tensor; it can be hashed, where a tensor's own values are not."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.layout
    device: torch.device


def spec(x: torch.Tensor) -> Spec:
    """The tensor's ``Spec``."""
    try:
        return Spec(x.shape, x.dtype, x.layout, x.device)
    except (AttributeError, RuntimeError) as error:  # None, and what has no shape
        raise DtypeError(f"a {type(x).__name__} without a shape: expected a dense torch.Tensor") from error


def shape_of(name: str, x: torch.Tensor | Spec) -> torch.Size:
    """Its shape, where it has one: None and nested tensors do not."""
    try:
        return x.shape
    except (AttributeError, RuntimeError) as error:
        raise DtypeError(f"{name} is a {type(x).__name__} without a shape: expected a dense torch.Tensor") from error


def check_map(name: str, x: torch.Tensor | Spec) -> None:
    """Refuse what is not a dense float map [N, C, H, W] with at least one channel."""
    if len(shape_of(name, x)) != 4:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}: expected [N, C, H, W] or [C, H, W]")
    if x.dtype not in FLOATS:
        raise DtypeError(f"{name} has dtype {x.dtype}: expected float32, float64, bfloat16 or float16")
    if x.layout is not torch.strided:
        raise DtypeError(f"{name} has layout {x.layout}: expected a dense (strided) tensor")
    if x.shape[1] < 1:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}: expected at least one channel")


def check_tensor(name: str, value: object) -> None:
    """Refuse what is not a tensor."""
    if not isinstance(value, torch.Tensor):
        raise DtypeError(f"{name} is a {type(value).__name__}: expected a torch.Tensor")


def pooled_length(length: int, pool: PoolParams, axis: int, ceil_mode: bool) -> int:
    """Windows along one axis; a window that would start in the far padding is dropped."""
    k, s, p, d = (field[axis] for field in pool[:4])
    spare = length + 2 * p - d * (k - 1) - 1
    if not ceil_mode:
        return spare // s + 1
    # Window o starts inside the map or its near padding: o*s < length + p.
    return torch.sym_min((spare + s - 1) // s, (length + p - 1) // s) + 1


def has_tap(length: int, pooled: int, pool: PoolParams, axis: int) -> bool:
    """Whether every window has a tap in the map. Only a dilated one that starts in the padding can miss."""
    _, s, p, d = (field[axis] for field in pool[:4])
    if p == 0 or d == 1:
        return True
    return all(start % d < length for o, start in enumerate(range(-p, 0, s)) if o < pooled)


def pooled_size(size: Pair, pool: PoolParams) -> Pair:
    """(H, W) of the pooled map of a map of ``size``."""
    for length, what in zip(size, ("rows", "columns"), strict=True):
        if length < 1:
            raise ShapeError(f"x has {length} {what}: expected at least 1")
    pooled = tuple(pooled_length(size[axis], pool, axis, pool.ceil_mode) for axis in (0, 1))
    for axis in (0, 1):
        if pooled[axis] < 1 or not has_tap(size[axis], pooled[axis], pool, axis):
            raise ShapeError(
                f"kernel_size={show(pool.kernel_size)} with padding={show(pool.padding)} and "
                f"dilation={show(pool.dilation)} does not fit in a map of {show(tuple(size))}: "
                "expected a window with a tap inside it"
            )
    return pooled


def unpooled_size(pooled: Pair, pool: PoolParams, output_size: Pair | None) -> Pair:
    """(H, W) of the unpooled map: ``output_size``, or the smallest size that pools to ``pooled``."""
    if output_size is not None:
        return output_size
    lengths = []
    for axis in (0, 1):
        k, s, p, d = (field[axis] for field in pool[:4])
        length = (pooled[axis] - 1) * s + d * (k - 1) + 1 - 2 * p
        # Only padding of half an even kernel can leave nothing of a single window.
        lengths.append(torch.sym_max(1, length) if 2 * p > d * (k - 1) else length)
    return tuple(lengths)


def check_unpooled_size(pooled: Pair, pool: PoolParams, size: Pair) -> None:
    """Refuse a ``size`` of the unpooled map that does not pool to ``pooled``, with or without ceil_mode."""
    for axis in (0, 1):
        length = size[axis]
        if pooled[axis] < 1:
            raise ShapeError(f"y has {show(tuple(pooled))} pooled rows and columns: expected at least 1")
        back = pooled_length(length, pool, axis, False)
        if length < 1 or not (
            back == pooled[axis] or pooled_length(length, pool, axis, True) == pooled[axis]
        ):
            raise ShapeError(
                f"output_size={show(tuple(size))}: expected a size that pools to y's {show(tuple(pooled))} "
                f"with kernel_size={show(pool.kernel_size)}, stride={show(pool.stride)}, "
                f"padding={show(pool.padding)}, dilation={show(pool.dilation)}; "
                f"it pools to {show(back)} in axis {axis - 2}"
            )
        if not has_tap(length, pooled[axis], pool, axis):
            raise ShapeError(
                f"output_size={show(tuple(size))}: a window with dilation={show(pool.dilation)} and "
                f"padding={show(pool.padding)} has no tap inside it"
            )


def conv_transposed_size(
    pooled: Pair, pool: PoolParams, conv: ConvParams, kernel: Pair, output_size: Pair | None
) -> tuple[Pair, Pair]:
    """(Hu, Wu) of the unpooled map and (H, W) of the transposed convolution's result."""
    if output_size is None:
        unpooled = unpooled_size(pooled, pool, None)
        return unpooled, tuple(transposed_length(unpooled, conv, kernel, axis) for axis in (0, 1))
    unpooled = []
    for axis in (0, 1):
        reach = conv.dilation[axis] * (kernel[axis] - 1) + 1
        spare = output_size[axis] - conv.output_padding[axis] + 2 * conv.padding[axis] - reach
        # A size that is given without an output padding takes the one that it needs.
        if conv.output_padding[axis] != 0 and spare % conv.stride[axis] != 0:
            raise ShapeError(
                f"output_size={show(tuple(output_size))}: expected a size that conv={show(conv)} with kernel "
                f"{show(tuple(kernel))} makes with this output_padding, or no output_padding"
            )
        unpooled.append(spare // conv.stride[axis] + 1)
    return tuple(unpooled), output_size


def check_conv_transposed_size(
    pooled: Pair, pool: PoolParams, conv: ConvParams, kernel: Pair, unpooled: Pair, size: Pair
) -> None:
    """Refuse sizes of the fused op that do not belong together."""
    extra = output_padding_of(unpooled, size, conv, kernel)
    for axis in (0, 1):
        if size[axis] < 1 or unpooled[axis] < 1:
            raise ShapeError(
                f"output_size={show(tuple(size))} from an unpooled map of {show(tuple(unpooled))}: expected "
                f"at least one pixel in both; conv={show(conv)}, kernel {show(tuple(kernel))}"
            )
        if not 0 <= extra[axis] < max(conv.stride[axis], conv.dilation[axis]):
            raise ShapeError(
                f"output_size={show(tuple(size))}: expected a size that conv={show(conv)} with "
                f"kernel {show(tuple(kernel))} maps to the unpooled {show(tuple(unpooled))}"
            )
    check_unpooled_size(pooled, pool, unpooled)


def output_padding_of(unpooled: Pair, size: Pair, conv: ConvParams, kernel: Pair) -> Pair:
    """The output padding with which the transposed convolution takes ``unpooled`` to ``size``."""
    bare = ConvParams(*conv[:4], output_padding=(0, 0))
    return tuple(size[axis] - transposed_length(unpooled, bare, kernel, axis) for axis in (0, 1))


def transposed_length(unpooled: Pair, conv: ConvParams, kernel: Pair, axis: int) -> int:
    """Length of the transposed convolution's result along one axis."""
    reach = conv.dilation[axis] * (kernel[axis] - 1) + 1
    full = (unpooled[axis] - 1) * conv.stride[axis] + reach
    return full - 2 * conv.padding[axis] + conv.output_padding[axis]


def check_result(like: torch.Tensor | Spec, *shape: int) -> None:
    """Refuse a result, of ``like``'s dtype and device, that no memory could hold, before it is allocated."""
    count = 1
    for length in shape:
        count *= length
    size = count * like.dtype.itemsize
    if size > INT64_MAX:
        raise ShapeError(
            f"the result would have shape {show(shape)}, {show(size)} bytes: expected under 2**63"
        )
    if size > 2**32 and like.device.type == "cpu" and size > _memory():
        raise ShapeError(
            f"the result would have shape {show(shape)}, {show(size)} bytes: this machine has {_memory()}"
        )


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_switches(y: torch.Tensor | Spec, switches: torch.Tensor | Spec) -> None:
    """Refuse switches that are not bytes of y's shape on y's device."""
    shape = shape_of("switches", switches)
    if switches.dtype is not torch.uint8:
        raise DtypeError(f"switches has dtype {switches.dtype}: expected torch.uint8")
    if shape != y.shape:
        raise ShapeError(f"switches has shape {tuple(shape)}: expected the pooled map's {tuple(y.shape)}")
    if switches.device != y.device:
        raise DeviceError(f"switches is on {switches.device}: expected {y.device}, where the pooled map is")


def check_gather_switches(x: torch.Tensor | Spec, switches: torch.Tensor | Spec) -> None:
    """Refuse switches that are not bytes [N, C, Oh, Ow] with the N and C of the map x."""
    shape = shape_of("switches", switches)
    if switches.dtype is not torch.uint8:
        raise DtypeError(f"switches has dtype {switches.dtype}: expected torch.uint8")
    if len(shape) != 4 or shape[:2] != x.shape[:2]:
        raise ShapeError(
            f"switches has shape {tuple(switches.shape)}: expected [N, C, Oh, Ow] with the N and C "
            f"of x, {tuple(x.shape)}"
        )
    if switches.device != x.device:
        raise DeviceError(f"switches is on {switches.device}: expected {x.device}, where x is")


def pool_window(size: Pair, pooled: Pair, pool: PoolParams) -> Window:
    """The pooling window in its plainest equal form, so that no index arithmetic on it overflows.

    A single window never steps; taps beyond the map's end are equal wherever they are.
    """
    kernel, stride, padding, dilation = pool[:4]
    step = tuple(1 if pooled[a] == 1 else stride[a] for a in (0, 1))
    spread = tuple(1 if kernel[a] == 1 else min(dilation[a], size[a] + padding[a]) for a in (0, 1))
    return tuple(kernel), step, tuple(padding), spread


def conv_window(kernel: Pair, unpooled: Pair, conv: ConvParams) -> Window:
    """The convolution's window in its plainest equal form, as ``pool_window``."""
    step = tuple(1 if unpooled[a] == 1 else conv.stride[a] for a in (0, 1))
    spread = tuple(1 if kernel[a] == 1 else conv.dilation[a] for a in (0, 1))
    return tuple(kernel), step, tuple(conv.padding), spread


def switch_targets(switches: torch.Tensor, size: Pair, window: Window) -> torch.Tensor:
    """The place y*W + x in a map of ``size`` that each switch names: int64 [N, C, Oh, Ow].

    Raises SwitchError for the first switch that names no place.
    """
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = window
    height, width = size
    device = switches.device
    tap = switches.long()
    row = torch.arange(switches.size(2), device=device)[:, None] * sh - ph + tap // kw * dh
    column = torch.arange(switches.size(3), device=device) * sw - pw + tap % kw * dw
    bad = (tap >= kh * kw) | (row < 0) | (row >= height) | (column < 0) | (column >= width)
    if bad.any():
        raise bad_switch(switches, int(bad.flatten().nonzero()[0]), size, window)
    return row * width + column


def bad_switch(switches: torch.Tensor, index: int, size: Pair, window: Window) -> SwitchError:
    """The error for the switch with linear index ``index`` in N, C, Oh, Ow order."""
    place = []
    for length in reversed(switches.shape):
        index, last = divmod(index, length)
        place.insert(0, last)
    n, c, oy, ox = place
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = window
    byte = int(switches[n, c, oy, ox])
    said = f"switches[{n}, {c}, {oy}, {ox}] = {byte}"
    if byte >= kh * kw:
        return SwitchError(f"{said}: expected a tap of the {kh}x{kw} window, 0 to {kh * kw - 1}")
    row, column = oy * sh - ph + byte // kw * dh, ox * sw - pw + byte % kw * dw
    return SwitchError(
        f"{said} names row {row}, column {column}: expected a place in the {size[0]}x{size[1]} map"
    )


def check_weight(y: torch.Tensor | Spec, weight: torch.Tensor | Spec, groups: int) -> None:
    """Refuse a weight that is not [K, C/groups, kh, kw] for a y with K channels."""
    if len(shape_of("weight", weight)) != 4:
        raise ShapeError(f"weight has shape {tuple(weight.shape)}: expected [K, C/groups, kh, kw]")
    if weight.layout is not torch.strided:
        raise DtypeError(f"weight has layout {weight.layout}: expected a dense (strided) tensor")
    for length in weight.shape:
        if length < 1:
            raise ShapeError(f"weight has shape {tuple(weight.shape)}: expected no empty axis")
    if weight.shape[0] != y.shape[1]:
        raise ShapeError(
            f"weight has {weight.shape[0]} output channels (axis 0): expected y's channels, {y.shape[1]}"
        )
    if weight.dtype != y.dtype:
        raise DtypeError(f"weight has dtype {weight.dtype}: expected y's, {y.dtype}")
    if weight.device != y.device:
        raise DeviceError(f"weight is on {weight.device}: expected {y.device}, where y is")
    if y.shape[1] % groups != 0:
        raise ArgumentError(f"groups={groups}: expected a divisor of y's {y.shape[1]} channels")
