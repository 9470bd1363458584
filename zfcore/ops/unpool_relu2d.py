"""Unpooling and rectification in one step."""

from __future__ import annotations

import torch

from zfcore.ops._library import keep, register
from zfcore.ops.unpool2d import ARGUMENTS, fake, kernels, unpool


def _setup_context(ctx, inputs, output):
    _, switches, *ctx.window, ctx.size, ctx.overlap = inputs
    keep(ctx, switches, output)


def _backward(ctx, grad_out):
    if grad_out is None:
        return (None,) * 8
    switches, out = ctx.saved_tensors
    grad_u = torch.ops.aten.threshold_backward.default(grad_out, out, 0)
    grad_y = torch.ops.zfcore.pool_gather2d.default(grad_u, switches, *ctx.window, ctx.overlap)
    return grad_y, None, None, None, None, None, None, None


def _jvp(ctx, y_tangent, *_):
    if y_tangent is None:
        return None
    switches, out = ctx.saved_tensors
    u_tangent = torch.ops.zfcore.unpool2d.default(y_tangent, switches, *ctx.window, ctx.size, ctx.overlap)
    return torch.ops.aten.threshold_backward.default(u_tangent, out, 0)


unpool_relu2d_op = register(
    "unpool_relu2d" + ARGUMENTS,
    tensors=2,
    kernels=kernels(relu=True),
    fake=fake,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
)


def unpool_relu2d(
    y, switches, kernel_size, stride=None, padding=0, dilation=1, output_size=None, overlap="sum"
):
    r"""Put every pooled value back where its maximum was, then rectify.

    .. math::
        \mathrm{out}_{n,c,Y,X} = \mathrm{relu}\Big(
            \sum_{o,q:\ \mathrm{switches}_{n,c,o,q}\ \mathrm{names}\ (Y,X)} y_{n,c,o,q} \Big)

    Values of overlapping windows add up before the ReLU, which keeps NaN and -0.

    Args:
        y: [N, C, Oh, Ow] or [C, Oh, Ow], float32, float64, bfloat16 or float16, any strides.
        switches: y's shape, uint8, from ``max_pool2d_with_switches`` with the same window.
        kernel_size, stride, padding, dilation: the pooling window, as there.
        output_size: (H, W) in pixels; it must pool to (Oh, Ow). None for the smallest such size.
        overlap: "sum", or "last" to keep the last window in raster order that names a place.

    Returns:
        [N, C, H, W] or [C, H, W], y's dtype, channels_last where y is. Half types are summed in float32 and
        rounded once. Under autocast y keeps its dtype.

    Raises:
        ArgumentError, ShapeError, DtypeError, SwitchError: as ``unpool2d``.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (unpooling, rectification).
    """
    return unpool(
        unpool_relu2d,
        unpool_relu2d_op,
        y,
        switches,
        kernel_size,
        stride,
        padding,
        dilation,
        output_size,
        overlap,
    )
