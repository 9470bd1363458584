"""What contrast-normalised maps change by where their input changes inside a patch: lrn_delta on a GPU.

    v     = x + d_b, with the clean input x
    out_b = v * (k + alpha / size * sum of v^2 over the `size` channels around it) ^ -beta - y, with the clean output y

Channels beyond the first and the last count as zeros. Bound by memory: the change in, the result out, and the clean
inputs and outputs, which the patches of a picture share; a value's neighbours come from the first-level cache.

Paper: Zeiler & Fergus, arXiv:1311.2901, sections 3 and 4.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._places import LARGEST, PLAIN, check, launches, of_program, strides


@triton.jit(do_not_specialize=PLAIN)
def lrn_delta_kernel(
    delta,  # [B, size_y, size_x, C]
    before,  # [N, height, width, C]
    after,  # [N, height, width, C]
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
    after_n,
    after_y,
    after_x,
    out_b,
    out_y,
    out_x,
    size,  # channels of a sum
    share,  # alpha / size
    beta,
    k,
    ROOTS: tl.constexpr,  # beta is 0.75
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c, is_pixel, b, py, px, which, y, x, known = of_program(
        pixels, image, origin, size_y, size_x, images, height, width, BLOCK_P, BLOCK_C
    )
    own = delta + (b * delta_b + py.to(tl.int64) * delta_y + px.to(tl.int64) * delta_x)
    clean = before + (which * before_n + y * before_y + x * before_x)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for i in range(0, size):
        near = c + i - size // 2
        read = known[:, None] & (near >= 0) & (near < channels)
        v = tl.load(clean[:, None] + near, mask=read, other=0.0).to(tl.float32)
        v += tl.load(own[:, None] + near, mask=read, other=0.0).to(tl.float32)
        total += v * v
    total = k + share * total
    if ROOTS:
        root = tl.sqrt_rn(total)
        factor = 1.0 / (root * tl.sqrt_rn(root))
    else:
        factor = tl.exp2(-beta * tl.log2(total))
    read = known[:, None] & (c < channels)
    v = tl.load(clean[:, None] + c, mask=read, other=0.0).to(tl.float32)
    v += tl.load(own[:, None] + c, mask=read, other=0.0).to(tl.float32)
    at = after + (which * after_n + y * after_y + x * after_x)
    # Where a place is not in the clean maps, nothing is read and the result is NaN.
    z = tl.load(at[:, None] + c, mask=read, other=float("nan")).to(tl.float32)
    to = out + (b * out_b + py.to(tl.int64) * out_y + px.to(tl.int64) * out_x)
    tl.store(to[:, None] + c, (v * factor - z).to(out.dtype.element_ty), mask=is_pixel[:, None] & (c < channels))


def lrn_delta(
    delta: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    lrn: tuple[int, float, float, float],
    image: torch.Tensor,
    origin: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launches the kernel, and returns ``out``.

    Args:
        delta, out: [B, C, h, w] float32, bfloat16 or float16, channels last; not one, since neighbours are read.
        before, after: [N, C, H, W], channels last.
        lrn: (size, alpha, beta, k).
        image, origin: [B] and [B, 2] int64, contiguous. What lies outside of the clean maps is NaN.
    """
    check(delta=delta, before=before, after=after, out=out)
    channels, size_y, size_x = delta.shape[1:]
    size, alpha, beta, k = lrn
    if channels + size > LARGEST - 1024:
        raise ValueError(f"delta of {tuple(delta.shape)}, sums of {size} channels: too large for one launch")
    for some, pixels, grid, options in launches(delta):
        lrn_delta_kernel[grid](
            delta[some],
            before,
            after,
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
            *strides(after),
            *strides(out),
            size,
            alpha / size,
            beta,
            k,
            ROOTS=beta == 0.75,
            **options,
        )
    return out
