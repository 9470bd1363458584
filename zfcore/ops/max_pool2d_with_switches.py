"""Max-pooling that records, for every output, which tap of its window held the maximum."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function, has_torch_function

from zfcore import reference
from zfcore.ops import _boundary
from zfcore.ops._checks import batched
from zfcore.ops._library import keep, native, register, triton_kernel
from zfcore.ops.unpool2d import unpool2d_op
from zfcore.reference._geometry import check_map, check_tensor, pooled_size, spec
from zfcore.reference._params import PoolParams, pool_params

SCHEMA = (
    "max_pool2d_with_switches(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "bool ceil_mode) -> (Tensor y, Tensor switches)"
)


def _empty(x, shape):
    return _boundary.empty(x, shape, x.dtype), _boundary.empty(x, shape, torch.uint8)


def _prepare(x, kernel_size, stride, padding, dilation, ceil_mode):
    pool = PoolParams(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), ceil_mode)
    shape, window = _boundary.pool_plan(spec(x), pool)
    return _empty(x, shape), window


def _fake(x, kernel_size, stride, padding, dilation, ceil_mode):
    check_map("x", x)
    pooled = pooled_size(x.shape[2:], pool_params(kernel_size, stride, padding, dilation, ceil_mode))
    return _empty(x, (*x.shape[:2], *pooled))


def _reference(x, *args):
    results, _ = _prepare(x, *args)
    return tuple(map(torch.Tensor.copy_, results, reference.max_pool2d_with_switches(x, *args)))


def _cpu(x, *args):
    (y, switches), window = _prepare(x, *args)
    native.max_pool2d_with_switches_cpu(
        _boundary.view(x), _boundary.view(y), _boundary.view(switches), window, _boundary.threads()
    )
    return y, switches


def _cuda(x, *args):
    (y, switches), window = _prepare(x, *args)
    native.max_pool2d_with_switches_cuda(
        _boundary.view(x),
        _boundary.view(y),
        _boundary.view(switches),
        window,
        x.device.index,
        _boundary.stream(x.device),
    )
    return y, switches


def _triton(x, *args):
    (y, switches), window = _prepare(x, *args)
    triton_kernel("max_pool2d_with_switches")(x.detach(), y, switches, window)
    return y, switches


def _setup_context(ctx, inputs, output):
    x, *ctx.window, _ = inputs
    ctx.size = x.shape[2:]
    _, switches = output
    ctx.mark_non_differentiable(switches)
    keep(ctx, switches)


def _backward(ctx, grad_y, _):
    if grad_y is None:
        return (None,) * 6
    (switches,) = ctx.saved_tensors
    return unpool2d_op(grad_y, switches, *ctx.window, ctx.size, "sum"), None, None, None, None, None


def _jvp(ctx, x_tangent, *_):
    if x_tangent is None:
        return None, None
    (switches,) = ctx.saved_tensors
    return torch.ops.zfcore.pool_gather2d.default(x_tangent, switches, *ctx.window, "sum"), None


max_pool2d_with_switches_op = register(
    SCHEMA,
    tensors=1,
    kernels={"reference": _reference, "cpu": _cpu, "cuda": _cuda, "triton": _triton},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
)


def max_pool2d_with_switches(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    r"""Max-pool each feature map and record where every maximum came from.

    .. math::
        y_{n,c,o,q} = \max_{i,j} x_{n,c,\; o s_h - p_h + i d_h,\; q s_w - p_w + j d_w}, \qquad
        \mathrm{switches}_{n,c,o,q} = i^* k_w + j^*

    over the taps (i, j) inside the map. The tap number counts from the corner of the unclipped window. Ties
    give the first tap in raster order; NaN wins over every number, the last NaN over the others; a window of
    nothing but -inf gives its first tap in the map.

    Args:
        x: [N, C, H, W] or [C, H, W], float32, float64, bfloat16 or float16, any strides.
        kernel_size: int or pair (rows, columns), pixels; at most 255 taps, since a switch is one byte.
        stride: int or pair, pixels; None for the kernel's size.
        padding: int or pair, pixels at most half the kernel; padded pixels never win.
        dilation: int or pair, pixels between taps.
        ceil_mode: round the output size up, dropping windows that would start in the far padding.

    Returns:
        y: [N, C, Oh, Ow], x's dtype. switches: [N, C, Oh, Ow] uint8, not differentiable. Both are [C, Oh, Ow]
        for a three-dimensional x, and channels_last where x is. Under autocast x keeps its dtype.

    Raises:
        ArgumentError: a pooling argument is out of range.
        ShapeError: x is not three- or four-dimensional, is empty but for N, or is smaller than the window.
        DtypeError: x is not a dense floating-point tensor, or an argument's type is wrong.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (switches).
    """
    if has_torch_function((x,)):
        return handle_torch_function(
            max_pool2d_with_switches, (x,), x, kernel_size, stride, padding, dilation, ceil_mode
        )
    check_tensor("x", x)
    kernel_size, stride, padding, dilation, ceil_mode = pool_params(
        kernel_size, stride, padding, dilation, ceil_mode
    )
    if x.dim() == 3:
        y, switches = max_pool2d_with_switches_op(
            batched("x", x), kernel_size, stride, padding, dilation, ceil_mode
        )
        return y.squeeze(0), switches.squeeze(0)
    return max_pool2d_with_switches_op(x, kernel_size, stride, padding, dilation, ceil_mode)
