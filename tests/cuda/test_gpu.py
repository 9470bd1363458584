"""The CUDA kernels on a GPU, through zfcore.ops: streams, graphs, devices, determinism and size.

What the op tests check of every backend is not repeated. Without a GPU every test is skipped, and says why.
"""

from __future__ import annotations

import itertools

import cases
import oracle
import pytest
import samples
import torch
from running import why_missing

import zfcore.ops as ops
from zfcore import _C, reference
from zfcore.ops.deconv_step import deconv_step

POOLS = [(3, 2, 0), (3, 2, 1), (2, 2, 0), ((3, 2), (1, 3), (1, 0))]
LAYOUTS = ("contiguous", "channels_last")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(why_missing("cuda")), reason=why_missing("cuda") or "a GPU is here"),
]


def make(shape=(4, 16, 27, 27), dtype=torch.float32, layout="contiguous", values="special", seed=0):
    x = samples.draw(shape, dtype, values, torch.Generator().manual_seed(seed))
    return samples.lay_out(x, layout).cuda()


def round_trip(x, pool):
    """All three ops, each from the one before."""
    y, switches = ops.max_pool2d_with_switches(x, *pool)
    unpooled = ops.unpool_relu2d(y, switches, *pool, output_size=x.shape[2:])
    return y, switches, unpooled, ops.pool_gather2d(x, switches, *pool)


def expected_of(x, pool):
    x = x.cpu()
    y, switches = reference.max_pool2d_with_switches(x, *pool)
    unpooled = reference.unpool_relu2d(y, switches, *pool, output_size=x.shape[2:])
    return y, switches, unpooled, reference.pool_gather2d(x, switches, *pool)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert oracle.same(a.cpu(), b)


@pytest.mark.parametrize("dtype", samples.DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_equals_the_reference_bit_by_bit(dtype, layout, pool):
    for shape in ((4, 16, 27, 27), (2, 12, 13, 8), (3, 6, 7, 9), (1, 96, 55, 54)):
        x = make(shape, dtype, layout)
        assert_same(round_trip(x, pool), expected_of(x, pool))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_switches_of_any_byte(layout):
    """Bad switches bring nothing. That no byte outside is touched is for compute-sanitizer to say."""
    for seed in range(20):
        switches = torch.randint(0, 256, (2, 8, 6, 6), dtype=torch.uint8)
        y = torch.randn(2, 8, 6, 6)
        out = ops.unpool2d(samples.lay_out(y, layout).cuda(), switches.cuda(), 3, 2, output_size=(13, 13))
        named = torch.where(switches < 9, y.double(), 0.0)
        assert torch.allclose(out.double().sum((2, 3)).cpu(), named.sum((2, 3)), atol=1e-4), seed
    torch.cuda.synchronize()


def test_follows_the_current_stream():
    """Inputs that a side stream is still to write: on any other stream the kernels would read old values."""
    side = torch.cuda.Stream()
    fresh = make(seed=1)
    expected = [t.cuda() for t in expected_of(fresh, (3, 2))]
    torch.cuda.synchronize()
    for trial in range(100):
        x = torch.zeros_like(fresh)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000)
            x.copy_(fresh)
            got = round_trip(x, (3, 2))
        torch.cuda.current_stream().wait_stream(side)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), trial
            a.record_stream(torch.cuda.current_stream())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graphs(layout):
    x = make(layout=layout)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        round_trip(x, (3, 2, 1))
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = round_trip(x, (3, 2, 1))
    for replay in range(20):
        fresh = make(layout=layout, seed=replay + 2)
        x.copy_(fresh)
        graph.replay()
        assert_same(captured, expected_of(fresh, (3, 2, 1)))


def test_never_synchronises():
    x = make()
    round_trip(x, (3, 2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        round_trip(x, (3, 2))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout, pool", list(itertools.product(LAYOUTS, POOLS)), ids=str)
def test_same_bits_every_time(layout, pool):
    x = make((8, 32, 55, 55), layout=layout, values="normal")
    first = round_trip(x, pool)
    for _ in range(250):
        for a, b in zip(first, round_trip(x, pool), strict=True):
            assert torch.equal(a, b)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: nothing to switch between")
    x = make().to("cuda:1")
    with torch.cuda.device(0):
        got = round_trip(x, (3, 2))
        assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in got)
    assert_same(got, expected_of(x, (3, 2)))


def test_a_device_that_is_not_there():
    x, y = make((1, 1, 4, 4)), torch.zeros(1, 1, 2, 2, device="cuda")
    switches = torch.zeros(1, 1, 2, 2, dtype=torch.uint8, device="cuda")
    views = [(t.data_ptr(), code, tuple(t.shape), t.stride()) for t, code in ((x, 0), (y, 0), (switches, 4))]
    with pytest.raises(RuntimeError, match=r"max_pool2d_with_switches on cuda:63: .*invalid device ordinal"):
        _C.max_pool2d_with_switches_cuda(*views, ((2, 2), (2, 2), (0, 0), (1, 1)), 63, 0)
    assert torch.cuda.current_device() == 0
    torch.ones(1, device="cuda").sum().item()  # the error is reported once, and the device goes on


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("elements", [2**31, 2**31 + 512])
def test_past_32_bit_offsets(layout, elements):
    """Both sides of 2**31 elements: the last images, which an index that wrapped would miss."""
    if torch.cuda.mem_get_info()[0] < 5 * elements:
        pytest.skip(f"needs {5 * elements / 2**30:.0f} GiB of free GPU memory")
    shape = (elements // 512, 8, 8, 8)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=memory_format).zero_()
    tail = make((4, 8, 8, 8), torch.bfloat16, values="normal")
    x[-4:] = tail
    y, switches = ops.max_pool2d_with_switches(x, 2)
    expected = expected_of(tail, (2,))
    assert_same((y[-4:], switches[-4:]), expected[:2])
    assert not y[:-4].any() and not switches[:-4].any()
    del x
    unpooled = ops.unpool_relu2d(y, switches, 2, output_size=(8, 8))
    assert_same((unpooled[-4:],), expected[2:3])
    assert not unpooled[:-4].any()


# ---- Steps of the deconvnet to pictures


def on_gpu(step, **options):
    """The op's result of a `cases.Step` whose tensors are moved to the GPU."""
    move = lambda x: None if x is None else x.cuda()  # noqa: E731
    frame = None if step.frame is None else (step.frame[0].cuda(), step.frame[1])
    tensors = (step.image, step.origin, step.switches, step.passes, step.scale)
    return deconv_step(
        step.signal.cuda(), step.weight.cuda(), step.step, *map(move, tensors), frame=frame, **options
    )


@pytest.mark.parametrize("dtype", samples.DTYPES, ids=str)
@pytest.mark.parametrize("conv", [*cases.CONVS, None], ids=str)
def test_deconv_step_equals_the_reference(dtype, conv):
    for pool, special, seed in itertools.product((*cases.STEP_POOLS, None), (False, True), range(6)):
        step = cases.drawn_step(seed, conv, pool, dtype, special=special)
        expected = step.expected()
        step.assert_close(on_gpu(step).cpu(), expected)
        strides = cases.strides_of(expected.shape, step.layout)
        out = torch.empty_strided(expected.shape, strides, dtype=dtype, device="cuda").fill_(torch.nan)
        assert on_gpu(step, out=out) is out
        step.assert_close(out.cpu(), expected)


@pytest.fixture
def zfnet():
    """ZFNet's first layer: arguments of the op on the GPU, and the result in float64."""
    generator = torch.Generator().manual_seed(0)
    pool, conv = ((3, 3), (2, 2), (1, 1), (1, 1)), ((7, 7), (2, 2), (1, 1), (1, 1))
    _, switches, _ = oracle.pool(torch.randn((2, 96, 110, 110), generator=generator), *pool, False)
    step = cases.Step(
        "ZFNet", samples.lay_out(torch.randn((16, 96, 33, 33), generator=generator), "channels_last"),
        torch.randn((96, 3, 7, 7), generator=generator),
        cases.StepParams(pool, conv, 1, (110, 110), (224, 224), False, True, "sum"),
        torch.arange(16) % 2, torch.randint(-8, 30, (16, 2), generator=generator),
        samples.lay_out(switches, "channels_last"), None, None, None, "contiguous",
    )  # fmt: skip
    tensors = [x.cuda() for x in (step.signal, step.weight, step.image, step.origin, step.switches)]
    return step, tensors


def run_step(step, tensors, out=None):
    signal, weight, image, origin, switches = tensors
    return deconv_step(signal, weight, step.step, image, origin, switches, out=out)


def test_deconv_step_of_a_network(zfnet):
    step, tensors = zfnet
    first = run_step(step, tensors)
    cases.assert_close(first.cpu(), step.expected(), step)
    for _ in range(50):
        assert torch.equal(run_step(step, tensors), first)
    tensors[1][5, 1, 2, 3] = torch.inf  # the careful loop
    step.weight[5, 1, 2, 3] = torch.inf
    cases.assert_close(run_step(step, tensors).cpu(), step.expected(), step)


def test_deconv_step_follows_the_current_stream(zfnet):
    step, tensors = zfnet
    expected, side = run_step(step, tensors), torch.cuda.Stream()
    for trial in range(100):
        late = [torch.zeros_like(x) for x in tensors]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(1_000_000)
            for x, fresh in zip(late, tensors, strict=True):
                x.copy_(fresh)
            got = run_step(step, late)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(got, expected), trial
        got.record_stream(torch.cuda.current_stream())


def test_deconv_step_in_a_graph_without_waiting(zfnet):
    step, tensors = zfnet
    out = torch.empty_like(run_step(step, tensors))
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_step(step, tensors, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        run_step(step, tensors, out)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_step(step, tensors, out)
    for replay in range(20):
        tensors[0].copy_(torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(replay)))
        tensors[1].mul_(-1)
        expected = run_step(step, tensors)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected), replay


def test_deconv_step_of_no_image_or_place_is_zero(zfnet):
    """That no byte outside is touched is for compute-sanitizer to say."""
    step, tensors = zfnet
    for position, value in ((2, 2), (2, -1), (2, 2**62), (3, 2**61), (3, -(2**61))):
        changed = list(tensors)
        changed[position] = torch.full_like(tensors[position], value)
        assert not run_step(step, changed).any()
    changed = [*tensors[:4], torch.randint(0, 256, tensors[4].shape, dtype=torch.uint8, device="cuda")]
    assert run_step(step, changed).isfinite().all()
