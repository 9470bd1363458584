"""What rectified maps change by where their input changes inside a patch: relu_delta on a GPU.

    out_b = f(x + d_b) - f(x) with the clean input x;  f(v) = slope * v where v < 0, upper where v > upper, else v

Bound by memory: the change in, the result out, and the clean inputs, which the patches of a picture share.

Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._places import PLAIN, check, launches, of_program, strides


@triton.jit
def rectified(v, slope, upper, HAS_SLOPE: tl.constexpr):
    low = tl.where(v < 0, v * slope if HAS_SLOPE else 0.0, v)  # NaN is not below zero, and stays
    return tl.where(low > upper, upper, low)


@triton.jit(do_not_specialize=PLAIN)
def relu_delta_kernel(
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
    slope,
    upper,
    HAS_SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c, is_pixel, b, py, px, which, y, x, known = of_program(
        pixels, image, origin, size_y, size_x, images, height, width, BLOCK_P, BLOCK_C
    )
    own = delta + (b * delta_b + py.to(tl.int64) * delta_y + px.to(tl.int64) * delta_x)
    clean = before + (which * before_n + y * before_y + x * before_x)
    to = out + (b * out_b + py.to(tl.int64) * out_y + px.to(tl.int64) * out_x)
    written = is_pixel[:, None] & (c < channels)
    # Where a place is not in the clean maps, nothing is read and the result is NaN.
    z = tl.load(clean[:, None] + c, mask=known[:, None] & (c < channels), other=float("nan")).to(tl.float32)
    d = tl.load(own[:, None] + c, mask=written, other=0.0).to(tl.float32)
    change = rectified(z + d, slope, upper, HAS_SLOPE) - rectified(z, slope, upper, HAS_SLOPE)
    tl.store(to[:, None] + c, change.to(out.dtype.element_ty), mask=written)


def relu_delta(
    delta: torch.Tensor,
    before: torch.Tensor,
    image: torch.Tensor,
    origin: torch.Tensor,
    out: torch.Tensor,
    slope: float = 0.0,
    upper: float = float("inf"),
) -> torch.Tensor:
    """Launches the kernel, and returns ``out``.

    Args:
        delta, out: [B, C, h, w] float32, bfloat16 or float16, channels last; may be one.
        before: [N, C, H, W], channels last.
        image, origin: [B] and [B, 2] int64, contiguous. What lies outside of the clean maps is NaN.
        slope, upper: of the rectifier.
    """
    check(delta=delta, before=before, out=out)
    channels, size_y, size_x = delta.shape[1:]
    for some, pixels, grid, options in launches(delta):
        relu_delta_kernel[grid](
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
            slope,
            upper,
            HAS_SLOPE=slope != 0,
            **options,
        )
    return out
