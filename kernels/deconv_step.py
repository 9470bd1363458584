"""One step of the deconvnet on a batch of patches, unpool, rectify, transposed filter: deconv_step on a GPU.

    u     = unpool(signal patch b, switches of its image), or the patch where there is no pool; rectified; 0 where
            `passes` is 0
    out_b = the transposed convolution of u, zero outside the map that it is about

A matrix product whose factor u is never laid out. Outputs whose row and column leave the same rest on division by the
convolution's stride are reached by the same taps: the rows of a product are those outputs of all patches, its columns
the channels below, and what is summed over is those taps times the units. A place of u asks the windows over it, in
raster order, whether their switch names it: nothing is cleared first, nothing is written twice, no order changes.

The least to do: 2 * B * (places of u) * taps * K * C / groups operations, of which unpooling leaves most factors zero;
bytes: the signal and the switches once for each stride class, tap and BLOCK_N channels, nearly all out of the first-
and second-level caches, the filters once for each BLOCK_M outputs, and the results once.

Products with an exact zero of u are left out, so that 0 x inf and 0 x NaN of the filters give 0. Where all filters are
finite that changes nothing, and the product runs in tiles; a flag beside the filters tells. Else, and for float64, it
runs one unit at a time. Every sum is taken in one order, whatever else is in the batch.

Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._places import INTERPRETED, LARGEST, PLAIN, Config, capability_of, of_architecture, strides


# The tiles of an architecture by precision, from few channels below to many: chosen by counting registers, not measured.
# They are small in K and not pipelined: up to four windows over each place keep enough loads under way, and the
# copies of a pipeline would take the registers of the sums. With 64 rows Triton 3.7 gives exact float32 products of
# what is worked out beforehand to the tensor cores of 100, rounded to TF32; with 32 it does not.
_ROWS = {
    "ieee": (Config(128, 16, 16, 8, 1), Config(128, 32, 16, 8, 1), Config(64, 64, 16, 8, 1), Config(64, 128, 16, 8, 1)),
    "bf16": (Config(64, 32, 32, 8, 1), Config(64, 64, 32, 8, 1), Config(64, 128, 32, 8, 1)),
}
_FEW_ROWS = {**_ROWS, "ieee": (Config(32, 16, 16, 4, 1), Config(32, 32, 16, 4, 1), Config(32, 64, 16, 4, 1))}
CONFIGS = {80: _ROWS, 90: _ROWS, 100: _FEW_ROWS, 120: _ROWS}
# For units or channels that are no multiples of 16, and for results whose channels lie apart: each value is an access of
# its own then, with its address in registers, and the windows over a place are read one after the other.
THIN = {"ieee": Config(32, 32, 16, 8, 1), "bf16": Config(64, 32, 16, 8, 1)}
APART = Config(16, 16, 16, 8, 1)  # where zeros are left out
FEW_PROGRAMS = 1024  # of such a launch, nearly always of no use: each looks at the flag, and takes tiles while there are any
# Registers a thread: with no bound the compiler spills some to make room for one more block.
MOST_REGISTERS = 255
IDENTITY = ((1, 1), (1, 1), (0, 0), (1, 1))
OWN = ("tall", "wide", "pooled_y", "pooled_x", "below_y", "below_x", "far", "pool_padding_y", "pool_padding_x", "out_c")


@triton.jit
def _named(
    patches, maps, places, unit, is_unit, over,
    POOL_Y: tl.constexpr, POOL_X: tl.constexpr, OVER_X: tl.constexpr, OVER_Y: tl.constexpr, TYPE: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Of the windows over each place, the one numbered `over` in raster order: whether it names it, and its value."""
    patch, top, left, height, width, signal_y, signal_x = patches
    bytes, pooled_y, pooled_x, switches_y, switches_x, padding_y, padding_x = maps
    y, x, there = places
    # From the corner of the unclipped windows; a place that is not there counts as the first.
    from_y, from_x = tl.where(there, y + padding_y, 0), tl.where(there, x + padding_x, 0)
    oy = from_y // POOL_Y[1] - (OVER_Y - 1 - over // OVER_X)
    ox = from_x // POOL_X[1] - (OVER_X - 1 - over % OVER_X)
    dy, dx = from_y - oy * POOL_Y[1], from_x - ox * POOL_X[1]
    tap_y, tap_x = dy // POOL_Y[2], dx // POOL_X[2]
    names = there & (oy >= 0) & (oy < pooled_y) & (ox >= 0) & (ox < pooled_x)
    names = names & (tap_y < POOL_Y[0]) & (tap_x < POOL_X[0])
    names = names & (tap_y * POOL_Y[2] == dy) & (tap_x * POOL_X[2] == dx)
    held = names & (oy >= top) & (oy < top + height) & (ox >= left) & (ox < left + width)
    if not LAST:
        names = held
    at = bytes + (oy.to(tl.int64) * switches_y + ox.to(tl.int64) * switches_x)
    switch = tl.load(at[:, None] + unit[None, :], mask=names[:, None] & is_unit[None, :], other=255)
    hit = names[:, None] & (switch.to(tl.int32) == (tap_y * POOL_X[0] + tap_x)[:, None])
    at = patch + ((oy - top).to(tl.int64) * signal_y + (ox - left).to(tl.int64) * signal_x)
    value = tl.load(at[:, None] + unit[None, :], mask=held[:, None] & is_unit[None, :], other=0.0)
    return hit, value.to(TYPE)


@triton.jit
def _unpooled(
    patches, maps, open, places, unit, is_unit,
    POOL_Y: tl.constexpr, POOL_X: tl.constexpr, AT_ONCE: tl.constexpr, TYPE: tl.constexpr, LAST: tl.constexpr,
    RECTIFY: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """u [M, units] at places of its map."""
    y, x, there = places
    if POOL_Y is None:
        patch, top, left, height, width, signal_y, signal_x = patches
        held = there & (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
        at = patch + ((y - top).to(tl.int64) * signal_y + (x - left).to(tl.int64) * signal_x)
        u = tl.load(at[:, None] + unit[None, :], mask=held[:, None] & is_unit[None, :], other=0.0).to(TYPE)
    else:
        # The most windows that lie over a place of a column, and of a row.
        OVER_Y: tl.constexpr = POOL_Y[2] * (POOL_Y[0] - 1) // POOL_Y[1] + 1
        OVER_X: tl.constexpr = POOL_X[2] * (POOL_X[0] - 1) // POOL_X[1] + 1
        u = tl.zeros((y.shape[0], unit.shape[0]), dtype=TYPE)
        if OVER_Y * OVER_X <= AT_ONCE:  # all are asked for before the first is looked at
            for over in tl.static_range(OVER_Y * OVER_X):
                hit, value = _named(
                    patches, maps, places, unit, is_unit, over, POOL_Y, POOL_X, OVER_X, OVER_Y, TYPE, LAST
                )
                u = tl.where(hit, value, u) if LAST else u + tl.where(hit, value, 0.0)
        else:
            for over in range(0, OVER_Y * OVER_X):
                hit, value = _named(
                    patches, maps, places, unit, is_unit, over, POOL_Y, POOL_X, OVER_X, OVER_Y, TYPE, LAST
                )
                u = tl.where(hit, value, u) if LAST else u + tl.where(hit, value, 0.0)
    if RECTIFY:
        u = tl.where(u < 0, 0.0, u)  # NaN stays
    if PASSES:
        passes, passes_y, passes_x = open
        at = passes + (y.to(tl.int64) * passes_y + x.to(tl.int64) * passes_x)
        passed = tl.load(at[:, None] + unit[None, :], mask=there[:, None] & is_unit[None, :], other=0)
        u = tl.where(passed != 0, u, 0.0)
    return u


@triton.jit(do_not_specialize=(*PLAIN, *OWN))
def deconv_step_kernel(
    signal,  # [B, height, width, K], units dense
    switches,  # [N, pooled_y, pooled_x, K] bytes, units dense
    passes,  # [N, map_y, map_x, K] bytes, units dense
    filters,  # [taps_y * taps_x, K, C / groups]
    finite,  # [1], whether all filters are
    image,  # [B] int64
    origin,  # [B, 2] int64
    frame,  # [B, 2] int64
    out,  # [B, C, size_y, size_x]
    rows,  # of the product: B * tall * wide
    tall,  # outputs of one rest in a column of the result, and in a row
    wide,
    units,  # K
    group_units,  # K / groups
    group_channels,  # C / groups
    height,  # of a signal patch
    width,
    pooled_y,
    pooled_x,
    images,  # N
    far,  # from a map's corner, farther than anything reaches
    map_y,
    map_x,
    below_y,
    below_x,
    size_y,
    size_x,
    taps_y,
    taps_x,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    pool_padding_y,
    pool_padding_x,
    signal_b,  # strides
    signal_y,
    signal_x,
    switches_n,
    switches_y,
    switches_x,
    passes_n,
    passes_y,
    passes_x,
    out_b,
    out_y,
    out_x,
    out_c,
    POOL_Y: tl.constexpr,  # taps, stride and dilation of the pool's columns, and of its rows; None without a pool
    POOL_X: tl.constexpr,
    AT_ONCE: tl.constexpr,  # windows over a place that are read together; more are read one after the other
    LAST: tl.constexpr,
    RECTIFY: tl.constexpr,
    PASSES: tl.constexpr,
    WHOLE: tl.constexpr,
    FRAMED: tl.constexpr,
    DENSE: tl.constexpr,  # the result's channels are neighbours
    TYPE: tl.constexpr,  # of the sums
    TILED: tl.constexpr,  # tiles of units are multiplied, zeros and all; else one unit at a time, and no zeros
    CHOSEN: tl.constexpr,  # by whether the filters are finite: tiled then
    SPLIT: tl.constexpr,  # u has more bits than its storage: multiplied as two parts
    UPCAST: tl.constexpr,  # in the interpreter, whose products of bf16 are wrong
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rest_y, rest_x = tl.program_id(1) // stride_x, tl.program_id(1) % stride_x
    group = tl.program_id(2)
    unit = group * group_units
    tiles_n = tl.cdiv(group_channels, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_M) * tiles_n
    if CHOSEN:  # one of two launches does the work: the flag is not waited for
        tiles = tl.where((tl.load(finite) != 0) == TILED, tiles, 0)
    # The channels of one tile of rows one after the other, while its patches are at hand.
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)  # the launcher sees to it that it fits
        n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_row = m < rows
        is_channel = n < group_channels
        m = tl.minimum(m, rows - 1)
        b = (m // (tall * wide)).to(tl.int64)
        i, j = (m // wide) % tall, m % wide
        which = tl.zeros((BLOCK_M,), dtype=tl.int64)
        known = is_row
        if POOL_Y is not None or PASSES:
            which = tl.load(image + b)
            known = known & (which >= 0) & (which < images)
            which = tl.where(known, which, 0)
        # What lies too far off to reach its map is drawn nearer, so that 32 bits hold all places.
        top = tl.minimum(tl.maximum(tl.load(origin + 2 * b), -far), far).to(tl.int32)
        left = tl.minimum(tl.maximum(tl.load(origin + 2 * b + 1), -far), far).to(tl.int32)

        # Rows and columns are counted from the corner of the padded map below, where the convolution's first window
        # begins: `start` is the result's first. Those of one rest begin in the stride that it lies in, at place `first` of u.
        if WHOLE:
            start_y = tl.zeros((BLOCK_M,), dtype=tl.int32) + padding_y
            start_x = tl.zeros((BLOCK_M,), dtype=tl.int32) + padding_x
            if FRAMED:
                start_y += tl.minimum(tl.maximum(tl.load(frame + 2 * b), -far), far).to(tl.int32)
                start_x += tl.minimum(tl.maximum(tl.load(frame + 2 * b + 1), -far), far).to(tl.int32)
            over_y, over_x = (start_y % stride_y + stride_y) % stride_y, (start_x % stride_x + stride_x) % stride_x
            first_y, first_x = (start_y - over_y) // stride_y + i, (start_x - over_x) // stride_x + j
            py, px = i * stride_y + rest_y - over_y, j * stride_x + rest_x - over_x  # in the result
        else:
            first_y, first_x = top, left
            if POOL_Y is not None:
                first_y, first_x = top * POOL_Y[1] - pool_padding_y, left * POOL_X[1] - pool_padding_x
            start_y, start_x = first_y * stride_y, first_x * stride_x
            first_y, first_x = first_y + i, first_x + j
            py, px = i * stride_y + rest_y, j * stride_x + rest_x
        is_row = is_row & (py >= 0) & (py < size_y) & (px >= 0) & (px < size_x)
        below = (start_y + py >= padding_y) & (start_y + py < padding_y + below_y)
        below = below & (start_x + px >= padding_x) & (start_x + px < padding_x + below_x)
        known = known & is_row & below

        patches = (signal + b * signal_b, top, left, height, width, signal_y, signal_x)
        maps = (
            switches + which * switches_n, pooled_y, pooled_x, switches_y, switches_x, pool_padding_y, pool_padding_x,
        )  # fmt: skip
        open = (passes + which * passes_n, passes_y, passes_x)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=TYPE)
        own = filters + n
        for tap in range(0, taps_y * taps_x):
            shift_y = rest_y - (tap // taps_x) * dilation_y
            shift_x = rest_x - (tap % taps_x) * dilation_x
            if (shift_y % stride_y == 0) & (shift_x % stride_x == 0):
                y, x = first_y + shift_y // stride_y, first_x + shift_x // stride_x
                there = known & (y >= 0) & (y < map_y) & (x >= 0) & (x < map_x)
                own_tap = own + (tap * units + unit) * group_channels
                for k0 in range(0, group_units, BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)
                    is_unit = k < group_units
                    u = _unpooled(
                        patches, maps, open, (y, x, there), unit + k, is_unit,
                        POOL_Y, POOL_X, AT_ONCE, TYPE, LAST, RECTIFY, PASSES,
                    )  # fmt: skip
                    at = own_tap[None, :] + k[:, None] * group_channels
                    f = tl.load(at, mask=is_unit[:, None] & is_channel[None, :], other=0.0)
                    if SPLIT:
                        # A sum of half values has more bits than they, or a larger exponent: two parts of it that TF32
                        # holds, as it holds a half value.
                        high = (u.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
                        low = tl.where(u == high, 0.0, u - high)  # of an infinity, too
                        f = f.to(tl.float32)
                        total = tl.dot(high, f, total, input_precision="tf32")
                        total = tl.dot(low, f, total, input_precision="tf32")
                    elif TILED:
                        if UPCAST:
                            f = f.to(tl.float32)
                        total = tl.dot(u.to(f.dtype), f, total, input_precision=PRECISION)
                    else:
                        products = u[:, :, None] * f.to(TYPE)[None, :, :]
                        total += tl.sum(tl.where(u[:, :, None] == 0, 0.0, products), 1)

        at = out + b * out_b + py.to(tl.int64) * out_y + px.to(tl.int64) * out_x
        channel = group * group_channels + n
        if not DENSE:
            channel = channel.to(tl.int64) * out_c
        tl.store(
            at[:, None] + channel[None, :],
            total.to(out.dtype.element_ty),
            mask=is_row[:, None] & is_channel[None, :],
        )


def configs(precision: str, capability: int, thin: bool = False) -> tuple[Config, ...]:
    """The tiles that a GPU of this compute capability (90: Hopper) takes, from few channels to many; of one that the
    table does not name those of the nearest below it.
    """
    return (THIN[precision],) if thin else of_architecture(CONFIGS, capability)[precision]


def config_of(precision: str, channels: int, capability: int = 80, thin: bool = False) -> Config:
    """The smallest tile that holds so many channels below, of a group, or the largest."""
    *smaller, largest = configs(precision, capability, thin)
    return next((config for config in smaller if channels <= config.BLOCK_N), largest)


def deconv_step(
    signal: torch.Tensor,
    filters: torch.Tensor,
    finite: torch.Tensor,
    image: torch.Tensor,
    origin: torch.Tensor,
    out: torch.Tensor,
    conv: tuple,
    groups: int,
    map_size: tuple[int, int],
    below: tuple[int, int],
    pool: tuple | None = None,
    switches: torch.Tensor | None = None,
    passes: torch.Tensor | None = None,
    rectify: bool = True,
    last: bool = False,
    whole: bool = False,
    frame: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launches the kernel, and returns ``out``.

    Args:
        signal: [B, K, h, w] float32, float64, bfloat16 or float16, channels last.
        filters: [kh, kw, K, C / groups] in signal's dtype, dense; multiplied by a scale already, if there is one.
        finite: [1] bool or byte, whether all filters are.
        image, origin: [B], [B, 2] int64, contiguous: which switches and passes, and where the patch lies in its map. A
            patch of an image that is not there gives zeros where either is read.
        out: [B, C, *size], any strides.
        conv, pool: (kernel, stride, padding, dilation), each a pair (rows, columns).
        groups: of the units.
        map_size, below: the sizes of the maps that u and the result are about.
        switches: [N, K, Hp, Wp] uint8, channels last, with ``pool``; one that names no place is passed over.
        passes: [N, K, *map_size] bool or uint8, channels last.
        rectify, last, whole: as of ``StepParams``.
        frame: [B, 2] int64, contiguous, with ``whole``: where the result begins in the map below.
    """
    batch, units, height, width = signal.shape
    _, channels, size_y, size_x = out.shape
    kernel, stride, padding, dilation = conv
    for name, x in (("signal", signal), ("switches", switches), ("passes", passes)):
        if x is not None and x.size(1) > 1 and x.stride(1) != 1:
            raise ValueError(f"{name} of {tuple(x.shape)}, strides {x.stride()}: expected channels last")
    shape = (*kernel, units, channels // groups)
    if tuple(filters.shape) != shape or not filters.is_contiguous() or filters.dtype != signal.dtype:
        raise ValueError(f"filters of {filters.dtype} {tuple(filters.shape)}: expected {signal.dtype} {shape}, dense")
    # Outputs of one rest on division by the stride; a whole map, or a frame, may begin at any.
    more = stride if whole else (1, 1)
    tall, wide = (triton.cdiv(n + m - 1, s) for n, m, s in zip((size_y, size_x), more, stride))
    window = IDENTITY if pool is None else pool
    far = 2**30 // (max(window[1]) * max(stride))
    # Triton sees that 16 bytes may move at once where a number is a multiple of 16, and so an address.
    dense = channels == 1 or out.stride(1) == 1
    read = [x for x in (signal, switches, passes, filters) if x is not None]
    multiples = (units // groups, channels // groups, *(x.data_ptr() for x in read), *(n for x in read[:-1] for n in strides(x)))
    thin = not dense or any(number % 16 for number in multiples)
    maps = (*map_size, *below, *signal.shape[2:], *out.shape[2:], *(() if switches is None else switches.shape[2:]))
    own = capability_of(signal.device)
    sizes = max(*maps, *kernel, *window[0]) * max(*dilation, *window[3]) + max(*padding, *window[2])
    most = (LARGEST - 1024) // max(1, tall * wide * triton.cdiv(channels // groups, 16))  # patches of one launch
    if max(stride[0] * stride[1], groups) > 65535 or most < 1 or 2 * sizes > far or filters.numel() > LARGEST:
        raise ValueError(f"out of {tuple(out.shape)}, a convolution of {conv} and a pool of {pool}: too large for one launch")
    s = signal if switches is None else switches
    p = signal if passes is None else passes.view(torch.uint8)
    images = min([len(x) for x in (switches, passes) if x is not None], default=0)
    exact = signal.dtype == torch.float64
    precision = "ieee" if signal.dtype == torch.float32 else "bf16"
    overlapping = any(d * (k - 1) >= s for k, s, d in zip(window[0], window[1], window[3]))
    for begin in range(0, batch if out.numel() else 0, most):
        some = slice(begin, begin + most)
        rows = len(image[some]) * tall * wide
        # The flag is on the GPU: of the two launches, the one that it is not for ends at once.
        for config in (APART,) if exact else (config_of(precision, channels // groups, own, thin), APART):
            tiles = triton.cdiv(rows, config.BLOCK_M) * triton.cdiv(channels // groups, config.BLOCK_N)
            if config is APART and not exact:
                tiles = min(tiles, FEW_PROGRAMS)
            with torch.cuda.device_of(signal):
                deconv_step_kernel[(tiles, stride[0] * stride[1], groups)](
                    signal[some],
                    s,
                    p,
                    filters,
                    finite,
                    image[some],
                    origin[some],
                    origin[some] if frame is None else frame[some],
                    out[some],
                    rows,
                    tall,
                    wide,
                    units,
                    units // groups,
                    channels // groups,
                    height,
                    width,
                    *s.shape[2:],
                    images,
                    far,
                    *map_size,
                    *below,
                    size_y,
                    size_x,
                    *kernel,
                    *stride,
                    *padding,
                    *dilation,
                    *window[2],
                    *strides(signal),
                    *strides(s),
                    *strides(p),
                    *strides(out),
                    out.stride(1),
                    POOL_Y=None if pool is None else tuple(pair[0] for pair in (pool[0], pool[1], pool[3])),
                    POOL_X=None if pool is None else tuple(pair[1] for pair in (pool[0], pool[1], pool[3])),
                    AT_ONCE=1 if thin else 4,
                    LAST=last,
                    RECTIFY=rectify,
                    PASSES=passes is not None,
                    WHOLE=whole,
                    FRAMED=frame is not None,
                    DENSE=dense,
                    TYPE=tl.float64 if exact else tl.float32,
                    TILED=config is not APART,
                    CHOSEN=not exact,
                    SPLIT=config is not APART and precision == "bf16" and overlapping and not last,
                    UPCAST=INTERPRETED and precision == "bf16",
                    PRECISION="ieee",
                    maxnreg=MOST_REGISTERS,
                    **config._asdict(),
                )
    return out
