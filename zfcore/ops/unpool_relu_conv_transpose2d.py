"""One step of the deconvnet, fused: unpool, rectify, transposed filter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from zfcore import reference
from zfcore.errors import DtypeError
from zfcore.ops import _boundary
from zfcore.ops._checks import batched
from zfcore.ops._library import is_plain, keep, library, native, register
from zfcore.ops.deconv_step import deconv_step
from zfcore.ops.pool_gather2d import pool_gather2d_op
from zfcore.ops.unpool_relu2d import unpool_relu2d_op
from zfcore.reference._geometry import (
    check_conv_transposed_size,
    check_map,
    check_result,
    check_switches,
    check_tensor,
    check_weight,
    conv_transposed_size,
    output_padding_of,
    shape_of,
    spec,
)
from zfcore.reference._params import (
    ConvParams,
    PoolParams,
    StepParams,
    as_conv,
    as_pool,
    conv_params,
    overlap_mode,
    pool_params,
    show,
    size_pair,
    two,
)

SCHEMA = (
    "unpool_relu_conv_transpose2d(Tensor y, Tensor switches, Tensor weight, int[2] kernel_size, "
    "int[2] pool_stride, int[2] pool_padding, int[2] pool_dilation, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, SymInt[2] unpooled_size, SymInt[2] output_size, str overlap) -> Tensor"
)
POOL, CONV = slice(0, 4), slice(4, 8)  # of the arguments after the tensors
UNPOOLED, SIZE, OVERLAP = 8, 9, 10


def _shape(y, weight, groups, size):
    return (y.size(0), weight.size(1) * groups, *size)


def _fake(y, switches, weight, *args):
    check_map("y", y)
    check_switches(y, switches)
    pool, conv = pool_params(*args[POOL]), conv_params(*args[CONV])
    check_weight(y, weight, conv.groups)
    overlap_mode(args[OVERLAP])
    unpooled, size = two("unpooled_size", args[UNPOOLED]), two("output_size", args[SIZE])
    check_conv_transposed_size(y.shape[2:], pool, conv, weight.shape[2:], unpooled, size)
    return _boundary.empty(y, _shape(y, weight, conv.groups, args[SIZE]), y.dtype)


def _prepare(y, switches, weight, *args):
    pool = PoolParams(*map(tuple, args[POOL]))
    *window, groups = args[CONV]
    conv = ConvParams(*map(tuple, window), groups)
    shape, pool_window, conv_window = _boundary.step_plan(
        spec(y),
        spec(switches),
        spec(weight),
        pool,
        conv,
        tuple(args[UNPOOLED]),
        tuple(args[SIZE]),
        args[OVERLAP],
    )
    return _boundary.empty(y, shape, y.dtype), pool_window, conv_window


def _reference(y, switches, weight, *args):
    z, _, _ = _prepare(y, switches, weight, *args)
    conv = ConvParams(*args[CONV])
    # Both sizes are given, and the output padding is what lies between them.
    extra = output_padding_of(args[UNPOOLED], args[SIZE], conv, weight.shape[2:])
    return z.copy_(
        reference.unpool_relu_conv_transpose2d(
            y,
            switches,
            weight,
            pool=PoolParams(*args[POOL]),
            conv=conv._replace(output_padding=extra),
            output_size=args[SIZE],
            overlap=args[OVERLAP],
        )
    )


def _cpu(y, switches, weight, *args):
    z, pool_window, conv_window = _prepare(y, switches, weight, *args)
    unpooled = tuple(args[UNPOOLED])
    _boundary.pointer(weight, "weight")
    weight = weight.contiguous()
    bad = native.unpool_relu_conv_transpose2d_cpu(
        _boundary.view(y),
        _boundary.view(switches),
        _boundary.view(weight),
        _boundary.view(z),
        unpooled,
        pool_window,
        conv_window,
        args[CONV][-1],
        args[OVERLAP] == "last",
        _boundary.threads(),
    )
    _boundary.raise_bad_switch(switches, bad, unpooled, pool_window)
    return z


def _gpu(y, switches, weight, *args):
    """As a step of the deconvnet over whole maps. There a switch that names no place is passed over."""
    z, _, _ = _prepare(y, switches, weight, *args)
    kernel, *window = (tuple(pair) for pair in args[POOL])
    *conv, groups = args[CONV]
    step = StepParams(
        pool=(kernel, *window),
        conv=(tuple(weight.shape[2:]), *map(tuple, conv)),
        groups=groups,
        map=tuple(args[UNPOOLED]),
        below=tuple(args[SIZE]),
        whole=True,
        rectify=True,
        overlap=args[OVERLAP],
    )
    each = torch.arange(len(y), device=y.device)
    return deconv_step(y, weight, step, each, each.new_zeros((len(y), 2)), switches, out=z)


def _setup_context(ctx, inputs, output):
    y, switches, weight, *ctx.args = inputs
    keep(ctx, y, switches, weight)


def _backward(ctx, grad_z):
    if grad_z is None:
        return (None,) * 14
    y, switches, weight = ctx.saved_tensors
    pool, overlap, unpooled = ctx.args[POOL], ctx.args[OVERLAP], ctx.args[UNPOOLED]
    stride, padding, dilation, groups = ctx.args[CONV]
    grad_y = grad_weight = None
    u = unpool_relu2d_op(y, switches, *pool, unpooled, overlap)  # [N, K, Hu, Wu]
    if ctx.needs_input_grad[0]:
        grad_u = torch.ops.aten.convolution.default(
            grad_z, weight, None, stride, padding, dilation, False, [0, 0], groups
        )
        # An output padding of a stride or more makes the convolution see more windows than were unpooled.
        if tuple(grad_u.shape[2:]) != tuple(unpooled):
            grad_u = grad_u[:, :, : unpooled[0], : unpooled[1]]
        grad_u = torch.ops.aten.threshold_backward.default(grad_u, u, 0)
        grad_y = pool_gather2d_op(grad_u, switches, *pool, overlap)
    if ctx.needs_input_grad[2]:
        conv = ConvParams(stride, padding, dilation, groups)
        extra = output_padding_of(unpooled, ctx.args[SIZE], conv, weight.shape[2:])
        _, grad_weight, _ = torch.ops.aten.convolution_backward.default(
            grad_z, u, weight, None, stride, padding, dilation, True, extra, groups, [False, True, False]
        )
    return grad_y, None, grad_weight, *(None,) * 11


def _jvp(ctx, y_tangent, _, weight_tangent, *__):
    y, switches, weight = ctx.saved_tensors
    pool, overlap, unpooled = ctx.args[POOL], ctx.args[OVERLAP], ctx.args[UNPOOLED]
    conv = ConvParams(*ctx.args[CONV])
    extra = output_padding_of(unpooled, ctx.args[SIZE], conv, weight.shape[2:])
    u = unpool_relu2d_op(y, switches, *pool, unpooled, overlap)
    total = None
    if y_tangent is not None:
        u_tangent = torch.ops.zfcore.unpool2d.default(y_tangent, switches, *pool, unpooled, overlap)
        u_tangent = torch.ops.aten.threshold_backward.default(u_tangent, u, 0)
        total = _filtered(u_tangent, weight, conv, extra)
    if weight_tangent is not None:
        by_weight = _filtered(u, weight_tangent, conv, extra)
        total = by_weight if total is None else total + by_weight
    return total


def _filtered(u, weight, conv, extra):
    """The transposed convolution, which autograd differentiates."""
    return F.conv_transpose2d(u, weight, None, conv.stride, conv.padding, extra, conv.groups, conv.dilation)


unpool_relu_conv_transpose2d_op = register(
    SCHEMA,
    tensors=3,
    kernels={"reference": _reference, "cpu": _cpu, "cuda": _gpu, "triton": _gpu},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
)


def _register_autocast(device_type: str, key: str) -> None:
    def autocast(y, switches, weight, *args):
        dtype = torch.get_autocast_dtype(device_type)
        y, weight = (t if t.dtype is torch.float64 else t.to(dtype) for t in (y, weight))
        with torch.autocast(device_type, enabled=False):
            return unpool_relu_conv_transpose2d_op(y, switches, weight, *args)

    library.impl("unpool_relu_conv_transpose2d", autocast, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


def unpool_relu_conv_transpose2d(
    y, switches, weight, *, pool, conv=None, output_size=None, overlap="sum", strict_nan=False
):
    r"""One layer down the deconvnet: unpool, rectify, and filter with the transposed convolution.

    .. math::
        u = \mathrm{relu}(\mathrm{unpool}(y, \mathrm{switches})), \qquad
        z_{n,c,Y,X} = \sum_{k,i,j:\ Y = a s_h - p_h + i d_h,\ X = b s_w - p_w + j d_w}
            u_{n,k,a,b}\, w_{k,c,i,j}

    The unpooled map u is never in memory but on the reference. Products with an exact zero of u are left
    out, so that 0 x inf and 0 x NaN of the weight give 0; ``strict_nan=True`` runs torch's dense transposed
    convolution, which gives NaN there.

    Args:
        y: [N, K, Oh, Ow] or [K, Oh, Ow], float32, float64, bfloat16 or float16, any strides.
        switches: y's shape, uint8, from ``max_pool2d_with_switches`` with the same window.
        weight: [K, C / groups, kh, kw], y's dtype: the weight of the convolution that is run backwards.
        pool: the pooling window: a ``PoolParams``, a tuple or dict of its fields, a kernel size, or an
            ``nn.MaxPool2d``. A tuple is (kernel_size, stride, padding, dilation).
        conv: the convolution: a ``ConvParams``, a tuple or dict of its fields, an ``nn.Conv2d``, or None for
            stride 1 and no padding.
        output_size: (H, W) of the result, pixels. The unpooled map is then (H + 2 * padding - dilation *
            (kh - 1) - 1) // stride + 1 high and must pool to (Oh, Ow). None for the smallest unpooled map.
        overlap: "sum", or "last" to keep the last window in raster order that names a place.
        strict_nan: multiply the zeros too.

    Returns:
        z: [N, C, H, W] or [C, H, W], y's dtype, channels_last where y is. Half types accumulate in float32
        and are rounded once. Under autocast y and weight are cast once to its dtype, unless float64.

    Raises:
        ArgumentError: a window argument, groups or overlap is out of range.
        ShapeError: the shapes of y, switches, weight and output_size do not belong together.
        DtypeError: a tensor's dtype or an argument's type is wrong.
        DeviceError: the tensors are on different devices.
        SwitchError: a switch names no tap, or a place outside the unpooled map (on a GPU it is passed over).

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (unpooling, rectification, filtering).
    """
    if has_torch_function((y, switches, weight)):
        return handle_torch_function(
            unpool_relu_conv_transpose2d,
            (y, switches, weight),
            y,
            switches,
            weight,
            pool=as_pool(pool),
            conv=as_conv(conv),
            output_size=output_size,
            overlap=overlap,
            strict_nan=strict_nan,
        )
    check_tensor("y", y)
    check_tensor("switches", switches)
    check_tensor("weight", weight)
    if y.dim() == 3 and switches.dim() == 3:
        z = unpool_relu_conv_transpose2d(
            batched("y", y),
            batched("switches", switches),
            weight,
            pool=pool,
            conv=conv,
            output_size=output_size,
            overlap=overlap,
            strict_nan=strict_nan,
        )
        return z.squeeze(0)
    pool, conv = as_pool(pool), as_conv(conv)
    overlap_mode(overlap)
    if type(strict_nan) is not bool:
        raise DtypeError(f"strict_nan={show(strict_nan)}: expected True or False")
    size = None if output_size is None else size_pair(output_size)
    if strict_nan or y.dim() != 4 or weight.dim() != 4:  # else the op checks them
        check_map("y", y)
        check_switches(y, switches)
        check_weight(y, weight, conv.groups)
    kernel = shape_of("weight", weight)[2:]
    unpooled, size = conv_transposed_size(shape_of("y", y)[2:], pool, conv, kernel, size)
    if not strict_nan:
        return unpool_relu_conv_transpose2d_op(
            y, switches, weight, *pool[:4], *conv[:4], unpooled, size, overlap
        )
    check_conv_transposed_size(y.shape[2:], pool, conv, kernel, unpooled, size)
    check_result(y, *_shape(y, weight, conv.groups, size))
    if is_plain(weight):
        _boundary.pointer(weight, "weight")  # that it has memory
    u = unpool_relu2d_op(y, switches, *pool[:4], unpooled, overlap)
    extra = output_padding_of(unpooled, size, conv, kernel)
    return F.conv_transpose2d(u, weight, None, conv.stride, conv.padding, extra, conv.groups, conv.dilation)
