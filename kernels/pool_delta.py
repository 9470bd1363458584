"""What max-pooled maps change by where their input changes inside a patch: pool_delta on a GPU.

    out_b = max over each window of (x + d_b) - y, with the clean input x, its change d_b, zero outside the patch, and
            the clean output y

Windows are clipped at the map's edges; NaN propagates. Bound by memory: the clean values under the windows, which the
patches of a picture share, the change in and the result out, and the clean outputs. What windows share comes from the
first-level cache.

Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._places import LARGEST, PLAIN, check, launches, of_program, strides


@triton.jit(do_not_specialize=PLAIN)
def pool_delta_kernel(
    delta,  # [B, patch_y, patch_x, C]
    before,  # [N, height, width, C]
    after,  # [N, above_y, above_x, C]
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
    height,
    width,
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
    before_n,
    before_y,
    before_x,
    after_n,
    after_y,
    after_x,
    out_b,
    out_y,
    out_x,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c, is_pixel, b, py, px, which, oy, ox, known = of_program(
        pixels, image, out_origin, size_y, size_x, images, above_y, above_x, BLOCK_P, BLOCK_C
    )
    is_channel = c < channels
    top = oy * stride_y - padding_y
    left = ox * stride_x - padding_x
    # From the corner of the map's, and of the patch's, memory to a window's.
    clean = before + (which * before_n + top * before_y + left * before_x)
    row, column = top - tl.load(origin + 2 * b), left - tl.load(origin + 2 * b + 1)
    own = delta + (b * delta_b + row * delta_y + column * delta_x)
    most = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    for tap in range(0, kernel_y * kernel_x):
        dy = (tap // kernel_x).to(tl.int64) * dilation_y
        dx = (tap % kernel_x).to(tl.int64) * dilation_x
        in_map = known & (top + dy >= 0) & (top + dy < height) & (left + dx >= 0) & (left + dx < width)
        in_patch = in_map & (row + dy >= 0) & (row + dy < patch_y) & (column + dx >= 0) & (column + dx < patch_x)
        at, changed = clean + (dy * before_y + dx * before_x), own + (dy * delta_y + dx * delta_x)
        v = tl.load(at[:, None] + c, mask=in_map[:, None] & is_channel, other=float("-inf")).to(tl.float32)
        v += tl.load(changed[:, None] + c, mask=in_patch[:, None] & is_channel, other=0.0).to(tl.float32)
        most = tl.where((v > most) | (v != v), v, most)
    # Where a window is not in the clean maps, nothing is read and the result is NaN.
    at = after + (which * after_n + oy * after_y + ox * after_x)
    y = tl.load(at[:, None] + c, mask=known[:, None] & is_channel, other=float("nan")).to(tl.float32)
    to = out + (b * out_b + py.to(tl.int64) * out_y + px.to(tl.int64) * out_x)
    tl.store(to[:, None] + c, (most - y).to(out.dtype.element_ty), mask=is_pixel[:, None] & is_channel)


def pool_delta(
    delta: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    window: tuple,
    image: torch.Tensor,
    origin: torch.Tensor,
    out_origin: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launches the kernel, and returns ``out``.

    Args:
        delta: [B, C, h, w] float32, bfloat16 or float16, channels last.
        before, after: [N, C, H, W] and [N, C, H', W'], channels last.
        window: (kernel, stride, padding, dilation), each a pair (rows, columns).
        image, origin, out_origin: [B], [B, 2], [B, 2] int64, contiguous. What lies outside of the clean maps is NaN.
        out: [B, C, *size], channels last.
    """
    check(delta=delta, before=before, after=after, out=out)
    channels, size_y, size_x = out.shape[1:]
    if max(map(max, window)) > LARGEST:
        raise ValueError(f"out of {tuple(out.shape)}, a window of {window}: too large for one launch")
    for some, pixels, grid, options in launches(out):
        pool_delta_kernel[grid](
            delta[some],
            before,
            after,
            image[some],
            origin[some],
            out_origin[some],
            out[some],
            pixels,
            *delta.shape[2:],
            size_y,
            size_x,
            channels,
            len(before),
            *before.shape[2:],
            *after.shape[2:],
            *(value for pair in window for value in pair),
            *strides(delta),
            *strides(before),
            *strides(after),
            *strides(out),
            **options,
        )
    return out
