"""What maps of a function of each value change by where their input changes inside a patch: pointwise_delta on a GPU.

    out_b = f(x + d_b) - f(x) with the clean input x and f a function by name

Bound by memory: the change in, the result out, and the clean inputs, which the patches of a picture share. The functions
are the CPU kernel's, made of plain arithmetic; both values go through the same instructions, and where the compiler would
fuse a last product with the difference, which rounds differently, a change of nothing is asked for by itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._places import PLAIN, check, launches, of_program, strides


@triton.jit
def _power(x):
    """e^x = 2^n (1 + rest): rest and n."""
    n = tl.floor(x * 1.44269504 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    q = 0.5 + r * (0.166665182 + r * (0.041666206 + r * (0.00836891774 + r * 0.00139505405)))
    return r * r * q + r, n.to(tl.int32)


@triton.jit
def _two_to(n):
    """Zero of -127, infinity of 128."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _bounded(x, low, high):
    """NaN becomes a number here: who calls this puts it back."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _exp(x):
    """e^x, zero below 2^-126, infinity above 2^127."""
    rest, n = _power(_bounded(x, -88.0, 88.0))
    scale = _two_to(n)
    e = rest * scale + scale
    return tl.where(x > 88.0, float("inf"), tl.where(x == x, e, x))


@triton.jit
def _full_exp(x):
    """e^x, with all that float has."""
    rest, n = _power(_bounded(x, -104.0, 89.0))
    e = (1.0 + rest) * _two_to(n >> 1) * _two_to(n - (n >> 1))
    return tl.where(x == x, e, x)


@triton.jit
def _exp_less_one(x):
    """e^x - 1 for x up to 88."""
    rest, n = _power(_bounded(x, -88.0, 88.0))
    scale = _two_to(n)
    return tl.where(x == x, rest * scale + (scale - 1.0), x)


@triton.jit
def _log_one_plus(t):
    """For t in [0, 1]."""
    far = t > 0.414213562
    f = tl.where(far, (t - 1.0) * 0.5, t)
    p = 0.118729658 + f * (-0.117898352 + f * 0.0691542476)
    p = 0.200022265 + f * (-0.16669251 + f * (0.142186582 + f * (-0.123843431 + f * p)))
    p = 0.333333105 + f * (-0.249999866 + f * p)
    log = f + f * f * (f * p - 0.5)
    return tl.where(far, log + 0.693147181, log)


@triton.jit
def _tanh(x):
    t, z = tl.abs(x), x * x
    p = 0.0216695536 + z * (-0.00827567745 + z * (0.00259281578 + z * -0.000459078146))
    near = x + x * z * (-0.333333224 + z * (0.133329988 + z * (-0.0539309457 + z * p)))
    far = 1.0 - 2.0 / (1.0 + _exp(2.0 * t))
    return tl.where(t > 0.9, tl.where(x < 0, -far, far), near)


@triton.jit
def _normal(x):
    """The share of normal numbers below x."""
    t = tl.abs(x)
    p = -0.000188588834 + t * (-9.11301177e-05 + t * (1.94475469e-05 + t * -1.31840784e-06))
    p = -0.797889352 + t * (-0.318266958 + t * (-0.0364786796 + t * (0.00502214348 + t * p)))
    tail = 0.5 * _exp(t * p)
    return tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def of_value(x, a, b, NAME: tl.constexpr):
    if NAME == "sigmoid":
        y = 1.0 / (1.0 + _exp(-x))
    elif NAME == "tanh":
        y = _tanh(x)
    elif NAME == "silu":
        y = x / (1.0 + _exp(-x))
    elif NAME == "hardswish":
        y = x * _relu6(x + 3.0) / 6.0
    elif NAME == "hardsigmoid":
        y = _relu6(x + 3.0) / 6.0
    elif NAME == "gelu":
        y = x * _normal(x)
    elif NAME == "gelu_tanh":
        y = x / (1.0 + _exp(x * (-1.5957691216057308 - 0.071354816272600251 * (x * x))))
    elif NAME == "mish":
        e = _exp(tl.where(x > 20.0, 20.0, x))
        n = e * (e + 2.0)
        y = x * (n / (n + 2.0))
    elif NAME == "softplus":
        v = x * a
        soft = (tl.where(v < 0, 0.0, v) + _log_one_plus(_exp(-tl.abs(v)))) / a
        y = tl.where(v > b, x, soft)
    elif NAME == "elu":
        y = tl.where(x > 0, x, a * _exp_less_one(tl.where(x > 0, 0.0, x)))
    elif NAME == "exp":
        y = _full_exp(x)
    elif NAME == "square":
        y = x * x
    elif NAME == "abs":
        y = tl.abs(x)
    else:
        tl.static_assert(NAME == "sqrt")
        y = tl.sqrt_rn(x)
    return y


@triton.jit
def _relu6(x):
    low = tl.where(x < 0, 0.0, x)
    return tl.where(low > 6.0, 6.0, low)


@triton.jit(do_not_specialize=PLAIN)
def pointwise_delta_kernel(
    delta,  # [B, size_y, size_x, C]
    before,  # [N, height, width, C]
    image,  # [B] int64
    origin,  # [B, 2] int64
    out,  # [B, size_y, size_x, C]
    pixels,  # B * size_y * size_x
    size_y,
    size_x,
    channels,
    images,  # N
    height,
    width,
    delta_b,  # strides
    delta_y,
    delta_x,
    before_n,
    before_y,
    before_x,
    out_b,
    out_y,
    out_x,
    a,
    b,
    NAME: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c, is_pixel, patch, py, px, which, y, x, known = of_program(
        pixels, image, origin, size_y, size_x, images, height, width, BLOCK_P, BLOCK_C
    )
    own = delta + (patch * delta_b + py.to(tl.int64) * delta_y + px.to(tl.int64) * delta_x)
    clean = before + (which * before_n + y * before_y + x * before_x)
    to = out + (patch * out_b + py.to(tl.int64) * out_y + px.to(tl.int64) * out_x)
    written = is_pixel[:, None] & (c < channels)
    # Where a place is not in the clean maps, nothing is read and the result is NaN.
    z = tl.load(clean[:, None] + c, mask=known[:, None] & (c < channels), other=float("nan")).to(tl.float32)
    d = tl.load(own[:, None] + c, mask=written, other=0.0).to(tl.float32)
    f = of_value(z, a, b, NAME)
    change = of_value(z + d, a, b, NAME) - f
    change = tl.where((d == 0) & (tl.abs(f) < float("inf")), 0.0, change)
    tl.store(to[:, None] + c, change.to(out.dtype.element_ty), mask=written)


def pointwise_delta(
    delta: torch.Tensor,
    before: torch.Tensor,
    image: torch.Tensor,
    origin: torch.Tensor,
    out: torch.Tensor,
    name: str,
    a: float = 0.0,
    b: float = 0.0,
) -> torch.Tensor:
    """Launches the kernel, and returns ``out``.

    Args:
        delta, out: [B, C, h, w] float32, bfloat16 or float16, channels last; may be one.
        before: [N, C, H, W], channels last.
        image, origin: [B] and [B, 2] int64, contiguous. What lies outside of the clean maps is NaN.
        name, a, b: of the function, see ``zfcore.reference.pointwise_delta``.
    """
    check(delta=delta, before=before, out=out)
    channels, size_y, size_x = delta.shape[1:]
    for some, pixels, grid, options in launches(delta):
        pointwise_delta_kernel[grid](
            delta[some],
            before,
            image[some],
            origin[some],
            out[some],
            pixels,
            size_y,
            size_x,
            channels,
            len(before),
            *before.shape[2:],
            *strides(delta),
            *strides(before),
            *strides(out),
            a,
            b,
            NAME=name,
            **options,
        )
    return out
