"""Unpooling: every pooled value goes to the place that its switch recorded, zeros elsewhere."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function, has_torch_function

from zfcore import reference
from zfcore.ops import _boundary
from zfcore.ops._checks import batched
from zfcore.ops._library import keep, native, register
from zfcore.reference._geometry import (
    check_map,
    check_switches,
    check_tensor,
    check_unpooled_size,
    shape_of,
    spec,
    unpooled_size,
)
from zfcore.reference._params import PoolParams, overlap_mode, pool_params, size_pair, two

ARGUMENTS = (
    "(Tensor y, Tensor switches, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "SymInt[2] output_size, str overlap) -> Tensor"
)


def _prepare(y, switches, kernel_size, stride, padding, dilation, output_size, overlap):
    pool = PoolParams(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))
    size = tuple(output_size)
    shape, window = _boundary.unpool_plan(spec(y), spec(switches), pool, size, overlap)
    return _boundary.empty(y, shape, y.dtype), size, window


def fake(y, switches, kernel_size, stride, padding, dilation, output_size, overlap):
    """The result's shape and layout, for unpooling with and without the ReLU."""
    check_map("y", y)
    check_switches(y, switches)
    overlap_mode(overlap)
    pool = pool_params(kernel_size, stride, padding, dilation)
    check_unpooled_size(y.shape[2:], pool, two("output_size", output_size))
    return _boundary.empty(y, (y.size(0), y.size(1), *output_size), y.dtype)


def kernels(relu: bool) -> dict:
    """The kernels of unpooling by backend, with or without the ReLU."""
    define = reference.unpool_relu2d if relu else reference.unpool2d

    def on_reference(*args):
        out, _, _ = _prepare(*args)
        return out.copy_(define(*args))

    def on_cpu(y, switches, *args):
        out, size, window = _prepare(y, switches, *args)
        bad = native.unpool_relu2d_cpu(
            _boundary.view(y),
            _boundary.view(switches),
            _boundary.view(out),
            window,
            relu,
            args[-1] == "last",
            _boundary.threads(),
        )
        _boundary.raise_bad_switch(switches, bad, size, window)
        return out

    def on_cuda(y, switches, *args):
        out, _, window = _prepare(y, switches, *args)
        no_flag = 0  # reading a flag back would stop the stream: a bad switch adds nothing
        native.unpool_relu2d_cuda(
            _boundary.view(y),
            _boundary.view(switches),
            _boundary.view(out),
            window,
            relu,
            args[-1] == "last",
            no_flag,
            y.device.index,
            _boundary.stream(y.device),
        )
        return out

    return {"reference": on_reference, "cpu": on_cpu, "cuda": on_cuda}


def _setup_context(ctx, inputs, output):
    _, switches, *ctx.window, ctx.size, ctx.overlap = inputs
    keep(ctx, switches)


def _backward(ctx, grad_out):
    if grad_out is None:
        return (None,) * 8
    (switches,) = ctx.saved_tensors
    grad_y = torch.ops.zfcore.pool_gather2d.default(grad_out, switches, *ctx.window, ctx.overlap)
    return grad_y, None, None, None, None, None, None, None


def _jvp(ctx, y_tangent, *_):
    if y_tangent is None:
        return None
    (switches,) = ctx.saved_tensors
    return torch.ops.zfcore.unpool2d.default(y_tangent, switches, *ctx.window, ctx.size, ctx.overlap)


unpool2d_op = register(
    "unpool2d" + ARGUMENTS,
    tensors=2,
    kernels=kernels(relu=False),
    fake=fake,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
)


def unpool(public, op, y, switches, kernel_size, stride, padding, dilation, output_size, overlap):
    """Call ``op``, an unpooling op, with the arguments that ``public``, its function, was given."""
    if has_torch_function((y, switches)):
        window = kernel_size, stride, padding, dilation
        return handle_torch_function(public, (y, switches), y, switches, *window, output_size, overlap)
    check_tensor("y", y)
    check_tensor("switches", switches)
    pool = pool_params(kernel_size, stride, padding, dilation)
    overlap_mode(overlap)
    size = None if output_size is None else size_pair(output_size)
    shape_of("switches", switches)
    if y.dim() == 3 and switches.dim() == 3:
        size = unpooled_size(y.shape[1:], pool, size)
        return op(batched("y", y), batched("switches", switches), *pool[:4], size, overlap).squeeze(0)
    check_map("y", y)
    return op(y, switches, *pool[:4], unpooled_size(y.shape[2:], pool, size), overlap)


def unpool2d(y, switches, kernel_size, stride=None, padding=0, dilation=1, output_size=None, overlap="sum"):
    r"""Put every pooled value back where its maximum was; the transpose of max-pooling.

    .. math::
        \mathrm{out}_{n,c,Y,X} = \sum_{o,q:\ \mathrm{switches}_{n,c,o,q}\ \mathrm{names}\ (Y,X)} y_{n,c,o,q}

    Places that no switch names are 0. Windows that overlap can name one place several times:
    ``overlap="sum"`` adds their values, in raster order of the windows; ``overlap="last"`` keeps the last
    one, as ``torch.nn.functional.max_unpool2d`` does on one thread.

    Args:
        y: [N, C, Oh, Ow] or [C, Oh, Ow], float32, float64, bfloat16 or float16, any strides.
        switches: y's shape, uint8, from ``max_pool2d_with_switches`` with the same window.
        kernel_size, stride, padding, dilation: the pooling window, as there.
        output_size: (H, W) in pixels; it must pool to (Oh, Ow), with or without ceil_mode. None for the
            smallest such size, (Oh - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + 1.
        overlap: "sum" or "last".

    Returns:
        [N, C, H, W] or [C, H, W], y's dtype, channels_last where y is. NaN, infinities and -0 pass through;
        half types are summed in float32 and rounded once. Under autocast y keeps its dtype.

    Raises:
        ArgumentError: a window argument or overlap is out of range.
        ShapeError: the shapes of y, switches and output_size do not belong together.
        DtypeError: y is not a dense floating-point tensor, switches not uint8, or an argument's type wrong.
        SwitchError: a switch names no tap, or a place outside the map (on the CPU; the CUDA kernels, which
            never wait for the device, leave such a switch out).

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (unpooling).
    """
    return unpool(
        unpool2d, unpool2d_op, y, switches, kernel_size, stride, padding, dilation, output_size, overlap
    )
