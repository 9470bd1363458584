"""The bodies of the CUDA kernels, driven on the CPU over every index that a launch would have.

Every case runs forwards and backwards over its blocks and threads, into guarded memory filled with a pattern:
the result must be the same bits, and every byte of it, and no other byte, written.
"""

from __future__ import annotations

import itertools
import mmap
import random
from dataclasses import replace

import cases
import driver as host_driver
import numpy as np
import oracle
import pytest
import samples
import torch
from driver import Output
from zfcore.ops import deconv_step
from zfcore.ops.deconv_step import packed_for_cuda
from zfcore.reference._params import Places, StepParams
from zfcore.reference.deconv_step import cut

SAMPLES = 40  # of each dtype and layout: 4 x 8 x 40 = 1,280 an op

by_dtype = pytest.mark.parametrize("dtype", samples.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_layout = pytest.mark.parametrize("layout", samples.LAYOUTS)


# ---- The ops -------------------------------------------------------------------------------------


@by_layout
@by_dtype
def test_max_pool2d_with_switches(driver, dtype, layout):
    for sample in samples.table(SAMPLES, dtype=dtype, layout=layout):
        cases.check_pool(driver, sample)


@by_layout
@by_dtype
def test_unpool(driver, dtype, layout):
    for sample in samples.table(SAMPLES, dtype=dtype, layout=layout):
        for size in cases.unpooled_sizes(sample):
            cases.check_unpool(driver, sample, size, relu=bool(sample.seed % 2), overlap=sample.overlap)


@by_layout
@by_dtype
def test_pool_gather2d(driver, dtype, layout):
    for sample in samples.table(SAMPLES, dtype=dtype, layout=layout):
        cases.check_gather(driver, sample, sample.overlap)


# ---- The variants of the kernels -----------------------------------------------------------------


def test_known_windows_pool(driver):
    reached = set()
    for sample in cases.known_samples():
        report = cases.check_pool(driver, sample)
        reached.add((sample.dtype, report.channels, report.packed, report.known_kernel))
    expected = {(d, 16 // d.itemsize, True, k) for d in samples.DTYPES for k in (2, 3)}
    expected |= {(d, 4, False, k) for d in samples.DTYPES for k in (2, 3)}
    assert expected <= reached


@pytest.mark.parametrize("overlap", samples.OVERLAPS)
def test_known_windows_unpool(driver, overlap):
    reached = set()
    for sample in cases.known_samples():
        for size, relu in itertools.product(cases.unpooled_sizes(sample), (False, True)):
            report = cases.check_unpool(driver, sample, size, relu, overlap)
            reached.add((sample.dtype, report.channels, report.packed, report.known_kernel, report.phase))
    expected = {(d, 4, False, k, phase) for d in samples.DTYPES for k, phase in ((2, 0), (3, 0), (3, 1))}
    assert expected <= reached


@by_dtype
@pytest.mark.parametrize("window", [*cases.KNOWN, ((3, 2), (2, 1), (1, 0))], ids=str)
@pytest.mark.parametrize("channels", [8, 12, 6])
def test_channels_last_takes_vectors(driver, dtype, window, channels):
    """All operands channels_last, aligned: 16 bytes a thread where the channels divide, in all three ops."""
    lanes = 16 // dtype.itemsize
    generator = torch.Generator().manual_seed(channels)
    pool = (*window, (1, 1))
    for height, width in ((9, 12), (13, 7)):
        x = samples.draw((2, channels, height, width), dtype, "special", generator)
        x = x.contiguous(memory_format=torch.channels_last)
        expected_y, expected_switches, _ = oracle.pool(x, *pool, False)
        strides = cases.strides_of(expected_y.shape, "channels_last")
        y, switches = Output(expected_y.shape, dtype, strides), Output(expected_y.shape, torch.uint8, strides)
        back = Output(x.shape, dtype, x.stride())
        gathered = Output(expected_y.shape, dtype, strides)
        reports = [
            driver.max_pool2d_with_switches(x, y.tensor, switches.tensor, pool),
            driver.unpool_relu2d(y.tensor, switches.tensor, back.tensor, pool, True, "sum"),
            driver.pool_gather2d(x, switches.tensor, gathered.tensor, pool, "sum"),
        ]
        for report in reports:
            assert report.packed == (channels % lanes == 0)
            if report.packed:
                assert report.channels == lanes
        assert oracle.same(y.check(), expected_y)
        assert torch.equal(switches.check(), expected_switches)
        unpooled = cases.reference.unpool_relu2d(expected_y, expected_switches, *pool, (height, width))
        assert oracle.same(back.check(), unpooled)
        assert oracle.same(gathered.check(), expected_y)


@pytest.mark.parametrize("shift", [0, 1, 2, 3, 4, 7])
def test_misaligned_channels_last_takes_no_vectors(driver, shift):
    pool = ((3, 3), (2, 2), (0, 0), (1, 1))
    x = torch.randn(8 * 9 * 9 + shift)[shift:].as_strided((1, 8, 9, 9), (8 * 81, 1, 72, 8))
    expected_y, expected_switches, _ = oracle.pool(x, *pool, False)
    strides = cases.strides_of(expected_y.shape, "channels_last")
    y, switches = Output(expected_y.shape, x.dtype, strides), Output(expected_y.shape, torch.uint8, strides)
    report = driver.max_pool2d_with_switches(x, y.tensor, switches.tensor, pool)
    assert report.packed == (shift % 4 == 0)
    assert oracle.same(y.check(), expected_y) and torch.equal(switches.check(), expected_switches)


@pytest.mark.parametrize("gap, packed", [(8, True), (4, True), (2, False), (1, False)])
def test_rows_that_start_off_a_vector_take_no_vectors(driver, gap, packed):
    """Channels are neighbours and the map is aligned, but its rows are 9 * 8 + gap elements apart."""
    pool = ((3, 3), (2, 2), (0, 0), (1, 1))
    x = torch.randn(9 * (9 * 8 + gap)).as_strided((1, 8, 9, 9), (1, 1, 9 * 8 + gap, 8))
    expected_y, expected_switches, _ = oracle.pool(x, *pool, False)
    strides = cases.strides_of(expected_y.shape, "channels_last")
    y, switches = Output(expected_y.shape, x.dtype, strides), Output(expected_y.shape, torch.uint8, strides)
    report = driver.max_pool2d_with_switches(x, y.tensor, switches.tensor, pool)
    assert report.packed == packed
    assert oracle.same(y.check(), expected_y) and torch.equal(switches.check(), expected_switches)


def test_an_axis_of_one_place_may_have_any_stride(driver):
    """Nothing steps along it, so it neither costs vectors nor needs 64 bits."""
    pool = ((2, 2), (2, 2), (0, 0), (1, 1))
    x = torch.randn(1, 4, 6, 2).contiguous(memory_format=torch.channels_last)
    y = torch.empty(1, 4, 3, 1).as_strided((1, 4, 3, 1), (2**60 + 1, 1, 4, 2**61 + 3))
    switches = torch.empty(1, 4, 3, 1, dtype=torch.uint8).as_strided(
        (1, 4, 3, 1), (2**62 + 1, 1, 4, 2**40 + 1)
    )
    report = driver.max_pool2d_with_switches(x, y, switches, pool)
    assert report.packed and report.index_bits == 32
    expected_y, expected_switches, _ = oracle.pool(x, *pool, False)
    assert torch.equal(y, expected_y) and torch.equal(switches, expected_switches)
    out = torch.empty_like(x)
    report = driver.unpool_relu2d(y, switches, out, pool, False, "sum")
    assert report.packed and report.index_bits == 32
    assert torch.equal(out, cases.reference.unpool2d(y, switches, *pool, (6, 2)))


# ---- Edge cases ----------------------------------------------------------------------------------


@by_dtype
def test_nothing_to_do(driver, dtype):
    pool = ((2, 2), (2, 2), (0, 0), (1, 1))
    x, y = torch.empty(0, 3, 4, 4, dtype=dtype), torch.empty(0, 3, 2, 2, dtype=dtype)
    switches, bad = torch.empty(0, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    assert driver.max_pool2d_with_switches(x, y, switches, pool).launches == 0
    assert driver.unpool_relu2d(y, switches, x, pool, True, "sum", bad).launches == 0
    assert driver.pool_gather2d(x, switches, y, pool, "sum", bad).launches == 0
    assert bad.item() == 0


def test_a_pooled_map_without_windows_is_refused(driver):
    y, switches = torch.empty(1, 3, 0, 2), torch.empty(1, 3, 0, 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="at least one window"):
        driver.unpool_relu2d(
            y, switches, torch.empty(1, 3, 4, 4), ((2, 2), (2, 2), (0, 0), (1, 1)), True, "sum"
        )


def test_bytes_are_no_feature_map(driver):
    x, small = torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    pool = ((2, 2), (2, 2), (0, 0), (1, 1))
    for call in (
        lambda: driver.max_pool2d_with_switches(x, small, small, pool),
        lambda: driver.unpool_relu2d(small, small, x, pool, True, "sum"),
        lambda: driver.pool_gather2d(x, small, small, pool, "sum"),
    ):
        with pytest.raises(RuntimeError, match="must be f32, f64, bf16 or f16"):
            call()


def test_a_window_of_255_taps(driver):
    """The last tap, 254, is the largest switch; the byte 255 names nothing."""
    pool = ((15, 17), (15, 17), (0, 0), (1, 1))
    x = torch.zeros(1, 2, 15, 17)
    x[0, 0, -1, -1] = 1
    y, switches = torch.empty(1, 2, 1, 1), torch.empty(1, 2, 1, 1, dtype=torch.uint8)
    driver.max_pool2d_with_switches(x, y, switches, pool)
    assert switches.flatten().tolist() == [254, 0]
    out, bad = torch.empty_like(x), torch.zeros(1, dtype=torch.int32)
    driver.unpool_relu2d(y, switches, out, pool, True, "sum", bad)
    assert torch.equal(out, x) and bad.item() == 0
    switches[0, 0] = 255
    driver.unpool_relu2d(y, switches, out, pool, True, "sum", bad)
    assert not out.any() and bad.item() == 1


def test_a_map_wider_than_a_float_can_count(driver):
    """2**24 + 1 columns: no index goes through a float."""
    width = 2**24 + 1
    x = torch.zeros(1, 1, 1, width, dtype=torch.bfloat16)
    x[..., -1], x[..., 5] = 2, 1
    pool = ((1, 3), (1, 2), (0, 0), (1, 1))
    pooled = (width - 3) // 2 + 1
    y = torch.empty(1, 1, 1, pooled, dtype=x.dtype)
    switches = torch.empty(1, 1, 1, pooled, dtype=torch.uint8)
    driver.max_pool2d_with_switches(x, y, switches, pool)
    found = y.flatten().nonzero().flatten()
    assert found.tolist() == [2, pooled - 1]
    assert switches.flatten()[found].tolist() == [1, 2]


def wild_cases():
    """Windows and maps for switches of any byte: every compiled window, and others that overlap or skip."""
    windows = [
        *((*known, (1, 1)) for known in cases.KNOWN),
        ((3, 2), (1, 3), (1, 0), (2, 1)),
        ((4, 4), (1, 1), (2, 2), (1, 1)),
    ]
    return list(itertools.product(windows, ("contiguous", "channels_last"), range(8)))


def test_any_switch_byte_is_safe(driver):
    """A bad switch adds nothing, reads nothing, writes nothing, and is reported."""
    for number, (pool, layout, seed) in enumerate(wild_cases()):
        generator = torch.Generator().manual_seed(number)
        size = (7 + seed % 3, 8 + seed % 2)
        pooled = oracle.pooled_size(size, (*pool, False))
        shape, taps = (2, 8, *pooled), pool[0][0] * pool[0][1]
        limit = 256 if seed % 2 else taps + 1  # any byte, or mostly taps, of which some lie outside the map
        switches = samples.lay_out(
            torch.randint(0, limit, shape, generator=generator, dtype=torch.uint8), layout
        )
        y = samples.lay_out(torch.randn(shape, generator=generator), layout)
        x = samples.lay_out(torch.randn((2, 8, *size), generator=generator), layout)
        valid, row, column = named_places(switches, size, pool)
        place = torch.where(valid, row * size[1] + column, 0).flatten(2)

        for overlap in samples.OVERLAPS:
            expected, kept = (
                torch.zeros(2, 8, size[0] * size[1]),
                torch.zeros(2, 8, place.size(2), dtype=torch.bool),
            )
            for n, c in itertools.product(range(2), range(8)):
                for o in range(place.size(2)):
                    if valid.flatten(2)[n, c, o]:
                        at, value = place[n, c, o], y.flatten(2)[n, c, o]
                        expected[n, c, at] = value if overlap == "last" else expected[n, c, at] + value
                        kept[n, c] &= place[n, c] != at if overlap == "last" else True
                        kept[n, c, o] = True
            bad = torch.zeros(2, dtype=torch.int32)
            out = Output((2, 8, *size), y.dtype, cases.strides_of((2, 8, *size), layout))
            driver.unpool_relu2d(y, switches, out.tensor, pool, False, overlap, bad[:1])
            assert torch.equal(out.check(), expected.view(2, 8, *size)), (pool, layout, seed, overlap)

            got = Output(shape, x.dtype, cases.strides_of(shape, layout))
            driver.pool_gather2d(x, switches, got.tensor, pool, overlap, bad[1:])
            read = torch.where(kept, x.flatten(2).gather(2, place), 0).view(shape)
            assert torch.equal(got.check(), read), (pool, layout, seed, overlap)
            assert bad.tolist() == [int(not valid.all())] * 2, (pool, layout, seed)


def named_places(switches, size, pool):
    """For each switch whether it names a place of the map, and the row and column that it means."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = pool
    tap = switches.long()
    row = torch.arange(tap.size(2))[:, None] * sh - ph + tap // kw * dh
    column = torch.arange(tap.size(3)) * sw - pw + tap % kw * dw
    inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
    return (tap < kh * kw) & inside, row, column


@pytest.mark.parametrize("overlap", samples.OVERLAPS)
@pytest.mark.parametrize("channels, layout", [(5, "contiguous"), (4, "contiguous"), (8, "channels_last")])
def test_a_bad_switch_is_reported_wherever_it_is(driver, channels, layout, overlap):
    pool = ((3, 3), (2, 2), (1, 1), (1, 1))
    x = samples.lay_out(torch.randn(2, channels, 5, 6), layout)
    y, good, _ = oracle.pool(x, *pool, False)
    y = samples.lay_out(y, layout)
    for index in range(good.numel()):
        switches = good.flatten().index_fill(0, torch.tensor(index), 9).view_as(good)
        switches = samples.lay_out(switches, layout)
        bad = torch.zeros(2, dtype=torch.int32)
        driver.unpool_relu2d(y, switches, torch.empty_like(x), pool, True, overlap, bad[:1])
        driver.pool_gather2d(x, switches, torch.empty_like(y), pool, overlap, bad[1:])
        assert bad.tolist() == [1, 1], index


# ---- Offsets past 2**31 --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def huge():
    """12 GiB of address space, of which only the pages that a test touches take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return np.frombuffer(mmap.mmap(-1, 12 * 2**30, flags=flags), dtype=np.uint8)


def spread_out(memory, at, x, strides):
    """A copy of x in ``memory``, from byte ``at`` on, with these strides in elements."""
    bits = torch.uint8 if x.dtype == torch.uint8 else torch.int16
    base = torch.from_numpy(memory[at:].view(np.uint8 if x.dtype == torch.uint8 else np.int16))
    far = base.as_strided(x.shape, strides)
    far.copy_(x.view(bits) if x.dtype != torch.uint8 else x)
    return far.view(x.dtype) if x.dtype != torch.uint8 else far


HALF = 2**30
FAR = {
    # name: sizes, strides of the map, images in a launch (None: 64 bits)
    "two images a launch": ((5, 4, 6, 6), (HALF, 36, 6, 1), 2),
    "one image past 2**31 by its channels": ((1, 2, 6, 6), (0, 2**31 + 8, 6, 1), None),
    "by its rows": ((2, 2, 5, 6), (7, 40, 2**29 + 9, 1), None),
    "by its columns": ((1, 2, 6, 5), (1, 3, 40, 2**29 + 5), None),
    "just under": ((1, 2, 6, 6), (0, 2**31 - 1 - 256 - 35, 6, 1), 1),
    "just over": ((1, 2, 6, 6), (0, 2**31 - 256 - 35, 6, 1), None),
}


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize(
    "pool", [((3, 3), (2, 2), (1, 1), (1, 1)), ((2, 3), (1, 1), (0, 1), (2, 1))], ids=str
)
def test_offsets_past_32_bits(driver, huge, name, pool):
    shape, strides, images = FAR[name]
    launches = 1 if images is None else -(-shape[0] // images)
    x = spread_out(huge, 0, torch.randn(shape).to(torch.bfloat16), strides)
    expected_y, expected_switches, _ = oracle.pool(x.clone(), *pool, False)
    y, switches = Output(expected_y.shape, x.dtype), Output(expected_y.shape, torch.uint8)
    gathered = Output(expected_y.shape, x.dtype)
    reports = [driver.max_pool2d_with_switches(x, y.tensor, switches.tensor, pool)]
    assert oracle.same(y.check(), expected_y) and torch.equal(switches.check(), expected_switches)

    reports.append(driver.pool_gather2d(x, expected_switches, gathered.tensor, pool, "sum"))
    assert oracle.same(gathered.check(), expected_y)

    wide = cases.reference.unpool_relu2d(expected_y, expected_switches, *pool, shape[2:])
    x.copy_(torch.full(shape, torch.nan))
    reports.append(driver.unpool_relu2d(expected_y, expected_switches, x, pool, True, "sum"))
    assert oracle.same(x.clone(), wide)
    for report in reports:
        assert report.launches == launches
        assert report.index_bits == (64 if images is None else 32)


@pytest.mark.parametrize("index_bits", [32, 64])
def test_switches_and_pooled_maps_far_apart(driver, huge, index_bits):
    pool = ((2, 2), (2, 2), (0, 0), (1, 1))
    x = torch.randn(3, 4, 4, 6).to(torch.float16)
    expected_y, expected_switches, _ = oracle.pool(x, *pool, False)
    step = 2**31 + 4 if index_bits == 64 else HALF
    strides = (6, step // 3, 3, 1) if index_bits == 64 else (step, 6, 3, 1)
    switches = spread_out(huge, 0, torch.zeros_like(expected_switches), strides)
    y = spread_out(huge, 3 * 2**30, torch.zeros_like(expected_y), strides)
    report = driver.max_pool2d_with_switches(x, y, switches, pool)
    assert report.index_bits == index_bits
    assert oracle.same(y.clone(), expected_y) and torch.equal(switches.clone(), expected_switches)
    back = Output(x.shape, x.dtype)
    report = driver.unpool_relu2d(y, switches, back.tensor, pool, False, "sum")
    assert report.index_bits == index_bits
    assert oracle.same(back.check(), cases.reference.unpool2d(expected_y, expected_switches, *pool, (4, 6)))


def test_expanded_gradients(driver):
    """What .sum().backward() hands over: one element with no strides at all."""
    pool = ((3, 3), (2, 2), (0, 0), (1, 1))
    _, switches, _ = oracle.pool(torch.randn(2, 8, 9, 9), *pool, False)
    ones = torch.ones(()).expand(switches.shape)
    out = Output((2, 8, 9, 9), torch.float32)
    driver.unpool_relu2d(ones, switches, out.tensor, pool, False, "sum")
    assert torch.equal(out.check(), cases.reference.unpool2d(ones, switches, *pool, (9, 9)))


# ---- The arithmetic of a launch ------------------------------------------------------------------


def test_division_by_a_fixed_divisor(driver):
    rng = random.Random(0)
    near_powers = [max(1, 2**k + d) for k in range(31) for d in (-1, 0, 1)]
    divisors = {*range(1, 300), *near_powers, 2**31 - 1, *(rng.randrange(1, 2**31) for _ in range(300))}
    for divisor in sorted(d for d in divisors if d < 2**31):
        multiples = [
            m
            for q in (1, 2, 3, (2**31 - 1) // divisor)
            for m in (q * divisor - 1, q * divisor, q * divisor + 1)
        ]
        numbers = [0, 1, 2**31 - 1, 2**31 - 2, *multiples, *(rng.randrange(2**31) for _ in range(50))]
        numbers = torch.tensor([n for n in numbers if 0 <= n < 2**31])
        quotients, remainders = driver.divide(divisor, numbers)
        assert torch.equal(quotients, numbers // divisor), divisor
        assert torch.equal(remainders, numbers % divisor), divisor


def test_a_launch_visits_every_place_once(driver):
    rng = random.Random(1)
    for _ in range(300):
        lanes = rng.choice((1, 2, 4, 8))
        n, h, w = rng.choice((1, 2, 7)), rng.randint(1, 40), rng.randint(1, 40)
        c, item_bytes = lanes * rng.choice((1, 2, 3, 8, 25)), rng.choice((1, 2, 4, 8, 16))
        for channels_fast in (False, True):
            _, visits = driver.visit(n, c, lanes, h, w, channels_fast, item_bytes)
            assert (visits == 1).all(), (n, c, lanes, h, w, channels_fast, item_bytes)


@pytest.mark.parametrize(
    "shape, lanes, channels_fast",
    [
        ((32, 96, 55, 55), 4, True),  # ZFNet's pool1 in fp32, channels_last and not
        ((32, 96, 55, 55), 4, False),
        ((32, 256, 13, 13), 8, True),  # pool2 in bf16
        ((32, 256, 13, 13), 4, False),
        ((32, 256, 6, 6), 4, True),
        ((4096, 256, 1, 1), 4, True),  # projections: many small patches
        ((4096, 96, 7, 7), 4, True),
        ((4096, 256, 3, 3), 4, False),
    ],
)
def test_few_threads_idle(driver, shape, lanes, channels_fast):
    n, c, h, w = shape
    blocks, _ = driver.visit(n, c, lanes, h, w, channels_fast, 4 * lanes if channels_fast else 4, count=False)
    busy = n * c // lanes * h * w / (blocks * 256)
    assert busy > 0.55, busy


def test_more_blocks_than_a_grid_are_refused(driver):
    assert driver.visit(2**22, 1, 1, 1, 2**16, False, 4, count=False)[0] == 2**30
    assert driver.visit(2**22, 1, 1, 1, 2**17 - 2**8, False, 4, count=False)[0] == 2**31 - 2**22
    assert driver.visit(2**22, 1, 1, 1, 2**17, False, 4, count=False)[0] == -1
    assert driver.visit(2**31 - 1, 2**31 - 1, 1, 2**31 - 1, 2**31 - 1, False, 4, count=False)[0] == -1


# ---- Storage types -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_convert_as_torch_does(driver, dtype):
    """Every pattern of 16 bits to float, and back, with the numbers in between: to nearest even."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    wide = driver.widen(patterns, dtype)
    assert oracle.same(wide, patterns.view(dtype).float())

    values = wide[wide.isfinite()].sort().values
    between = torch.cat([(values[1:].double() + values[:-1].double()).mul(0.5).float(), values])
    ulp = between.view(torch.int32)
    random_bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    for bits in (ulp - 1, ulp, ulp + 1, random_bits):
        numbers = bits.view(torch.float32).contiguous()
        assert oracle.same(driver.narrow(numbers, dtype), numbers.to(dtype))


# ---- Boxes ---------------------------------------------------------------------------------------


@by_layout
@by_dtype
def test_paste_boxes(driver, dtype, layout):
    reached = set()
    for seed in range(40):
        out = ("dense", "gaps", "contiguous")[seed % 3]
        report = cases.check_paste(driver, *cases.pasted(seed, dtype, layout), out)
        reached.add((report.packed, report.channels))
    assert reached == {(True, 16 // dtype.itemsize), (False, 1)}


def test_paste_boxes_takes_vectors_across_pixels(driver):
    """Three channels of float32: 16 bytes hold parts of two pixels, and of two rows."""
    report = cases.check_paste(driver, *cases.pasted(4, torch.float32, "contiguous", (4, 3)), "dense")
    assert report.packed and report.channels == 4


def test_paste_boxes_reads_no_place_outside_of_the_pictures(driver):
    """On a GPU nobody checks the indices first: what names no picture, or no pixel of it, is under no box."""
    pictures, fill, boxes, places = cases.pasted(6, torch.float32, "contiguous", (4, 4))
    boxes[:] = torch.tensor([-(2**40), -(2**40), 2**40, 2**40])
    count = len(boxes)
    for image, origin in ((9, 0), (-1, 0), (2**62, 0), (0, 2**61), (0, -(2**61)), (0, -4)):
        out = Output((count, pictures.size(1), 4, 4), torch.float32)
        indices = (torch.full((count,), image), torch.full((count, 2), origin), boxes)
        driver.paste_boxes(pictures, fill, out.tensor, *indices)
        assert not out.check().any()


def test_paste_boxes_of_nothing_launches_nothing(driver):
    pictures, fill, boxes, places = cases.pasted(1, torch.float32, "contiguous")
    out = torch.empty(0, pictures.size(1), 3, 3)
    assert driver.paste_boxes(pictures, fill, out, places.image, places.origin, boxes).launches == 0


def test_paste_boxes_past_32_bit_offsets(driver, huge):
    """A picture, and a patch's place in the result, that begin beyond 2**31 elements."""
    step = 2**31 + 64
    pictures = torch.from_numpy(huge)[: (step + 4096) * 4].view(torch.float32).as_strided((2, 3, 8, 8), (step, 64, 8, 1))
    pictures[1] = torch.randn(3, 8, 8)
    fill = torch.full((1, 1, 1, 1), 2.0).expand(pictures.shape)
    boxes = torch.tensor([[2, 2, 7, 6]])
    places = Places(torch.tensor([1]), torch.tensor([[1, 0]]), torch.tensor([[1, 0]]), (6, 8))
    assert cases.check_paste(driver, pictures, fill, boxes, places, "dense").packed
    view = driver_view(torch.empty(1, 3, 1, 1), (2**20, 2**20, 2**12, 1))
    with pytest.raises(RuntimeError, match="more values than 32 bits can count"):
        driver.paste_views(driver_view(pictures), driver_view(fill), view, *[places.image] * 3)


# ---- Steps of the deconvnet ----------------------------------------------------------------------

LIMITS = (12 * 1024, 48 * 1024, 112 * 1024)  # of shared memory: how large tiles and chunks of channels get
ANY, STRAIGHT, CELLS = range(3)  # ways to fill the places under a tile


@by_dtype
@pytest.mark.parametrize("conv", [*cases.CONVS, None], ids=str)
def test_deconv_step(driver, dtype, conv):
    reached = set()
    for pool, special, seed in itertools.product((*cases.STEP_POOLS, None), (False, True), range(12)):
        step = cases.drawn_step(seed, conv, pool, dtype, special=special)
        report = step.check(driver, LIMITS[seed % 3])
        reached.add((report.known_kernel, report.way))
    known = {"7x7/2": 7, "3x3/1": 3}.get(conv, 0) if dtype != torch.float64 else 0
    assert {(known, way) for way in (ANY, STRAIGHT, CELLS)} <= reached


@by_dtype
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_deconv_step_without_room_in_shared_memory(driver, dtype, channels):
    for seed, special in itertools.product(range(12), (False, True)):
        step = cases.drawn_step(100 + seed, dtype=dtype, channels=channels, special=special)
        report = step.check(driver, 16)
        assert not report.in_shared and report.shared_bytes == 0


@pytest.mark.parametrize("conv", [*cases.CONVS, None], ids=str)
def test_deconv_step_bits_do_not_depend_on_the_tiles_or_the_batch(driver, conv):
    for seed in range(20):
        step = cases.drawn_step(200 + seed, conv, dtype=torch.float32, channels=3)
        packed, shape = packed_for_cuda(step.weight, step.scale), step.expected().shape
        results = []
        for first, limit in ((0, LIMITS[0]), (0, LIMITS[2]), (shape[0] - 1, LIMITS[1])):
            part = slice(first, None)
            corner = None if step.frame is None else step.frame[0][part].contiguous()
            out = Output((shape[0] - first, *shape[1:]), torch.float32)
            arguments = (step.image[part], step.origin[part], step.switches, step.passes, corner, out.tensor, limit)
            driver.deconv_step(step.signal[part], packed, step.step, *arguments)
            results.append(out.check())
        assert torch.equal(results[0], results[1]) and torch.equal(results[0][-1:], results[2]), step


POOL = ((3, 3), (2, 2), (1, 1), (1, 1))
SHAPES = {
    # name: patch, pool, kernel and stride of the filters, maps, below, whether whole maps come down
    "ZFNet from conv5": ((33, 33), POOL, "7x7/2", (110, 110), (224, 224), False),
    "ZFNet from conv2": ((7, 7), POOL, "7x7/2", (110, 110), (224, 224), False),
    "ResNet, whole maps": ((56, 56), POOL, "7x7/2", (112, 112), (224, 224), True),
    "VGG": ((212, 212), None, "3x3/1", (224, 224), (224, 224), False),
    "VGG, whole maps": ((224, 224), None, "3x3/1", (224, 224), (224, 224), True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_deconv_step_few_threads_idle(driver, name):
    patch, pool, conv, size, below, whole = SHAPES[name]
    kernel, stride = cases.CONVS[conv]
    conv = (kernel, stride, tuple(k // 2 for k in kernel), (1, 1))
    generator = torch.Generator().manual_seed(0)
    signal, switches = torch.randn((2, 4, *patch), generator=generator), None
    if pool:
        _, switches, _ = oracle.pool(torch.randn((1, 4, *size), generator=generator), *pool, False)
        switches = samples.lay_out(switches, "channels_last")
    step = cases.Step(
        samples.lay_out(signal, "channels_last"), torch.randn((4, 3, *kernel), generator=generator),
        StepParams(pool, conv, 1, size, below, whole, True, "sum"), torch.zeros(2, dtype=torch.int64),
        torch.tensor([[0, 0], [3, 5]]) * (not whole), switches, None, None, None, name, "contiguous",
    )  # fmt: skip
    report = step.check(driver, 112 * 1024)
    assert (report.known_kernel, report.way) == (kernel[0], CELLS if pool else STRAIGHT)
    outputs = step.expected()[:, 0].numel()
    assert outputs / (report.blocks * report.threads * 16) > (0.55 if name == "ZFNet from conv2" else 0.8)


@pytest.mark.parametrize("conv", [*cases.CONVS, None], ids=str)
def test_deconv_step_switches_of_any_byte(driver, conv):
    """A switch that names no tap, or no place of the map, brings nothing; and nothing is read or written for it."""
    for seed, pool, limit in itertools.product(range(6), ("3x3/2", "2x2/2", None), (16, LIMITS[1])):
        step = replace(cases.drawn_step(300 + seed, conv, pool, torch.float32, overlap="sum"), passes=None)
        if step.switches is None:
            continue
        generator = torch.Generator().manual_seed(seed)
        taps = step.step.pool[0][0] * step.step.pool[0][1]
        wild = torch.randint(0, 256 if seed % 2 else taps + 1, step.switches.shape, generator=generator)
        valid, _, _ = named_places(wild, step.step.map, step.step.pool)
        step.switches.copy_(wild)
        tame = replace(step, switches=torch.where(valid, step.switches, 0).contiguous())
        b, _, h, w = step.signal.shape
        named = cut(valid.float(), step.image, step.origin, (h, w)) > 0
        tame.signal = torch.where(named, step.signal, 0)
        step.check(driver, limit, tame.expected())
        step.step = step.step._replace(overlap="last")
        out = Output(tame.expected().shape, torch.float32)
        corner = None if step.frame is None else step.frame[0]
        arguments = (step.image, step.origin, step.switches, None, corner, out.tensor, limit)
        driver.deconv_step(step.signal, packed_for_cuda(step.weight, step.scale), step.step, *arguments)
        assert out.check().isfinite().all()


@pytest.mark.parametrize("limit", [16, LIMITS[1]])
@pytest.mark.parametrize("conv", [*cases.CONVS, None], ids=str)
def test_deconv_step_of_no_image_or_place_is_zero(driver, conv, limit):
    """On a GPU nobody checks the indices first: what lies in no map brings nothing."""
    far = 2**62
    for seed in range(12):
        step = cases.drawn_step(400 + seed, conv, dtype=torch.float32)
        shape = step.expected().shape
        if step.switches is not None or step.passes is not None:
            for image in (-1, 3, far, -far):
                replace(step, image=torch.full_like(step.image, image)).check(driver, limit, torch.zeros(shape).double())
        for corner in (far, -far, 2**31, -(2**31) - 1, 41, -500):
            replace(step, origin=torch.full_like(step.origin, corner)).check(
                driver, limit, torch.zeros(shape).double()
            )
            if step.frame is not None:
                frame = torch.full_like(step.frame[0], corner), step.frame[1]
                replace(step, frame=frame).check(driver, limit, torch.zeros(shape).double())


def test_deconv_step_of_nothing_launches_nothing(driver):
    step = cases.drawn_step(1)
    empty, packed = step.signal[:0], packed_for_cuda(step.weight, None)
    out = torch.empty(0, *step.expected().shape[1:], dtype=empty.dtype)
    arguments = (step.image[:0], step.origin[:0], step.switches, step.passes, None, out, LIMITS[0])
    assert driver.deconv_step(empty, packed, step.step, *arguments).launches == 0


@pytest.mark.parametrize("rows", [2**29, 2**30 + 5])
def test_deconv_step_past_32_bit_offsets(driver, huge, rows):
    """Rows, patches and maps of images that lie so far apart; the steps of cells are 32 bits of bytes, or not used."""
    pool, conv = ((3, 3), (2, 2), (0, 0), (1, 1)), ((7, 7), (2, 2), (3, 3), (1, 1))
    _, near, _ = oracle.pool(torch.randn(2, 8, 13, 13), *pool, False)
    switches = spread_out(huge, 0, near, (2**31 + 16, 1, 48, 8))
    signal = spread_out(huge, 5 * 2**30, torch.randn(2, 8, 2, 3).to(torch.bfloat16), (2**31 + 24 - rows, 1, rows, 8))
    step = cases.Step(
        signal, torch.randn(8, 3, 7, 7).to(torch.bfloat16),
        StepParams(pool, conv, 1, (13, 13), (26, 26), False, True, "sum"), torch.tensor([1, 0]),
        torch.tensor([[0, 1], [2, 3]]), switches, None, None, None, "far apart", "contiguous",
    )  # fmt: skip
    expected = step.expected()
    report = step.check(driver, LIMITS[1], expected)
    assert report.way == (CELLS if rows == 2**29 else ANY)
    out = spread_out(huge, 10 * 2**30, torch.zeros(expected.shape).to(torch.bfloat16), (2**29, 2**27, 2**20, 1))
    arguments = (step.image, step.origin, switches, None, None, out, LIMITS[1])
    driver.deconv_step(signal, packed_for_cuda(step.weight, None), step.step, *arguments)
    step.assert_close(out.clone(), expected)


def test_the_op_hands_the_kernel_its_arguments(driver, monkeypatch):
    """The op's way to the GPU, with the host driver in the binding's place."""

    def binding(signal, switches, passes, filters, not_finite, out, image, origin, frame, *geometry):
        *geometry, device, stream = geometry
        assert (device, stream) == (None, "a stream")  # a CPU tensor's device has no index
        maps = [x and host_driver.View(x[0], x[1], *(tuple(pair) for pair in x[2:])) for x in (signal, switches, passes)]
        out = host_driver.View(out[0], out[1], tuple(out[2]), tuple(out[3]))
        addresses = filters, not_finite, out, image, origin, frame or None
        driver.step_views(*maps, *addresses, *geometry, groups=1, limit=LIMITS[1])

    monkeypatch.setattr(deconv_step.native, "deconv_step_cuda", binding, raising=False)
    monkeypatch.setattr(deconv_step._boundary, "stream", lambda device: "a stream")
    for seed in range(30):
        step = cases.drawn_step(500 + seed, (*cases.CONVS, None)[seed % 3], dtype=samples.DTYPES[seed % 4])
        expected = step.expected()
        arguments = (step.switches, step.passes, step.scale, step.frame)
        given = torch.full(expected.shape, torch.nan, dtype=step.signal.dtype) if seed % 2 else None
        patches = step.signal, step.weight, step.step, step.image, step.origin
        out = deconv_step._cuda(*patches, *arguments, given, tuple(expected.shape))
        assert given is None or out is given
        assert out.dtype == step.signal.dtype
        step.assert_close(out, expected)


def test_the_op_hands_wide_results_on(monkeypatch):
    monkeypatch.setattr(deconv_step, "_wide", lambda *args: args)
    step = cases.drawn_step(2, dtype=torch.float32, channels=4)
    for weight, geometry in (
        (torch.randn(len(step.weight), 5, *step.weight.shape[2:]), step.step),
        (step.weight, step.step._replace(groups=2)),
    ):
        arguments = (step.signal, weight, geometry, step.image, step.origin, None, None, None, None, None, None)
        handed = deconv_step._cuda(*arguments)
        assert all(a is b for a, b in zip(handed, arguments, strict=True))


def test_deconv_step_refusals(driver):
    step = cases.drawn_step(3, "3x3/1", "none", torch.float32, channels=3)
    out = torch.empty(step.expected().shape)

    def run(weight=step.weight, like=step.step, out=out):
        arguments = (step.image, step.origin, None, None, None, out, LIMITS[0])
        driver.deconv_step(step.signal, packed_for_cuda(weight, None), like, *arguments)

    with pytest.raises(RuntimeError, match="one group and at most 4 channels out"):
        run(out=torch.empty(len(out), 5, *out.shape[2:]))
    with pytest.raises(RuntimeError, match="one group and at most 4 channels out"):
        run(like=step.step._replace(groups=3))
    with pytest.raises(RuntimeError, match="longer than 32 bits can count"):
        run(like=step.step._replace(below=(2**30, 4)))
    with pytest.raises(RuntimeError, match="must be f32, f64, bf16 or f16"):
        step.signal = step.signal.to(torch.uint8)
        run()


def driver_view(x, shape=None):
    made = host_driver.view(x)
    for axis, length in enumerate(shape or x.shape):
        made.size[axis] = length
    return made
