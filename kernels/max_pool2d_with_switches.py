"""Max-pooling with switches on a GPU: the Triton twin of csrc/max_pool2d_with_switches.cuh, which says what it computes.

    y[n,c,oy,ox] = max over taps (ky,kx) in the map of x[n,c, oy*s-p+ky*d, ox*s-p+kx*d]; switch = ky*kw + kx

Of equals the first tap in raster order wins, NaN over every number, the last NaN over the others.

A program takes a run of one image's outputs in the order of the result's memory, so that neighbouring threads write
neighbours in both layouts. Channels last, in multiples of 16, 16 outputs share a place: indices are worked out once for
them, and a thread moves 16 bytes of channels at a time. Elsewhere each output has its own.

Bound by memory. The least to move: the map once, value and switch once, b * (H * W + Oh * Ow) + Oh * Ow bytes a channel
of b-byte values; what windows share comes out of the caches, whole rows mostly out of the second-level one. The work:
kh * kw compares an output.

Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (switches).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._places import LARGEST, PLAIN

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
UNROLLED = 16  # taps: windows of no more are written out, which leaves the compiler to order their loads
CHANNELS = 16  # that share a place
IMAGES = 65535  # of one launch: the second axis of a grid


class Run(NamedTuple):
    """The outputs of a program, and how it is run."""

    BLOCK: int
    num_warps: int


# Where outputs share a place, by bytes of a value: 16 bytes of each tap a thread. Elsewhere two outputs a thread, since each
# has addresses and bounds in registers. Counted, not measured.
SHARED = {2: Run(1024, 4), 4: Run(512, 4), 8: Run(256, 4)}
APART = Run(256, 4)


@triton.jit
def _take(
    most, switch, seen, corner, top, left, is_run, height, width, x_y, x_x, dilation_y, dilation_x,
    tap, KERNEL_X: tl.constexpr,
):  # fmt: skip
    """The maxima, their switches, and which windows had a tap in the map, with one tap more."""
    dy, dx = (tap // KERNEL_X) * dilation_y, (tap % KERNEL_X) * dilation_x
    y, x = top + dy, left + dx
    inside = is_run & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = corner + (tl.cast(dy, tl.int64) * x_y + tl.cast(dx, tl.int64) * x_x)
    v = tl.load(at, mask=inside, other=float("-inf")).to(most.dtype)
    better = (v > most) | (v != v) | (inside & (seen == 0))  # what is not inside is -inf, which is not more
    return tl.where(better, v, most), tl.where(better, tap, switch), seen | inside.to(tl.int32)


@triton.jit(do_not_specialize=(*PLAIN, "runs"))
def max_pool2d_with_switches_kernel(
    x,  # [N, C, height, width]
    y,  # [N, C, size_y, size_x], or its channels last
    switches,  # bytes, as y
    runs,  # of RUN outputs, in an image
    channels,
    height,
    width,
    size_y,
    size_x,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    x_n,  # strides
    x_c,
    x_y,
    x_x,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    UNROLL: tl.constexpr,
    LAST: tl.constexpr,  # channels last
    RUN: tl.constexpr,  # outputs that share a place
    INDEX: tl.constexpr,  # what holds a place
    TYPE: tl.constexpr,  # of compares
    BLOCK: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    run = tl.program_id(0).to(INDEX) * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)[:, None]
    own = tl.arange(0, RUN)[None, :]
    is_run = run < runs
    run = tl.minimum(run, runs - 1)
    if LAST:
        parts = channels // RUN
        c = (run % parts) * RUN
        place = run // parts
        oy, ox = place // size_x, place % size_x
    else:
        c = run // size_x // size_y
        oy, ox = (run // size_x) % size_y, run % size_x
    top, left = oy * stride_y - padding_y, ox * stride_x - padding_x
    corner = x + n * x_n + (top.to(tl.int64) * x_y + left.to(tl.int64) * x_x) + (c + own).to(tl.int64) * x_c
    most = tl.full((BLOCK // RUN, RUN), float("-inf"), TYPE)
    switch = tl.zeros((BLOCK // RUN, RUN), tl.int32)
    seen = tl.zeros((BLOCK // RUN, 1), tl.int32)
    if UNROLL:
        for tap in tl.static_range(KERNEL_Y * KERNEL_X):
            most, switch, seen = _take(
                most, switch, seen, corner, top, left, is_run, height, width, x_y, x_x, dilation_y, dilation_x, tap, KERNEL_X
            )
    else:
        for tap in range(KERNEL_Y * KERNEL_X):
            most, switch, seen = _take(
                most, switch, seen, corner, top, left, is_run, height, width, x_y, x_x, dilation_y, dilation_x, tap, KERNEL_X
            )
    to = n * runs * RUN + run.to(tl.int64) * RUN + own
    tl.store(y + to, most.to(y.dtype.element_ty), mask=is_run)
    tl.store(switches + to, switch.to(tl.uint8), mask=is_run)


def max_pool2d_with_switches(x: torch.Tensor, y: torch.Tensor, switches: torch.Tensor, window: tuple) -> None:
    """Launches the kernel, which fills ``y`` and ``switches``.

    Args:
        x: [N, C, H, W] float32, float64, bfloat16 or float16, any strides.
        y: [N, C, Oh, Ow] in x's dtype, contiguous or channels last.
        switches: [N, C, Oh, Ow] uint8, laid out as y.
        window: (kernel, stride, padding, dilation), each a pair (rows, columns); at most 255 taps.
    """
    if x.dtype not in DTYPES or y.dtype != x.dtype or switches.dtype != torch.uint8:
        raise TypeError(f"x of {x.dtype}, y of {y.dtype}, switches of {switches.dtype}: expected a float, the same and uint8")
    layouts = (torch.channels_last, torch.contiguous_format)
    layout = next((f for f in layouts if all(r.is_contiguous(memory_format=f) for r in (y, switches))), None)
    if layout is None or y.shape != switches.shape or y.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"y of {tuple(y.shape)}, strides {y.stride()}, switches of {tuple(switches.shape)}, strides {switches.stride()}: "
            f"expected both contiguous or channels last, of x's {tuple(x.shape[:2])}"
        )
    if not y.numel():
        return
    kernel, stride, padding, dilation = window
    _, channels, size_y, size_x = y.shape
    last = layout is torch.channels_last
    run = CHANNELS if last and channels % CHANNELS == 0 else 1
    runs = channels * size_y * size_x // run
    block, warps = APART if run == 1 else SHARED[x.element_size()]
    # No place, of the map, of its padding or of an image's outputs, is as far from the first.
    far = max(channels * size_y * size_x, *x.shape[2:]) + block + sum(map(max, padding, stride))
    far += max(k * d for k, d in zip(kernel, dilation, strict=True))
    programs = triton.cdiv(runs * run, block)
    if programs > LARGEST:
        raise ValueError(f"y of {tuple(y.shape)}: too large for one launch")
    for begin in range(0, len(x), IMAGES):
        some = slice(begin, begin + IMAGES)
        with torch.cuda.device_of(x):
            max_pool2d_with_switches_kernel[(programs, len(x[some]))](
                x[some],
                y[some],
                switches[some],
                runs,
                channels,
                *x.shape[2:],
                size_y,
                size_x,
                *stride,
                *padding,
                *dilation,
                *x.stride(),
                KERNEL_Y=kernel[0],
                KERNEL_X=kernel[1],
                UNROLL=kernel[0] * kernel[1] <= UNROLLED,
                LAST=last,
                RUN=run,
                INDEX=tl.int32 if far <= LARGEST else tl.int64,
                TYPE=tl.float64 if x.dtype == torch.float64 else tl.float32,
                BLOCK=block,
                num_warps=warps,
            )
