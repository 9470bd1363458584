"""The ops under attack: how a good call of each is drawn, how it is made, and what its definition says of it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import attack_binding
import attack_hostile
import numpy
import torch

import zfcore.ops
from zfcore import reference
from zfcore.errors import ShapeError
from zfcore.ops.conv_boxes import conv_boxes
from zfcore.ops.conv_delta import conv_delta, delta_filters
from zfcore.ops.conv_strongest import conv_strongest
from zfcore.ops.deconv_step import deconv_step
from zfcore.ops.lrn_delta import lrn_delta
from zfcore.ops.paste_boxes import paste_boxes
from zfcore.ops.pointwise_delta import pointwise_delta
from zfcore.ops.pool_delta import pool_delta
from zfcore.ops.relu_delta import relu_delta
from zfcore.ops.strongest import strongest
from zfcore.reference._geometry import check_conv_transposed_size, output_padding_of, pooled_size
from zfcore.reference._params import (
    ConvChange,
    ConvParams,
    Limits,
    Lrn,
    Places,
    PoolParams,
    StepParams,
    conv_params,
    pool_params,
)
from zfcore.reference.pointwise_delta import FUNCTIONS

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
import changes  # noqa: E402  of the tests of the ops: where patches lie

CHANNELS = (1, 2, 3, 4, 4, 8, 16, 17, 33)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float32, torch.float64)
MANY_TAPS = ((15, 17), (16, 16), (1, 255), (1, 256), (32, 32))  # around what a switch's byte can name


@dataclass(frozen=True)
class Op:
    """An op under attack.

    make:    good arguments by name, drawn from a random.Random and torch's seed.
    run:     calls the op with them.
    define:  what its definition gives for them, or raises; None where there is none, and any exception is right.
    trusted: names of arguments that the op documents it does not check: with another in its place no value is judged.
    swap:    puts another argument in place of one, such as only this op has.
    """

    make: Callable[[random.Random], dict]
    run: Callable[..., object]
    define: Callable[..., object] | None
    trusted: tuple[str, ...] = ()
    swap: Callable[[random.Random, dict], tuple[dict, list[tuple]]] | None = None


def maps(choose: random.Random, shape: tuple[int, ...], dtypes=DTYPES) -> torch.Tensor:
    x = torch.randn(shape).to(choose.choice(dtypes))
    return x.contiguous(memory_format=torch.channels_last) if choose.random() < 0.4 else x


def draw_pool(choose: random.Random) -> tuple[list, tuple[int, int]]:
    """A pooling window (kernel, stride, padding, dilation), and a map that it fits in."""
    while True:
        kernel = choose.randint(1, 4), choose.randint(1, 4)
        stride = choose.randint(1, 4), choose.randint(1, 3)
        if choose.random() < 0.04:
            kernel, stride = choose.choice(MANY_TAPS), (1, 1)
        padding = tuple(choose.choice([0, k // 2]) for k in kernel)
        dilation = choose.choice([1, 1, 2, 3]), choose.choice([1, 1, 2])
        size = tuple(
            max(1, d * (k - 1) + 1 - 2 * p + choose.randint(0, 6)) for k, p, d in zip(kernel, padding, dilation)
        )
        window = [list(pair) for pair in (kernel, stride, padding, dilation)]
        try:
            pooled_size(size, pool_params(*window))
        except ShapeError:
            continue
        except ValueError:  # more taps than a byte names: to be refused
            pass
        return window, size


def draw_pooled(choose: random.Random, dtypes=DTYPES, channels=CHANNELS):
    """A map, its window, and its pooled map and switches; of a window of too many taps, such of another one."""
    window, size = draw_pool(choose)
    x = maps(choose, (choose.choice([1, 2, 2, 3]), choose.choice(channels), *size), dtypes)
    try:
        y, switches = reference.max_pool2d_with_switches(x, *window)
    except ValueError:
        y = x[:, :, :1, :1].contiguous()
        switches = torch.full_like(y, 255, dtype=torch.uint8)
    if choose.random() < 0.3:
        switches = switches.contiguous(memory_format=torch.channels_last)
    return x, window, y, switches


def make_max_pool(choose):
    window, size = draw_pool(choose)
    x = maps(choose, (choose.choice([0, 1, 2, 2]), choose.choice(CHANNELS), *size))
    return dict(x=x, **_window(window), ceil_mode=choose.random() < 0.5)


def _window(window, prefix=""):
    names = "kernel_size", f"{prefix}stride", f"{prefix}padding", f"{prefix}dilation"
    return dict(zip(names, window, strict=True))


def make_unpool(choose):
    x, window, y, switches = draw_pooled(choose)
    size = list(x.shape[2:])
    return dict(
        y=y, switches=switches, **_window(window), output_size=size, overlap=choose.choice(["sum", "sum", "last"])
    )


def make_gather(choose):
    x, window, _, switches = draw_pooled(choose)
    return dict(x=x, switches=switches, **_window(window), overlap=choose.choice(["sum", "last"]))


def draw_conv(choose: random.Random) -> tuple:
    """A convolution's (kernel, stride, padding, dilation)."""
    kernel = choose.choice([1, 2, 3, 3, 5]), choose.choice([1, 2, 3, 3])
    dilation = choose.choice([1, 1, 2]), choose.choice([1, 1, 2])
    padding = tuple(choose.randint(0, d * (k - 1)) for k, d in zip(kernel, dilation))
    return kernel, (choose.choice([1, 1, 2, 3]), choose.choice([1, 1, 2])), padding, dilation


def make_fused(choose):
    x, window, y, switches = draw_pooled(choose)
    unpooled, groups = tuple(x.shape[2:]), 2 if y.size(1) % 2 == 0 and choose.random() < 0.3 else 1
    kernel, stride, padding, dilation = draw_conv(choose)
    weight = torch.randn(y.size(1), choose.choice([1, 2, 3, 8, 17]), *kernel).to(y.dtype)
    extra = [choose.choice([0, 0, max(s, d) - 1]) for s, d in zip(stride, dilation)]
    size = [
        max(1, (n - 1) * s + d * (k - 1) + 1 - 2 * p + e)
        for n, k, s, p, d, e in zip(unpooled, kernel, stride, padding, dilation, extra)
    ]
    return dict(
        y=y, switches=switches, weight=weight, **_window(window, "pool_"), stride=list(stride), padding=list(padding),
        dilation=list(dilation), groups=groups, unpooled_size=list(unpooled), output_size=size,
        overlap=choose.choice(["sum", "last"]),
    )  # fmt: skip


def define_fused(y, switches, weight, kernel_size, pool_stride, pool_padding, pool_dilation, stride, padding, dilation,
                 groups, unpooled_size, output_size, overlap):  # fmt: skip
    """Both sizes are given: the output padding is what lies between them."""
    pool = pool_params(kernel_size, pool_stride, pool_padding, pool_dilation)
    conv = conv_params(stride, padding, dilation, groups)
    kernel = tuple(weight.shape[2:])
    check_conv_transposed_size(tuple(y.shape[2:]), pool, conv, kernel, tuple(unpooled_size), tuple(output_size))
    extra = output_padding_of(unpooled_size, output_size, conv, kernel)
    return reference.unpool_relu_conv_transpose2d(
        y, switches, weight, pool=pool, conv=ConvParams(*conv[:4], extra), output_size=output_size, overlap=overlap
    )


def overload(name: str, make: Callable, define: Callable) -> Op:
    """A registered op, called as an exported program calls it: by its overload, every argument in its place."""
    op = getattr(torch.ops.zfcore, name).default
    kinds = [str(argument.type) for argument in op._schema.arguments]

    def defined(**args):
        return define(*map(_as_schema, kinds, args.values()))

    return Op(make, lambda **args: op(*args.values()), defined)


def make_step(choose):
    """As `make_fused`, for the public function, which works out the sizes that are not given."""
    args = make_fused(choose)
    y, switches, weight, *pool = (args[name] for name in list(args)[:7])
    conv = ConvParams(*(args[name] for name in ("stride", "padding", "dilation", "groups")))
    return dict(
        y=y, switches=switches, weight=weight, pool=PoolParams(*pool), conv=conv, output_size=args["output_size"],
        overlap=args["overlap"], strict_nan=choose.random() < 0.2,
    )  # fmt: skip


def public(name: str, make: Callable) -> Op:
    return Op(make, getattr(zfcore.ops, name), getattr(reference, name))


def _as_schema(kind: str, value: object) -> object:
    """The value as the dispatcher hands it on: any number is a bool to it, a tensor of one an int, and bytes are text."""
    if kind == "bool":
        return bool(value)
    if kind == "str" and isinstance(value, bytes):
        return value.decode()
    if kind != "Tensor" and isinstance(value, (numpy.ndarray, torch.Tensor)):
        value = int(value) if kind == "int" else value.tolist()
    if isinstance(value, (list, tuple, dict)):
        return [_as_schema("int", x) for x in value]
    return int(value) if isinstance(value, bool) else value


# The engine's own ops -------------------------------------------------------------------------------------------------


def draw_out(choose: random.Random, args: dict, shape: tuple[int, ...], dtype: torch.dtype) -> dict:
    """The arguments with memory for the result, in some calls."""
    if choose.random() < 0.3:
        args["out"] = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last).fill_(7)
    else:
        args["out"] = None
    return args


def into(result: torch.Tensor, out: object) -> torch.Tensor:
    if out is None or (isinstance(out, torch.Tensor) and not out.numel()):
        return result
    with torch.inference_mode(isinstance(out, torch.Tensor) and out.is_inference()):
        return out.copy_(result)


def draw_places(choose, images, batch, size, patch, window=None, above=None) -> Places:
    """Patches inside maps of ``size``, and the least results that hold what they reach through the window."""
    starts, corners, long = [], [], []
    for axis in (0, 1):
        begin = changes.draw_starts(choose, batch, size[axis] - patch[axis])
        starts.append(begin)
        if window is None:
            corners.append(begin)
            long.append(patch[axis])
            continue
        spans = [changes.reached(i, patch[axis], axis, window, above[axis]) or (0, 0) for i in begin]
        need = max(1, *(end - first for first, end in spans))
        long.append(min(above[axis], need + choose.choice([0, 0, 1])))
        corners.append([min(first, above[axis] - long[axis]) for first, _ in spans])
    image = torch.tensor([choose.randrange(images) for _ in range(batch)], dtype=torch.int64)
    return Places(image, *(torch.tensor(x, dtype=torch.int64).T.contiguous() for x in (starts, corners)), tuple(long))


def draw_patches(choose):
    """Images, batch, the size of the maps and of the patches."""
    size = choose.randint(1, 9), choose.randint(1, 9)
    patch = tuple(changes.draw_length(choose, n) for n in size)
    return choose.choice([1, 2, 3]), choose.choice([1, 2, 5]), size, patch


def draw_boxes(choose, batch, size):
    boxes = [[choose.randint(-1, n + 1) for n in (*size, *size)] for _ in range(batch)]
    return torch.tensor(boxes, dtype=torch.int64)


def make_paste(choose):
    n, b, size, patch = draw_patches(choose)
    images = maps(choose, (n, choose.choice(CHANNELS), *size), WIDE)
    fill = torch.randn(images.shape).to(images.dtype) if choose.random() < 0.5 else images.mean().expand(images.shape)
    places = draw_places(choose, n, b, size, patch)
    args = dict(images=images, fill=fill, boxes=draw_boxes(choose, b, size), places=places)
    return draw_out(choose, args, (b, images.size(1), *patch), images.dtype)


def draw_change(choose):
    """A convolution of changes: its weight, scale, step, places, clean outputs, and the size of its maps."""
    n, b, size, patch = draw_patches(choose)
    dtype = choose.choice(WIDE)
    groups, channels, outputs = 1, choose.choice(CHANNELS), choose.choice(CHANNELS)
    if choose.random() < 0.3:
        groups = choose.choice([2, 3])
        channels, outputs = channels * groups, outputs * groups
    elif choose.random() < 0.2:
        groups = outputs = channels
    window = draw_conv(choose)
    above = changes.window_size(size, window)
    if min(above) < 1:
        window = size, (1, 1), (0, 0), (1, 1)  # a full layer
        above = (1, 1)
    places = draw_places(choose, n, b, size, patch, window, above)
    weight = torch.randn(outputs, channels // groups, *window[0]).to(dtype)
    scale = torch.randn(outputs).to(dtype) if choose.random() < 0.4 else None
    clean = maps(choose, (n, outputs, *above), (dtype,)) if choose.random() < 0.6 else None
    limits = choose.choice([Limits(), Limits(), Limits(0.1), Limits(0.0, 0.7)])
    return weight, scale, ConvChange(window, groups, size, above, limits), places, clean, patch


def draw_precision(choose, weight):
    return choose.choice(["exact", "exact", "tf32", "bf16"]) if weight.dtype == torch.float32 else "exact"


def make_conv_delta(choose):
    weight, scale, step, places, clean, patch = draw_change(choose)
    delta = maps(choose, (len(places.image), weight.size(1) * step.groups, *patch), (weight.dtype,))
    filters = delta_filters(weight, scale, groups=step.groups, precision=draw_precision(choose, weight))
    args = dict(delta=delta, filters=filters, step=step, places=places, clean=clean)
    return draw_out(choose, args, (len(delta), len(weight), *places.size), delta.dtype)


def rounded(delta, weight, scale, precision):
    """What the products are of. On a CPU "tf32" is exact."""
    if precision != "bf16":
        return delta, weight, scale
    weight = weight if scale is None else weight * scale[:, None, None, None]
    return delta.bfloat16().to(delta.dtype), weight.bfloat16().to(weight.dtype), None


def swap_filters(choose, args):
    """Filters that were made for another weight, or of which a field is another's."""
    weight, groups = args["filters"].weight, args["filters"].groups
    k, c, *kernel = weight.shape
    other = choose.choice([(k + 1, c, *kernel), (k, c + 1, *kernel), (2 * k, c, *kernel), (k, c, 1, 1), (1, 1, 1, 1)])
    dtype = choose.choice([weight.dtype, torch.float64])
    weight = torch.randn(other).to(dtype)
    groups = choose.choice([groups, 1]) if other[0] % groups == 0 else 1
    made = delta_filters(weight, groups=groups, precision=draw_precision(choose, weight))
    if choose.random() < 0.6:
        field = choose.choice(["packed", "packed", "weight", "groups", "precision", "reader"])
        made = args["filters"]._replace(**{field: getattr(made, field)})
    return {**args, "filters": made}, [("filters",)]


def define_conv_delta(delta, filters, step, places, clean, out):
    delta, weight, scale = rounded(delta, filters.weight, filters.scale, filters.precision)
    return into(reference.conv_delta(delta, weight, step, places, clean, scale), out)


def make_delta_filters(choose):
    weight, scale, step, places, clean, patch = draw_change(choose)
    delta = maps(choose, (len(places.image), weight.size(1) * step.groups, *patch), (weight.dtype,))
    shape = choose.choice([None, tuple(weight.shape)])
    return dict(
        weight=weight.flatten(1) if shape and choose.random() < 0.5 else weight, scale=scale, shape=shape,
        groups=step.groups, precision=draw_precision(choose, weight), delta=delta, step=step, places=places, clean=clean,
    )  # fmt: skip


def run_delta_filters(weight, scale, shape, groups, precision, delta, step, places, clean):
    return conv_delta(delta, delta_filters(weight, scale, shape, groups, precision), step, places, clean)


def define_delta_filters(weight, scale, shape, groups, precision, delta, step, places, clean):
    weight = weight if shape is None else weight.reshape(shape)
    if weight.size(1) == 1 and groups == len(weight) > 1:
        precision = "exact"  # as where each channel has a filter of its own
    delta, weight, scale = rounded(delta, weight, scale, precision)
    return reference.conv_delta(delta, weight, step, places, clean, scale)


def make_conv_boxes(choose):
    weight, scale, step, places, clean, patch = draw_change(choose)
    n = 3 if clean is None else len(clean)
    change = maps(choose, (n, weight.size(1) * step.groups, *step.map), (weight.dtype,))
    filters = delta_filters(weight, scale, groups=step.groups, precision=draw_precision(choose, weight))
    args = dict(
        change=change, boxes=draw_boxes(choose, len(places.image), step.map), patch=patch, filters=filters, step=step,
        places=places, clean=clean,
    )  # fmt: skip
    return draw_out(choose, args, (len(places.image), len(weight), *places.size), change.dtype)


def define_conv_boxes(change, boxes, patch, filters, step, places, clean, out):
    change, weight, scale = rounded(change, filters.weight, filters.scale, filters.precision)
    return into(reference.conv_boxes(change, boxes, patch, weight, step, places, clean, scale), out)


def make_pool_delta(choose):
    while True:
        n, b, _, _ = draw_patches(choose)
        window, size = draw_pool(choose)
        window = tuple(map(tuple, window))
        before = maps(choose, (n, choose.choice(CHANNELS), *size), WIDE)
        try:
            after, _ = reference.max_pool2d_with_switches(before, *window)
            break
        except ValueError:  # too many taps
            continue
    patch = tuple(changes.draw_length(choose, n) for n in size)
    places = draw_places(choose, n, b, size, patch, window, tuple(after.shape[2:]))
    delta = maps(choose, (b, before.size(1), *patch), (before.dtype,))
    args = dict(delta=delta, before=before, after=after, window=window, places=places)
    return draw_out(choose, args, (b, before.size(1), *places.size), before.dtype)


def draw_pointwise(choose):
    """Patches of changes, clean maps, and places of a result that lies where the patch does."""
    n, b, size, patch = draw_patches(choose)
    clean = maps(choose, (n, choose.choice(CHANNELS), *size), WIDE)
    return maps(choose, (b, clean.size(1), *patch), (clean.dtype,)), clean, draw_places(choose, n, b, size, patch)


def make_lrn_delta(choose):
    delta, before, places = draw_pointwise(choose)
    alpha, beta, k = choose.choice([1e-4, 0.5]), choose.choice([0.75, 0.5]), choose.choice([1.0, 2.0])
    lrn = Lrn(choose.choice([1, 2, 3, 5, 9]), alpha, beta, k)
    after = torch.nn.functional.local_response_norm(before, *lrn)
    args = dict(delta=delta, before=before, after=after, lrn=lrn, places=places)
    return draw_out(choose, args, tuple(delta.shape), delta.dtype)


def make_relu_delta(choose):
    delta, before, places = draw_pointwise(choose)
    limits = choose.choice([Limits(), Limits(0.1), Limits(1.0), Limits(0.0, 0.7), Limits(0.25, 0.5)])
    args = dict(delta=delta, before=before, rectifier=limits, places=places)
    return draw_out(choose, args, tuple(delta.shape), delta.dtype)


def make_pointwise_delta(choose):
    change, clean, places = draw_pointwise(choose)
    function = choose.choice(list(FUNCTIONS)), choose.choice([1.0, 0.5, 2.0]), choose.choice([20.0, 1.0])
    if function[0] == "sqrt":
        clean = clean.abs() + 5
    args = dict(change=change, clean=clean, function=function, places=places)
    return draw_out(choose, args, tuple(change.shape), change.dtype)


def make_deconv_step(choose):
    channels = choose.choice(CHANNELS)
    groups = choose.choice([1, 1, 2, channels]) if channels % 2 == 0 else choose.choice([1, 1, channels])
    x, window, _, switches = draw_pooled(choose, channels=(channels,))
    pool = tuple(map(tuple, window)) if choose.random() < 0.6 else None
    size = tuple(x.shape[2:])
    own = size if pool is None else tuple(switches.shape[2:])
    conv = draw_conv(choose)
    below = tuple(max(1, (n - 1) * s + d * (k - 1) + 1 - 2 * p) for n, k, s, p, d in zip(size, *conv))
    b, whole = choose.choice([0, 1, 2, 5]), choose.random() < 0.5
    patch = tuple(changes.draw_length(choose, n) for n in own)
    origin = torch.tensor([[choose.randint(-2, n) for n in own] for _ in range(b)], dtype=torch.int64).reshape(b, 2)
    weight = torch.randn(channels, choose.choice([1, 2, 3, 8]), *conv[0]).to(x.dtype)
    frame = None
    if whole and choose.random() < 0.5:
        frame = torch.randint(-5, 5, (b, 2)), (choose.randint(1, 9), choose.randint(1, 9))
    step = StepParams(pool, conv, groups, size, below, whole, choose.random() < 0.6, choose.choice(["sum", "last"]))
    args = dict(
        signal=maps(choose, (b, channels, *patch), (x.dtype,)), weight=weight, step=step,
        image=torch.randint(0, len(x), (b,)), origin=origin, switches=switches if pool else None,
        passes=torch.rand(x.shape) < 0.5 if choose.random() < 0.4 else None,
        scale=torch.randn(channels).to(x.dtype) if choose.random() < 0.3 else None, frame=frame,
    )  # fmt: skip
    reached = step.reach(patch)[1] if frame is None else frame[1]
    return draw_out(choose, args, (b, weight.size(1) * groups, *reached), x.dtype)


def make_strongest(choose):
    x = maps(choose, (choose.choice([0, 1, 2]), choose.choice(CHANNELS), choose.randint(1, 9), choose.randint(1, 40)))
    units = [choose.randrange(x.size(1)) for _ in range(choose.choice([0, 1, 3, 9]))]
    return dict(maps=x, units=torch.tensor(units, dtype=torch.int64))


def make_conv_strongest(choose):
    conv = draw_conv(choose)
    shape = choose.choice([0, 1, 2]), choose.choice([1, 3, 4]), choose.randint(5, 12), choose.randint(5, 20)
    images = maps(choose, shape, (torch.float32,))
    size = changes.window_size(images.shape[2:], conv)
    if min(size) < 1:
        conv = (conv[0], (1, 1), tuple(k - 1 for k in conv[0]), (1, 1))
        size = changes.window_size(images.shape[2:], conv)
    k = choose.choice([1, 3, 8, 17])
    units = torch.tensor([choose.randrange(k) for _ in range(choose.choice([0, 1, 3, 9, 20]))], dtype=torch.int64)
    bias = torch.randn(k) if choose.random() < 0.6 else None
    return dict(
        images=images, weight=torch.randn(k, images.size(1), *conv[0]), bias=bias, units=units, conv=conv, size=size
    )


def writing(op: Callable, define: Callable, make: Callable, trusted: tuple[str, ...] = ()) -> Op:
    """An op that takes memory for its result, which its definition does not know of."""
    return Op(make, op, lambda out, **args: into(define(**args), out), trusted)


OPS: dict[str, Op] = {
    "zfcore::max_pool2d_with_switches": overload(
        "max_pool2d_with_switches", make_max_pool, reference.max_pool2d_with_switches
    ),
    "zfcore::unpool2d": overload("unpool2d", make_unpool, reference.unpool2d),
    "zfcore::unpool_relu2d": overload("unpool_relu2d", make_unpool, reference.unpool_relu2d),
    "zfcore::pool_gather2d": overload("pool_gather2d", make_gather, reference.pool_gather2d),
    "zfcore::unpool_relu_conv_transpose2d": overload("unpool_relu_conv_transpose2d", make_fused, define_fused),
    "max_pool2d_with_switches": public("max_pool2d_with_switches", make_max_pool),
    "unpool2d": public("unpool2d", make_unpool),
    "unpool_relu2d": public("unpool_relu2d", make_unpool),
    "pool_gather2d": public("pool_gather2d", make_gather),
    "unpool_relu_conv_transpose2d": public("unpool_relu_conv_transpose2d", make_step),
    "paste_boxes": writing(paste_boxes, reference.paste_boxes, make_paste),
    "conv_boxes": Op(make_conv_boxes, conv_boxes, define_conv_boxes, ("filters",), swap_filters),
    "conv_delta": Op(make_conv_delta, conv_delta, define_conv_delta, ("filters",), swap_filters),
    "delta_filters": Op(make_delta_filters, run_delta_filters, define_delta_filters),
    "pool_delta": writing(pool_delta, reference.pool_delta, make_pool_delta),
    "lrn_delta": writing(lrn_delta, reference.lrn_delta, make_lrn_delta),
    "relu_delta": writing(relu_delta, reference.relu_delta, make_relu_delta),
    "pointwise_delta": writing(pointwise_delta, reference.pointwise_delta, make_pointwise_delta),
    "deconv_step": writing(deconv_step, reference.deconv_step, make_deconv_step, ("switches",)),
    "strongest": Op(make_strongest, strongest, reference.strongest),
    "conv_strongest": Op(make_conv_strongest, conv_strongest, reference.conv_strongest),
}


# By the native function: the op that calls it, and how its arguments are drawn.
_BINDING = {
    "max_pool2d_with_switches_cpu": (torch.ops.zfcore.max_pool2d_with_switches, make_max_pool),
    "unpool_relu2d_cpu": (torch.ops.zfcore.unpool2d, make_unpool),
    "pool_gather2d_cpu": (torch.ops.zfcore.pool_gather2d, make_gather),
    "unpool_relu_conv_transpose2d_cpu": (torch.ops.zfcore.unpool_relu_conv_transpose2d, make_fused),
    "paste_boxes_cpu": (paste_boxes, make_paste),
    "conv_delta_cpu": (conv_delta, make_conv_delta),
    "delta_filters_bytes_cpu": (run_delta_filters, make_delta_filters),
    "pack_delta_filters_cpu": (run_delta_filters, make_delta_filters),
    "pool_delta_cpu": (pool_delta, make_pool_delta),
    "lrn_delta_cpu": (lrn_delta, make_lrn_delta),
    "relu_delta_cpu": (relu_delta, make_relu_delta),
    "pointwise_delta_cpu": (pointwise_delta, make_pointwise_delta),
    "packed_filters_bytes_cpu": (deconv_step, make_deconv_step),
    "pack_filters_cpu": (deconv_step, make_deconv_step),
    "deconv_step_cpu": (deconv_step, make_deconv_step),
    "strongest_cpu": (strongest, make_strongest),
    "conv_strongest_cpu": (conv_strongest, make_conv_strongest),
}


def _binding(name: str, op: Callable, make: Callable) -> Op:
    return Op(lambda choose: {**make(choose), "spoiling": choose.getrandbits(60)}, attack_binding.run(op, name), None)


OPS |= {f"_C.{name}": _binding(name, op, make) for name, (op, make) in _BINDING.items()}


def case(name: str, seed: int) -> tuple[dict, list[tuple]]:
    """The arguments of one call, and which of them are hostile: the same for the same seed."""
    choose = random.Random(f"{name} {seed}")
    torch.manual_seed(choose.getrandbits(60))
    args = OPS[name].make(choose)
    if seed % 16 == 0 or OPS[name].define is None:
        return args, []  # good ones: a suite that refuses everything proves nothing
    if OPS[name].swap and choose.random() < 0.1:
        return OPS[name].swap(choose, args)
    tree, changed = attack_hostile.spoil(choose, args)
    return attack_hostile.with_values(tree) if name.startswith("zfcore::") else tree, changed
