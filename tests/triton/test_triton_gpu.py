"""The Triton kernels on a GPU, through zfcore.ops and the engine. Without one every test is skipped, and says why."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from zfcore import backends, deconv_project, iter_projections, occlusion_map, ops, reference, use_backend
from zfcore.engine.sweep import Sweep
from zfcore.ops.conv_boxes import conv_boxes
from zfcore.ops.conv_delta import conv_delta, delta_filters
from zfcore.ops.lrn_delta import lrn_delta
from zfcore.ops.pointwise_delta import pointwise_delta
from zfcore.ops.pool_delta import pool_delta
from zfcore.ops.relu_delta import relu_delta
from zfcore.reference._params import ConvChange, Limits, Lrn, Places, StepParams

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

import oracle  # noqa: E402
import samples  # noqa: E402
from steps import Sample, close, too_large_for_half  # noqa: E402

WHY = "" if torch.cuda.is_available() else "torch finds no usable CUDA device"
WHY = WHY or backends()["triton"].reason
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY), reason=WHY or "a GPU is here")]


def patches(channels, units, groups, window, seed, size=(27, 27), patch=(9, 11), batch=200):
    """On the CPU: changes, filters, clean outputs, the step and the places."""
    generator = torch.Generator().manual_seed(seed)
    kernel, stride, padding, dilation = window
    above = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, *window)]
    origin = torch.stack([torch.randint(0, n - m + 1, (batch,), generator=generator) for n, m in zip(size, patch)], 1)
    places = Places(torch.randint(0, 3, (batch,), generator=generator), origin, torch.zeros_like(origin), tuple(above))
    return (
        torch.randn(batch, channels, *patch, generator=generator),
        torch.randn(units, channels // groups, *kernel, generator=generator),
        torch.randn(3, units, *above, generator=generator),
        ConvChange(window, groups, size, tuple(above), Limits(0.1)),
        places,
    )


def on_gpu(places):
    return Places(*(x.cuda() for x in places[:3]), places.size)


GEOMETRIES = [
    (96, 256, 1, ((5, 5), (2, 2), (0, 0), (1, 1))),
    (3, 96, 1, ((7, 7), (2, 2), (1, 1), (1, 1))),
    (64, 96, 2, ((3, 3), (1, 1), (1, 1), (1, 1))),
    (20, 33, 1, ((3, 2), (1, 2), (1, 0), (2, 3))),
    (50, 50, 50, ((3, 3), (2, 1), (1, 1), (1, 2))),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv_delta(geometry):
    delta, weight, clean, step, places = patches(*geometry, seed=0)
    expected = reference.conv_delta(delta.double(), weight.double(), step, places, clean.double())
    filters = delta_filters(weight.cuda(), None, groups=step.groups)
    assert filters.packed is not None
    got = conv_delta(delta.cuda(), filters, step, on_gpu(places), clean.cuda())
    assert (got.cpu() - expected).abs().max() < 1e-5 * expected.abs().max()
    for _ in range(50):  # the same bits every time, and for a part of the batch
        assert torch.equal(conv_delta(delta.cuda(), filters, step, on_gpu(places), clean.cuda()), got)
    part = Places(*(x[50:80] for x in on_gpu(places)[:3]), places.size)
    assert torch.equal(conv_delta(delta[50:80].cuda(), filters, step, part, clean.cuda()), got[50:80])


@pytest.mark.parametrize("precision, tolerance", [("tf32", 2e-3), ("bf16", 1e-5)])
@pytest.mark.parametrize("geometry", GEOMETRIES[:4], ids=str)
def test_conv_delta_on_tensor_cores(geometry, precision, tolerance):
    """Products of bf16 are exact in float32; TF32 leaves 11 bits of a factor."""
    delta, weight, clean, step, places = patches(*geometry, seed=1)
    if precision == "bf16":
        delta, weight = delta.bfloat16().float(), weight.bfloat16().float()
    expected = reference.conv_delta(delta.double(), weight.double(), step, places, clean.double())
    filters = delta_filters(weight.cuda(), None, groups=step.groups, precision=precision)
    got = conv_delta(delta.cuda(), filters, step, on_gpu(places), clean.cuda())
    assert (got.cpu() - expected).abs().max() < tolerance * expected.abs().max()
    if precision == "tf32" and geometry[2] == 1:
        exact = conv_delta(delta.cuda(), delta_filters(weight.cuda(), None), step, on_gpu(places), clean.cuda())
        assert not torch.equal(got, exact)


@pytest.mark.parametrize("flag", ["ieee", "tf32"])
def test_exact_is_exact_whatever_torch_allows(flag):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, flag
    try:
        for size in ((6, 6), (1, 1)):  # full layers, which the library may multiply
            window = (size, (1, 1), (0, 0), (1, 1))
            delta, weight, clean, step, places = patches(256, 300, 1, window, 3, size=size, patch=size)
            expected = reference.conv_delta(delta.double(), weight.double(), step, places, clean.double())
            filters = delta_filters(weight.cuda())
            got = conv_delta(delta.cuda(), filters, step, on_gpu(places), clean.cuda())
            assert (got.cpu() - expected).abs().max() < 1e-5 * expected.abs().max()
    finally:
        matmul.fp32_precision = before


def boxes_on(places, patch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = places.origin + torch.randint(-2, 4, places.origin.shape, generator=generator)
    return torch.cat((first, first + torch.randint(0, max(patch) + 2, first.shape, generator=generator)), 1)


@pytest.mark.parametrize("precision, tolerance", [("exact", 1e-5), ("tf32", 2e-3), ("bf16", 1e-5)])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv_boxes(geometry, precision, tolerance):
    delta, weight, clean, step, places = patches(*geometry, seed=4)
    patch, boxes = tuple(delta.shape[2:]), boxes_on(places, delta.shape[2:])
    change = torch.randn(3, delta.size(1), *step.map)
    if precision == "bf16":
        change, weight = change.bfloat16().float(), weight.bfloat16().float()
    expected = reference.conv_boxes(change.double(), boxes, patch, weight.double(), step, places, clean.double())
    filters = delta_filters(weight.cuda(), None, groups=step.groups, precision=precision)
    got = conv_boxes(change.cuda(), boxes.cuda(), patch, filters, step, on_gpu(places), clean.cuda())
    assert (got.cpu() - expected).abs().max() < tolerance * expected.abs().max()


@dataclass
class Call:
    """An op on tensors of a GPU, of which `inputs` may be written over."""

    run: Callable[[], torch.Tensor]
    inputs: list[torch.Tensor]

    def draw(self):
        for x in self.inputs:
            x.copy_(torch.randn_like(x))


def product(geometry, precision="exact", boxed=False, size=(27, 27), patch=(9, 11)) -> Call:
    delta, weight, clean, step, places = patches(*geometry, seed=5, size=size, patch=patch)
    clean, filters = clean.cuda(), delta_filters(weight.cuda(), None, groups=step.groups, precision=precision)
    if boxed:
        change, boxes = torch.randn(3, delta.size(1), *size).cuda(), boxes_on(places, patch).cuda()
        places = on_gpu(places)
        return Call(lambda: conv_boxes(change, boxes, patch, filters, step, places, clean), [change, clean])
    delta, places = delta.cuda(), on_gpu(places)
    return Call(lambda: conv_delta(delta, filters, step, places, clean), [delta, clean])


def pointwise(name: str) -> Call:
    window = ((3, 3), (2, 2), (1, 1), (1, 1))
    x = torch.randn(3, 96, 27, 27, device="cuda")
    delta, _, _, _, places = patches(96, 1, 1, window, seed=6)
    delta, places = delta.cuda(), on_gpu(places)
    own = places._replace(out_origin=places.origin, size=tuple(delta.shape[2:]))
    lrn = Lrn(5, 1e-4, 0.75, 2.0)
    if name == "pool_delta":
        return Call(lambda: pool_delta(delta, x, F.max_pool2d(x, *window), window, places), [delta, x])
    if name == "lrn_delta":
        return Call(lambda: lrn_delta(delta, x, F.local_response_norm(x, *lrn), lrn, own), [delta, x])
    if name == "pointwise_delta":
        return Call(lambda: pointwise_delta(delta, x, ("gelu", 0.0, 0.0), own), [delta, x])
    return Call(lambda: relu_delta(delta, x, Limits(0.1), own), [delta, x])


def pooling(layout: torch.memory_format, dtype=torch.float32) -> Call:
    x = torch.randn(3, 96, 27, 27, device="cuda").to(dtype=dtype, memory_format=layout)

    def run():
        with use_backend("triton"):
            y, switches = ops.max_pool2d_with_switches(x, 3, 2, 1)
        return torch.stack((y, switches.to(y.dtype)))

    return Call(run, [x])


STEPS = {
    "wide": (((3, 3), (2, 2), (1, 1), (1, 1)), ((5, 5), (2, 2), (0, 0), (1, 1)), 256, 96),
    "no pool": (None, ((3, 3), (1, 1), (1, 1), (1, 1)), 384, 256),
    "one after the other": (((3, 3), (1, 1), (1, 1), (1, 1)), ((1, 1), (1, 1), (0, 0), (1, 1)), 64, 48),
    "odd": (((2, 2), (2, 2), (0, 0), (1, 1)), ((3, 2), (1, 2), (1, 0), (2, 1)), 33, 7),
}


def drawn_step(name: str, dtype=torch.float32, overlap="sum", batch=40) -> Sample:
    """On the CPU: patches that reach over the edges of their maps."""
    pool, conv, units, channels = STEPS[name]
    generator = torch.Generator().manual_seed(8)
    maps, switches = torch.randn(3, units, 15, 17, generator=generator).round(), None
    own = maps.shape[2:]
    if pool is not None:
        values, switches = ops.max_pool2d_with_switches(maps, *pool)
        own = values.shape[2:]
    below = tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in zip((15, 17), *conv))
    return Sample(
        torch.randn(batch, units, 5, 4, generator=generator).to(dtype),
        torch.randn(units, channels, *conv[0], generator=generator).to(dtype),
        StepParams(pool, conv, 1, (15, 17), below, False, True, overlap),
        torch.randint(0, 3, (batch,), generator=generator),
        torch.stack([torch.randint(-2, n - 1, (batch,), generator=generator) for n in own], 1),
        switches,
        torch.rand(3, units, 15, 17, generator=generator) < 0.7,
        None,
        None,
    )


def step(name: str) -> Call:
    sample = drawn_step(name).to("cuda")
    return Call(sample.run, [sample.signal, sample.weight])


FULL = (256, 300, 1, ((6, 6), (1, 1), (0, 0), (1, 1)))
CALLS = {
    **{f"conv_delta {precision}": lambda p=precision: product(GEOMETRIES[0], p) for precision in ("exact", "tf32", "bf16")},
    **{f"conv_boxes {p}": lambda p=p: product(GEOMETRIES[1], p, boxed=True) for p in ("exact", "tf32", "bf16")},
    "conv_delta depthwise": lambda: product(GEOMETRIES[4]),
    "conv_delta full": lambda: product(FULL, size=(6, 6), patch=(6, 6)),
    **{name: lambda name=name: pointwise(name) for name in ("pool_delta", "lrn_delta", "relu_delta", "pointwise_delta")},
    **{f"deconv_step {name}": lambda name=name: step(name) for name in STEPS},
    "max_pool2d_with_switches": lambda: pooling(torch.contiguous_format),
    "max_pool2d_with_switches channels last": lambda: pooling(torch.channels_last, torch.bfloat16),
}


@pytest.fixture(params=CALLS)
def call(request) -> Call:
    found = CALLS[request.param]()
    found.run()  # loads the kernels
    torch.cuda.synchronize()
    return found


def test_the_same_bits_every_time(call):
    want = call.run()
    for _ in range(250):
        assert torch.equal(call.run(), want)


def test_nothing_waits_for_the_gpu(call):
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_reads_its_inputs_anew(call):
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        call.run()
    side.synchronize()
    with torch.cuda.graph(graph):
        result = call.run()
    for _ in range(20):
        call.draw()
        graph.replay()
        assert torch.equal(result, call.run())


def test_on_a_stream_that_is_late(call):
    """Inputs that are written on a side stream, late: an op on another stream would read what was there before."""
    side, kept = torch.cuda.Stream(), [x.clone() for x in call.inputs]
    torch.cuda.synchronize()
    for _ in range(100):
        call.draw()
        want, drawn = call.run(), [x.clone() for x in call.inputs]
        for x, old in zip(call.inputs, kept, strict=True):
            x.copy_(old)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000)
            for x, new in zip(call.inputs, drawn, strict=True):
                x.copy_(new)
            got = call.run()
        side.synchronize()
        assert torch.equal(got, want)


@pytest.mark.parametrize("overlap", ["sum", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_deconv_step(name, dtype, overlap):
    sample = drawn_step(name, dtype, overlap, batch=40 if dtype != torch.float64 else 4)
    expected = sample.run(reference.deconv_step, torch.float64)
    close(sample.to("cuda").run().cpu(), expected, dtype)


def test_zeros_of_a_step_leave_filters_out():
    sample = drawn_step("wide", batch=4)
    sample.weight[3, 5, 1, 1], sample.weight[7, 2, 0, 0] = torch.inf, torch.nan
    close(sample.to("cuda").run().cpu(), sample.run(reference.deconv_step, torch.float64), torch.float32)


def test_sums_of_half_values_keep_their_bits():
    """They are rounded once, at the end: what windows add up may be too large, or too fine, for a half type."""
    sample = too_large_for_half()
    close(sample.to("cuda").run().cpu(), sample.run(reference.deconv_step, torch.float64), torch.float16)
    sample = drawn_step("wide", torch.bfloat16)
    wanted = sample.run(reference.deconv_step, torch.float64)
    close(sample.to("cuda").run().cpu(), wanted, torch.bfloat16, {torch.bfloat16: 4.1e-3})  # half a unit of the last place


@pytest.mark.parametrize("options", [{"crop": True}, {"rule": "guided", "overlap": "last"}, {"positions": "all"}], ids=str)
def test_projections(options):
    """The engine on the GPU, and the reference's in float64; on the way down nothing waits."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 7, 2, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 2, 1),
        torch.nn.Conv2d(32, 48, 5, 2),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 2, 1),
        torch.nn.Conv2d(48, 64, 3, padding=1),
    ).eval()
    images = torch.randn(2, 3, 80, 80)
    with use_backend("reference"):
        expected = deconv_project(model.double(), images.double(), "6", list(range(8)), **options)
    model, images, parts = model.float().cuda(), images.cuda(), []
    try:
        for part in iter_projections(model, images, "6", list(range(8)), batch_size=4, **options):
            torch.cuda.set_sync_debug_mode("default")
            parts.append(part.pixels.cpu())
            torch.cuda.set_sync_debug_mode("error")  # after the first batch, which reads the network and goes up
    finally:
        torch.cuda.set_sync_debug_mode("default")
    got = torch.cat(parts).double().reshape(expected.pixels.shape)
    assert len(parts) == 4 and (got - expected.pixels).abs().max() <= 1e-5 * expected.pixels.abs().max()


def test_pool_delta():
    window = ((3, 3), (2, 2), (1, 1), (1, 1))
    x = torch.randn(3, 96, 27, 27)
    y = F.max_pool2d(x, *window)
    delta, _, _, _, places = patches(96, 1, 1, window, seed=2)
    places = places._replace(size=tuple(y.shape[2:]))
    expected = reference.pool_delta(delta, x, y, window, places)
    got = pool_delta(delta.cuda(), x.cuda(), y.cuda(), window, on_gpu(places))
    assert torch.allclose(got.cpu(), expected, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", samples.DTYPES, ids=str)
def test_max_pool2d_with_switches(dtype, layout):
    """Special values and ties. Few windows, since each is compiled first; the interpreter has all kinds."""
    cases = [(48, (3, 2, 1, 1, True))]
    if dtype == torch.float32:
        cases += [(5, (3, 2, 1, 1, True)), (48, ((5, 4), 2, (2, 1), (1, 2)))]
    for channels, pool in cases:
        x = samples.draw((2, channels, 27, 30), dtype, "special", torch.Generator().manual_seed(0))
        own = samples.lay_out(x.cuda(), layout)
        with use_backend("triton"):
            got = ops.max_pool2d_with_switches(own, *pool)
        twins = ops.max_pool2d_with_switches(own, *pool)
        for ours, twin, wanted in zip(got, twins, reference.max_pool2d_with_switches(x, *pool), strict=True):
            assert oracle.same(ours.cpu(), wanted) and oracle.same(twin.cpu(), wanted), (channels, pool)
            assert ours.stride() == twin.stride(), (channels, pool)


def test_max_pool2d_with_switches_of_many_images():
    """More than one launch takes."""
    x = torch.randn(70_000, 2, 4, 4, device="cuda")
    with use_backend("triton"):
        y, switches = ops.max_pool2d_with_switches(x, 2)
    wanted = reference.max_pool2d_with_switches(x, 2)
    assert torch.equal(y, wanted[0]) and torch.equal(switches, wanted[1])


def occluded_network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 5, 2, padding=1),
        torch.nn.ReLU(),
        torch.nn.LocalResponseNorm(5),
        torch.nn.MaxPool2d(3, 2),
        torch.nn.Conv2d(32, 32, 3, padding=1, groups=32),
        torch.nn.Conv2d(32, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(64 * 15 * 15, 10),
    )
    return model.eval(), torch.randn(2, 3, 64, 64)


@pytest.fixture
def engine(monkeypatch):
    """How many images each run of the engine took."""
    seen, run = [], Sweep.run
    monkeypatch.setattr(Sweep, "run", lambda self, images, *rest: seen.append(len(images)) or run(self, images, *rest))
    return seen


@pytest.mark.parametrize("precision, tolerance", [("exact", 1e-5), ("tf32", 2e-3), ("bf16", 2e-2)])
def test_occlusion_map(engine, precision, tolerance):
    """The engine on the GPU, and a forward in float64 for each position."""
    model, images = occluded_network()
    options = {"box": 16, "stride": 8, "score": "logit", "feature": ("5", 3)}
    got = occlusion_map(model.cuda(), images.cuda(), precision=precision, **options)
    assert engine
    wide = copy.deepcopy(model).double()
    scores, totals = torch.empty_like(got.scores, dtype=torch.float64), torch.empty_like(got.scores, dtype=torch.float64)
    for row, line in enumerate(got.boxes.tolist()):
        for column, (y0, x0, y1, x1) in enumerate(line):
            painted = images.double().cuda()
            painted[:, :, y0:y1, x0:x1] = 0
            with torch.no_grad():
                totals[:, row, column] = wide[:6](painted)[:, 3].sum((1, 2))
                scores[:, row, column] = wide(painted).gather(1, got.targets[:, None])[:, 0]
    for ours, wanted in ((got.scores, scores), (got.activation, totals)):
        assert (ours.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("precision", ["exact", "tf32", "bf16"])
def test_occlusion_map_by_forwards(engine, precision):
    """What cannot be read: TF32 and autocast are then torch's, for the call."""

    class Unread(torch.nn.Module):
        def forward(self, x):
            return x * 1.0 if float(x.flatten()[0]) > -1e9 else x

    model, images = occluded_network()
    model = torch.nn.Sequential(Unread(), *model).cuda()
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with pytest.warns(UserWarning, match="plain forwards run this network"):
        got = occlusion_map(model, images.cuda(), box=16, stride=24, score="logit", precision=precision)
    assert not engine and before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    want = occlusion_map(model[1:].double(), images.double().cuda(), box=16, stride=24, score="logit", targets=got.targets)
    tolerance = {"exact": 1e-5, "tf32": 2e-3, "bf16": 2e-2}[precision]
    assert (got.scores.double() - want.scores).abs().max() <= tolerance * want.scores.abs().max()


@pytest.mark.parametrize("feature", [None, ("5", None)])
def test_between_batches_nothing_waits_for_the_gpu(monkeypatch, feature):
    model, images = occluded_network()
    run, batches = Sweep.run, []

    def guarded(self, *arguments):
        for found in run(self, *arguments):
            batches.append(len(found[0]))
            torch.cuda.set_sync_debug_mode("error")
            yield found
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Sweep, "run", guarded)
    try:
        got = occlusion_map(model.cuda(), images.cuda(), box=16, stride=8, feature=feature, batch_size=20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(batches) > 2 and got.scores.isfinite().all()
