"""The transpose of unpooling: every window reads the place that its switch names."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function, has_torch_function

from zfcore import reference
from zfcore.ops import _boundary
from zfcore.ops._checks import batched
from zfcore.ops._library import keep, native, register
from zfcore.ops.unpool2d import unpool2d_op
from zfcore.reference._geometry import (
    check_gather_switches,
    check_map,
    check_tensor,
    check_unpooled_size,
    spec,
)
from zfcore.reference._params import PoolParams, overlap_mode, pool_params

SCHEMA = (
    "pool_gather2d(Tensor x, Tensor switches, int[2] kernel_size, int[2] stride, int[2] padding, "
    "int[2] dilation, str overlap) -> Tensor"
)


def _prepare(x, switches, kernel_size, stride, padding, dilation, overlap):
    pool = PoolParams(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))
    window = _boundary.gather_plan(spec(x), spec(switches), pool, overlap)
    return _boundary.empty(x, switches.shape, x.dtype), window


def _fake(x, switches, kernel_size, stride, padding, dilation, overlap):
    check_map("x", x)
    check_gather_switches(x, switches)
    overlap_mode(overlap)
    pool = pool_params(kernel_size, stride, padding, dilation)
    check_unpooled_size(switches.shape[2:], pool, x.shape[2:])
    return _boundary.empty(x, switches.shape, x.dtype)


def _reference(*args):
    out, _ = _prepare(*args)
    return out.copy_(reference.pool_gather2d(*args))


def _cpu(x, switches, *args):
    out, window = _prepare(x, switches, *args)
    bad = native.pool_gather2d_cpu(
        _boundary.view(x),
        _boundary.view(switches),
        _boundary.view(out),
        window,
        args[-1] == "last",
        _boundary.threads(),
    )
    _boundary.raise_bad_switch(switches, bad, x.shape[2:], window)
    return out


def _cuda(x, switches, *args):
    out, window = _prepare(x, switches, *args)
    no_flag = 0  # reading a flag back would stop the stream: a bad switch reads nothing
    native.pool_gather2d_cuda(
        _boundary.view(x),
        _boundary.view(switches),
        _boundary.view(out),
        window,
        args[-1] == "last",
        no_flag,
        x.device.index,
        _boundary.stream(x.device),
    )
    return out


def _setup_context(ctx, inputs, output):
    x, switches, *ctx.window, ctx.overlap = inputs
    ctx.size = x.shape[2:]
    keep(ctx, switches)


def _backward(ctx, grad_out):
    if grad_out is None:
        return (None,) * 7
    (switches,) = ctx.saved_tensors
    grad_x = unpool2d_op(grad_out, switches, *ctx.window, ctx.size, ctx.overlap)
    return grad_x, None, None, None, None, None, None


def _jvp(ctx, x_tangent, *_):
    if x_tangent is None:
        return None
    (switches,) = ctx.saved_tensors
    return torch.ops.zfcore.pool_gather2d.default(x_tangent, switches, *ctx.window, ctx.overlap)


pool_gather2d_op = register(
    SCHEMA,
    tensors=2,
    kernels={"reference": _reference, "cpu": _cpu, "cuda": _cuda},
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
)


def pool_gather2d(x, switches, kernel_size, stride=None, padding=0, dilation=1, overlap="sum"):
    r"""Read from each feature map the places that the switches name; the transpose of ``unpool2d``.

    .. math::
        \mathrm{out}_{n,c,o,q} = x_{n,c,\ \text{the place that switches}_{n,c,o,q}\ \text{names}}

    With ``overlap="last"`` only the last window in raster order that names a place reads it; others get 0.

    Args:
        x: [N, C, H, W] or [C, H, W], float32, float64, bfloat16 or float16, any strides.
        switches: [N, C, Oh, Ow] or [C, Oh, Ow], uint8, from ``max_pool2d_with_switches`` with the same
            window; (H, W) must pool to (Oh, Ow), with or without ceil_mode.
        kernel_size, stride, padding, dilation: the pooling window, as there.
        overlap: "sum" or "last", whose transpose this is.

    Returns:
        switches' shape, x's dtype, channels_last where x is. Under autocast x keeps its dtype.

    Raises:
        ArgumentError, ShapeError, DtypeError, SwitchError: as ``unpool2d``.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (switches).
    """
    if has_torch_function((x, switches)):
        return handle_torch_function(
            pool_gather2d, (x, switches), x, switches, kernel_size, stride, padding, dilation, overlap
        )
    check_tensor("x", x)
    check_tensor("switches", switches)
    pool = pool_params(kernel_size, stride, padding, dilation)
    overlap_mode(overlap)
    if x.dim() == 3 and switches.dim() == 3:
        return pool_gather2d_op(batched("x", x), batched("switches", switches), *pool[:4], overlap).squeeze(0)
    return pool_gather2d_op(x, switches, *pool[:4], overlap)
