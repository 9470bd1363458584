"""conv_delta on a GPU where each channel has a filter of its own.

    g_b   = each channel's change d_b, in its patch and zero elsewhere, under the channel's own filter
    out_b = f(z + g_b) - f(z) with the clean output z of the patch's image, or g_b where nothing is rectified

No matrix product: a tile of those would have one filter, and its other columns idle. Bound by memory as the kernels of a
pixel by channels are: the change in, the result out, the clean outputs, which the patches of a picture share, and the
filters; what windows share comes from the first-level cache.

Every sum is taken over the taps in order. Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._places import LARGEST, PLAIN, check, launches, of_program, strides
from .relu_delta import rectified


@triton.jit(do_not_specialize=PLAIN)
def conv_delta_depthwise_kernel(
    delta,  # [B, patch_y, patch_x, C]
    filters,  # [kernel_y, kernel_x, C]
    clean,  # [N, above_y, above_x, C]
    image,  # [B] int64
    origin,  # [B, 2] int64
    out_origin,  # [B, 2] int64
    out,  # [B, size_y, size_x, C]
    pixels,  # B * size_y * size_x
    patch_y,
    patch_x,
    size_y,
    size_x,
    channels,
    images,  # N
    above_y,
    above_x,
    kernel_y,
    kernel_x,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    delta_b,  # strides
    delta_y,
    delta_x,
    clean_n,
    clean_y,
    clean_x,
    out_b,
    out_y,
    out_x,
    slope,
    upper,
    RECTIFIED: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c, is_pixel, b, py, px, which, oy, ox, known = of_program(
        pixels, image, out_origin, size_y, size_x, images, above_y, above_x, BLOCK_P, BLOCK_C
    )
    is_channel = c < channels
    # The window's corner in the patch's own rows and columns.
    row = oy * stride_y - padding_y - tl.load(origin + 2 * b)
    column = ox * stride_x - padding_x - tl.load(origin + 2 * b + 1)
    own = delta + (b * delta_b + row * delta_y + column * delta_x)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for tap in range(0, kernel_y * kernel_x):
        dy = (tap // kernel_x).to(tl.int64) * dilation_y
        dx = (tap % kernel_x).to(tl.int64) * dilation_x
        inside = is_pixel & (row + dy >= 0) & (row + dy < patch_y) & (column + dx >= 0) & (column + dx < patch_x)
        at = own + (dy * delta_y + dx * delta_x)
        v = tl.load(at[:, None] + c, mask=inside[:, None] & is_channel, other=0.0).to(tl.float32)
        total += v * tl.load(filters + (tap * channels + c), mask=is_channel, other=0.0).to(tl.float32)
    if RECTIFIED:
        # Where a place is not in the clean maps, nothing is read and the result is NaN.
        at = clean + (which * clean_n + oy * clean_y + ox * clean_x)
        z = tl.load(at[:, None] + c, mask=known[:, None] & is_channel, other=float("nan")).to(tl.float32)
        total = rectified(z + total, slope, upper, HAS_SLOPE) - rectified(z, slope, upper, HAS_SLOPE)
    to = out + (b * out_b + py.to(tl.int64) * out_y + px.to(tl.int64) * out_x)
    tl.store(to[:, None] + c, total.to(out.dtype.element_ty), mask=is_pixel[:, None] & is_channel)


def conv_delta_depthwise(
    delta: torch.Tensor,
    filters: torch.Tensor,
    window: tuple,
    image: torch.Tensor,
    origin: torch.Tensor,
    out_origin: torch.Tensor,
    out: torch.Tensor,
    clean: torch.Tensor | None = None,
    slope: float = 0.0,
    upper: float = float("inf"),
) -> torch.Tensor:
    """Launches the kernel, and returns ``out``.

    Args:
        delta: [B, C, h, w] float32, bfloat16 or float16, channels last.
        filters: [kh, kw, 1, C], dense, finite; multiplied by a scale already, if there is one.
        out: [B, C, *size], channels last; must hold all outputs that a patch reaches.
        The others as of ``conv_delta``.
    """
    check(delta=delta, out=out, **({} if clean is None else {"clean": clean}))
    batch, channels, size_y, size_x = out.shape
    kernel = window[0]
    if delta.shape[:2] != (batch, channels):
        raise ValueError(f"delta of {tuple(delta.shape)}, out of {tuple(out.shape)}: expected as many channels")
    if tuple(filters.shape) != (*kernel, 1, channels) or not filters.is_contiguous():
        raise ValueError(f"filters of {tuple(filters.shape)}: expected {(*kernel, 1, channels)}, dense")
    if max(map(max, window)) > LARGEST or filters.numel() > LARGEST - 1024:
        raise ValueError(f"out of {tuple(out.shape)}, a window of {window}: too large for one launch")
    z = out if clean is None else clean
    for some, pixels, grid, options in launches(out):
        conv_delta_depthwise_kernel[grid](
            delta[some],
            filters,
            z,
            image[some],
            origin[some],
            out_origin[some],
            out[some],
            pixels,
            *delta.shape[2:],
            size_y,
            size_x,
            channels,
            len(z),
            *z.shape[2:],
            *(value for pair in window for value in pair),
            *strides(delta),
            *strides(z),
            *strides(out),
            slope,
            upper,
            RECTIFIED=clean is not None,
            HAS_SLOPE=slope != 0,
            **options,
        )
    return out
