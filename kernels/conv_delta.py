"""What a convolution's output changes by where its input changes inside a patch: conv_delta on a GPU.

    g_b   = the convolution of the change d_b, which is delta[b] in its patch and zero elsewhere; no bias
    out_b = f(z + g_b) - f(z) with the clean output z of the patch's image, or g_b where nothing is rectified
    f(v)  = slope * v where v < 0, upper where v > upper, else v

A matrix product that is never laid out: its rows are the outputs of all patches, its columns the filters, and what is
summed over the taps times the channels is gathered from the patches as it is needed. Channels are neighbours, so that
where columns of a window are too, the taps of one of its rows are a single run of kw * C values, cut at the patch's
edges. Of each tap, or row of taps, a tile looks up first which part of it any of its rows reaches, and passes the rest
by: a small patch reaches few taps of a large filter.

The least to do: 2 * B * size * K * (taps inside the patch) * C operations; bytes: the patches once for each BLOCK_N
filters, the filters once for each BLOCK_M outputs, both out of the second-level cache, and the results once.

Every sum is taken in one order, whatever else is in the batch: what is passed by would have added zeros.

Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2. The reuse of clean maps: Nakandala et al., SIGMOD 2019.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._places import INTERPRETED, LARGEST, PLAIN, Config, capability_of, check, of_architecture, places, strides
from .relu_delta import rectified


# The tiles of an architecture by precision, from small to large: chosen by counting registers and shared memory, not
# measured. What multiplies with mma.sync has its factors in registers, too, and no room there for the largest tiles;
# wgmma (90) and tcgen05 (100) read theirs from shared memory. 120 is mma.sync again, with 99 KB of shared memory as 86
# and 89, which take the tiles of 80, have.
_MMA_SYNC = {
    "ieee": (Config(64, 32, 16, 4, 3), Config(64, 64, 16, 4, 3)),
    "tf32": (Config(64, 64, 32, 4, 3), Config(64, 128, 32, 8, 3)),
    "bf16": (Config(64, 64, 64, 4, 3), Config(64, 128, 64, 8, 3)),
}
_FROM_SHARED = {
    "ieee": _MMA_SYNC["ieee"],
    "tf32": (*_MMA_SYNC["tf32"], Config(128, 128, 32, 8, 3)),
    "bf16": (*_MMA_SYNC["bf16"], Config(128, 128, 64, 8, 3)),
}
_CONSUMER = {**_MMA_SYNC, "ieee": (Config(64, 32, 16, 4, 3), Config(64, 64, 16, 8, 3))}
CONFIGS = {80: _MMA_SYNC, 90: _FROM_SHARED, 100: _FROM_SHARED, 120: _CONSUMER}
# For channels that are no multiples of 16, as those of pictures: each value is an access of its own then, with its
# address in registers, which leaves fewer for sums.
THIN = {
    "ieee": (Config(64, 32, 16, 4, 3), Config(64, 64, 16, 8, 2)),
    "tf32": (Config(64, 64, 32, 8, 3),),
    "bf16": (Config(64, 64, 32, 8, 3),),
}
PROGRAMS = 128  # fewer would leave multiprocessors of a large GPU idle


@triton.jit
def _finish(
    change, out, clean, is_row, is_known, n, unit, group_filters, slope, upper,
    RECTIFIED: tl.constexpr, HAS_SLOPE: tl.constexpr,
):  # fmt: skip
    """Writes change [M, n], of the filters n of a group that begins at `unit`; out, clean: where each row begins."""
    is_filter = (n < group_filters)[None, :]
    unit = (unit + n)[None, :]
    if RECTIFIED:
        # Where a place is not in the clean maps, nothing is read and the result is NaN.
        z = tl.load(clean[:, None] + unit, mask=is_known[:, None] & is_filter, other=float("nan")).to(tl.float32)
        change = rectified(z + change, slope, upper, HAS_SLOPE) - rectified(z, slope, upper, HAS_SLOPE)
    tl.store(out[:, None] + unit, change.to(out.dtype.element_ty), mask=is_row[:, None] & is_filter)


@triton.jit
def _covered(box, start, length, size):
    """Which places [first, past the last) of a patch that begins at `start` are under the box, whose two ends lie two
    numbers apart, and in the picture, which is `size` long.
    """
    first = tl.minimum(tl.maximum(tl.load(box), 0), size) - start
    end = tl.minimum(tl.maximum(tl.load(box + 2), 0), size) - start
    return tl.minimum(tl.maximum(first, 0), length).to(tl.int32), tl.minimum(tl.maximum(end, 0), length).to(tl.int32)


@triton.jit(do_not_specialize=PLAIN)
def conv_delta_kernel(
    delta,  # [B, h, w, C], pixels and channels dense; with BOXES [pictures, map_y, map_x, C]
    boxes,  # [B, 4] int64, with BOXES
    filters,  # [K, taps_y, taps_x, run]
    clean,  # [N, above_y, above_x, K]
    image,  # [B] int64
    origin,  # [B, 2] int64
    out_origin,  # [B, 2] int64
    out,  # [B, size_y, size_x, K]
    rows,  # of the product: B * size_y * size_x
    height,  # of a patch
    width,
    channels,  # of delta
    size_y,
    size_x,
    group_filters,  # K / groups
    run,  # values of a tap that are neighbours in both delta and filters
    taps_y,
    taps_x,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    images,  # N
    above_y,
    above_x,
    pictures,
    map_y,
    map_x,
    delta_b,  # strides
    delta_y,
    clean_n,
    clean_y,
    clean_x,
    out_b,
    out_y,
    out_x,
    slope,
    upper,
    BOXES: tl.constexpr,  # the patches are windows of whole pictures, of which what lies under boxes counts
    RECTIFIED: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # in the interpreter, whose products of bf16 are wrong
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group = tl.program_id(1)
    tiles_n = tl.cdiv(group_filters, BLOCK_N)
    tile = tl.program_id(0)  # the filters of one tile of rows one after the other, while its patches are at hand
    m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)  # the launcher sees to it that it fits
    n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = m < rows
    is_filter = n < group_filters
    m = tl.minimum(m, rows - 1)
    b, py, px, which, oy, ox, is_known = places(
        m, is_row, image, out_origin, size_y, size_x, images, above_y, above_x
    )

    # The first tap in the patch's own rows and columns. What lies too far off to reach it is drawn nearer, so that
    # 32 bits hold it.
    reach_y, reach_x = dilation_y * taps_y, tl.maximum(dilation_x * taps_x, tl.cdiv(run, channels))
    patch_y, patch_x = tl.load(origin + 2 * b), tl.load(origin + 2 * b + 1)
    dy = oy * stride_y - padding_y - patch_y
    dx = ox * stride_x - padding_x - patch_x
    dy = tl.minimum(tl.maximum(dy, -reach_y), height).to(tl.int32)
    dx = tl.minimum(tl.maximum(dx, -reach_x), width).to(tl.int32)

    out += b * out_b + py.to(tl.int64) * out_y + px.to(tl.int64) * out_x  # where each row's result begins
    clean += which * clean_n + oy * clean_y + ox * clean_x

    patch = delta + b * delta_b
    # What of the patch there is: rows [y0, y1), and values [x0, x1) of a row.
    zero = tl.zeros((BLOCK_M,), dtype=tl.int32)
    y0, y1, x0, x1 = zero, zero + height, zero, zero + width * channels
    if BOXES:
        patch = delta + (which * delta_b + patch_y * delta_y + patch_x * channels)
        y0, y1 = _covered(boxes + 4 * b, patch_y, height, map_y)
        x0, x1 = _covered(boxes + 4 * b + 1, patch_x, width, map_x)
        x0, x1 = x0 * channels, x1 * channels
        y1 = tl.where((which >= 0) & (which < pictures), y1, 0)
    own = filters + (group * group_filters + n).to(tl.int64) * (taps_y * taps_x * run)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tap in range(0, taps_y * taps_x):
        y = dy + (tap // taps_x) * dilation_y
        start = (dx + (tap % taps_x) * dilation_x) * channels + group * run  # in the patch's row, may be before it
        inside = is_row & (y >= y0) & (y < y1)
        first = tl.maximum(tl.min(tl.where(inside, x0 - start, run), 0), 0) // BLOCK_K * BLOCK_K
        last = tl.minimum(tl.max(tl.where(inside, x1 - start, 0), 0), run)
        from_ = patch + (y.to(tl.int64) * delta_y + start)
        own_tap = own + tap * run
        for j0 in range(first, last, BLOCK_K):
            j = j0 + k
            at = start[:, None] + j[None, :]
            reached = inside[:, None] & (at >= x0[:, None]) & (at < x1[:, None]) & (j < run)[None, :]
            a = tl.load(from_[:, None] + j[None, :], mask=reached, other=0.0)
            f = tl.load(own_tap[None, :] + j[:, None], mask=(j < run)[:, None] & is_filter[None, :], other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                f = f.to(tl.float32)
            total = tl.dot(a, f, total, input_precision=PRECISION)

    # Finished in two parts, since each result needs its clean value beside it: of the whole tile at once, these would
    # take more registers than there are. One part's results are written before the other's values are read.
    PART: tl.constexpr = BLOCK_N // 2
    left, right = total.reshape(BLOCK_M, 2, PART).permute(0, 2, 1).split()
    n = (tile % tiles_n) * BLOCK_N + tl.arange(0, PART)
    unit = group * group_filters
    _finish(left, out, clean, is_row, is_known, n, unit, group_filters, slope, upper, RECTIFIED, HAS_SLOPE)
    _finish(right, out, clean, is_row, is_known, n + PART, unit, group_filters, slope, upper, RECTIFIED, HAS_SLOPE)


def configs(precision: str, capability: int, thin: bool = False) -> tuple[Config, ...]:
    """The tiles that a GPU of this compute capability (90: Hopper) takes, from small to large; of one that the table
    does not name those of the nearest below it. thin: for few or odd channels.
    """
    if thin:
        return THIN[precision]
    return of_architecture(CONFIGS, capability)[precision]


def config_of(precision: str, filters: int, rows: int, capability: int = 80, thin: bool = False) -> Config:
    """The largest tile that is not mostly padding and leaves enough programs, for so many filters a group and rows."""
    first, *larger = configs(precision, capability, thin)
    chosen = first
    for config in larger:
        programs = triton.cdiv(rows, config.BLOCK_M) * triton.cdiv(filters, config.BLOCK_N)
        if 2 * filters > config.BLOCK_N and programs >= PROGRAMS:
            chosen = config
    return chosen


def launch(
    delta: torch.Tensor,
    patch: tuple[int, int],
    boxes: torch.Tensor | None,
    filters: torch.Tensor,
    window: tuple,
    groups: int,
    image: torch.Tensor,
    origin: torch.Tensor,
    out_origin: torch.Tensor,
    out: torch.Tensor,
    clean: torch.Tensor | None,
    slope: float,
    upper: float,
    tf32: bool,
) -> torch.Tensor:
    """As `conv_delta` and, with boxes, `conv_boxes` have it. patch: the size of the patches."""
    check(delta=delta, out=out, **({} if clean is None else {"clean": clean}))
    channels, batch = delta.size(1), len(out)
    height, width = patch
    _, units, size_y, size_x = out.shape
    kernel, stride, padding, dilation = window
    if not delta.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"delta of strides {delta.stride()}: expected channels last, dense")
    shape = (units, *kernel, channels // groups)
    if tuple(filters.shape) != shape or not filters.is_contiguous():
        raise ValueError(f"filters of {tuple(filters.shape)}: expected {shape}, dense")
    if filters.dtype != delta.dtype:
        raise TypeError(f"filters of {filters.dtype}: expected delta's {delta.dtype}")
    taps, run = kernel, channels // groups
    if groups == 1 and dilation[1] == 1:
        taps, run = (kernel[0], 1), kernel[1] * channels
    span = (width + kernel[1] * dilation[1] + 1) * channels, (height + kernel[0] * dilation[0] + 1)
    group_filters = units // groups
    # Triton sees that 16 bytes may move at once where a number is a multiple of 16, and so an address.
    thin = boxes is not None or any(number % 16 for number in (channels, run, delta.data_ptr(), filters.data_ptr()))
    precision = "bf16" if delta.dtype != torch.float32 else "tf32" if tf32 else "ieee"
    most = (LARGEST - 1024) // max(1, size_y * size_x * triton.cdiv(group_filters, 32))  # patches of one launch
    if max(*span, kernel[0] * kernel[1] * channels + 1024) > LARGEST or groups > 65535 or most < 1 or max(*stride, *padding) > LARGEST:
        raise ValueError(f"delta of {tuple(delta.shape)}, a window of {window}: too large for one launch")
    for begin in range(0, batch if out.numel() else 0, most):
        some = slice(begin, begin + most)
        own = delta if boxes is not None else delta[some]
        count = len(out[some])
        rows = count * size_y * size_x
        config = config_of(precision, group_filters, rows, capability_of(delta.device), thin)
        tiles = triton.cdiv(rows, config.BLOCK_M) * triton.cdiv(group_filters, config.BLOCK_N)
        z = out if clean is None else clean
        with torch.cuda.device_of(delta):
            conv_delta_kernel[(tiles, groups)](
                own,
                image[some] if boxes is None else boxes[some],
                filters,
                z,
                image[some],
                origin[some],
                out_origin[some],
                out[some],
                rows,
                height,
                width,
                channels,
                size_y,
                size_x,
                group_filters,
                run,
                *taps,
                *stride,
                *padding,
                *dilation,
                len(z),
                *z.shape[2:],
                len(delta),
                *delta.shape[2:],
                delta.stride(0) if len(own) > 1 else 0,
                delta.stride(2) if delta.size(2) > 1 else 0,
                *strides(z),
                *strides(out),
                slope,
                upper,
                BOXES=boxes is not None,
                RECTIFIED=clean is not None,
                HAS_SLOPE=slope != 0,
                PRECISION="tf32" if precision == "tf32" else "ieee",
                UPCAST=INTERPRETED and precision == "bf16",
                **config._asdict(),
            )
    return out


def conv_delta(
    delta: torch.Tensor,
    filters: torch.Tensor,
    window: tuple,
    groups: int,
    image: torch.Tensor,
    origin: torch.Tensor,
    out_origin: torch.Tensor,
    out: torch.Tensor,
    clean: torch.Tensor | None = None,
    slope: float = 0.0,
    upper: float = float("inf"),
    tf32: bool = False,
) -> torch.Tensor:
    """Launches the kernel, and returns ``out``.

    Args:
        delta: [B, C, h, w] float32, bfloat16 or float16, channels last and dense.
        filters: [K, kh, kw, C / groups] in delta's dtype, dense, finite; multiplied by a scale already, if there is one.
        window: (kernel, stride, padding, dilation), each a pair (rows, columns); padding above and left.
        groups: of the channels.
        image, origin, out_origin: [B], [B, 2], [B, 2] int64, contiguous: which clean map, and where the patch and the
            result lie, rows then columns. A result outside of the clean maps is NaN.
        out: [B, K, *size], its channels neighbours in memory; must hold all outputs that a patch reaches.
        clean: [N, K, H, W] with neighbouring channels: the clean outputs about which the change is rectified.
        slope, upper: of the rectifier.
        tf32: round the factors of float32 products to 11 bits, for the tensor cores.
    """
    return launch(
        delta, tuple(delta.shape[2:]), None, filters, window, groups, image, origin, out_origin, out, clean, slope, upper, tf32
    )  # fmt: skip
