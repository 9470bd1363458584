"""conv_delta against its definition in float64: drawn geometries, borders, layouts, values; and its kept filters.

ZFCORE_FUZZ_EXAMPLES sets how many samples are drawn: twice as many.
"""

from __future__ import annotations

import random

import changes
import pytest
import torch
from changes import EXAMPLES, Sample, cast, close, same_bits
from running import present, running_on

from zfcore import reference
from zfcore.errors import ArgumentError, DtypeError, ShapeError
from zfcore.ops import _filters, use_backend
from zfcore.ops.conv_delta import ConvChange, Limits, Places, conv_delta, delta_filters, is_depthwise

CHANNELS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 96, 130, 257, 600)
OUTPUTS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 65, 130)
RECTIFIERS = (Limits(), Limits(), Limits(0.1), Limits(1.0), Limits(0.0, 0.7), Limits(0.25, 0.5))
MOST = 1e7  # multiply-adds of a sample, as the definition works them out


def draw_geometry(choose):
    """Channels, outputs, groups, batch, the map and the convolution of it."""
    while True:
        size = choose.randint(1, 20), choose.randint(1, 20)
        channels, outputs, groups = choose.choice(CHANNELS), choose.choice(OUTPUTS), 1
        kind = choose.choice(["conv", "conv", "conv", "grouped", "depthwise", "full", "full"])
        if kind == "grouped":
            groups = choose.choice([2, 3, 4])
            channels, outputs = channels * groups, outputs * groups
        elif kind == "depthwise":
            groups, outputs = channels, channels * choose.choice([1, 1, 2])
        after = None
        if kind == "full":
            window = size, (1, 1), (0, 0), (1, 1)
        else:
            kernel = choose.choice([(1, 1), (3, 3), (7, 7), (choose.randint(1, 7), choose.randint(1, 7))])
            dilation = choose.choice([1, 1, 1, 2, 3]), choose.choice([1, 1, 2])
            padding = tuple(choose.randint(0, d * (k - 1) + choose.choice([0, 1])) for k, d in zip(kernel, dilation))
            window = kernel, (choose.randint(1, 4), choose.randint(1, 4)), padding, dilation
            if choose.random() < 0.2:  # an even kernel pads one side more
                after = tuple(p + 1 for p in padding)
        above = changes.window_size(size, window, after)
        batch = choose.choice([1, 2, 3, 7, 13, 24, 25, 60])
        weights = channels // groups * outputs * window[0][0] * window[0][1]
        if min(above) >= 1 and channels <= 600 and batch * above[0] * above[1] * weights <= MOST:
            return channels, outputs, groups, batch, size, window, above


def draw(seed: int) -> Sample:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    channels, outputs, groups, batch, size, window, above = draw_geometry(choose)
    patch = [changes.draw_length(choose, n) for n in size]
    starts, corners, sizes = [], [], []
    for axis in (0, 1):
        begin = changes.draw_starts(choose, batch, size[axis] - patch[axis])
        spans = [changes.reached(i, patch[axis], axis, window, above[axis]) for i in begin]
        spans = [span or (choose.randint(0, above[axis] - 1),) * 2 for span in spans]
        need = max(1, max(end - first for first, end in spans))
        long = min(above[axis], need + choose.choice([0, 0, 1, 3]))
        corners.append([
            choose.randint(max(0, end - long), min(first, above[axis] - long)) for first, end in spans
        ])  # fmt: skip
        starts.append(begin)
        sizes.append(long)
    images = choose.choice([1, 2, 3])
    places = Places(
        torch.randint(0, images, (batch,)), torch.tensor(starts).T, torch.tensor(corners).T, tuple(sizes)
    )
    dtype = choose.choice([torch.float32, torch.float32, torch.float64])
    weight = torch.randn(outputs, channels // groups, *window[0]).to(dtype)
    scale = torch.randn(outputs).to(dtype) if choose.random() < 0.4 else None
    delta = changes.draw_values(choose, (batch, channels, *patch)).to(dtype)
    delta = changes.lay_out(delta, choose.choice(changes.LAYOUTS))
    clean = None
    if choose.random() < 0.6:
        spread = (weight[0].numel() ** 0.5) * (1 if scale is None else float(scale.abs().mean()))
        clean = (torch.randn(images, outputs, *above) * spread).to(dtype)
        clean = changes.lay_out(clean, choose.choice(changes.LAYOUTS[:4]))
    rectifier = choose.choice(RECTIFIERS)
    step = ConvChange(window, groups, size, above, Limits(rectifier.slope, rectifier.upper))
    return sample_of(delta, weight, step, places, clean, scale)


def sample_of(delta, weight, step, places, clean=None, scale=None) -> Sample:
    def call(sample, out, dtype):
        if dtype is None:
            filters = delta_filters(weight, scale, groups=step.groups)
            return conv_delta(sample.delta, filters, step, sample.places, clean, out)
        d, w, z, s = (cast(x, dtype) for x in (sample.delta, weight, clean, scale))
        return reference.conv_delta(d, w, step, sample.places, z, s)

    call.weight, call.clean, call.scale, call.step = weight, clean, scale, step
    return Sample(delta, places, call)


def about(sample) -> float:
    clean = sample.call.clean
    if clean is None or not clean.isfinite().any():
        return 0.0
    return float(clean[clean.isfinite()].abs().max())


def agrees(sample) -> None:
    close(sample.run(), sample.wanted(), sample.delta.dtype, about(sample))


CHUNKS = [range(i, min(i + 50, 2 * EXAMPLES)) for i in range(0, 2 * EXAMPLES, 50)]


@pytest.mark.parametrize("seeds", CHUNKS, ids=lambda r: str(r.start))
def test_equals_the_definition(seeds):
    for seed in seeds:
        agrees(draw(seed))


@pytest.mark.parametrize("name", present())
def test_every_backend_and_instruction_set_equals_the_definition(name):
    with running_on(name):
        for seed in range(10000, 10040):
            agrees(draw(seed))


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().double()


@pytest.mark.parametrize("name", present())
def test_narrow_filters_round_to_bf16_and_sum_in_float32(name):
    with running_on(name):
        drawn = [draw(seed) for seed in range(20000, 20080)]
        for sample in drawn:
            weight, clean, scale = sample.call.weight, sample.call.clean, sample.call.scale
            step = sample.call.step
            own = is_depthwise(weight.shape, step.groups)
            if own or sample.delta.dtype != torch.float32 or not sample.delta.isfinite().all():
                continue
            filters = delta_filters(weight, scale, groups=step.groups, precision="bf16")
            ours = conv_delta(sample.delta, filters, step, sample.places, clean)
            scaled = weight if scale is None else weight * scale[:, None, None, None]
            clean = None if clean is None else clean.double()
            wanted = reference.conv_delta(rounded(sample.delta), rounded(scaled), step, sample.places, clean)
            close(ours, wanted, torch.float32, about(sample))
        assert sum(sample.delta.dtype == torch.float32 for sample in drawn) > 30


def test_narrow_filters_of_another_dtype_are_refused():
    weight = torch.randn(3, 2, 1, 1, dtype=torch.float64)
    for precision in ("bf16", "tf32"):
        with pytest.raises(DtypeError, match=f"expected float32 to be rounded to {precision}"):
            delta_filters(weight, precision=precision)
    with pytest.raises(ArgumentError, match="precision: 'fp8'; expected one of"):
        delta_filters(weight, precision="fp8")


@pytest.mark.parametrize("name", present())
def test_tf32_is_exact_where_there_are_no_tensor_cores(name):
    with running_on(name):
        for seed in range(20100, 20110):
            sample = draw(seed)
            if sample.delta.dtype == torch.float32:
                call = sample.call
                filters = delta_filters(call.weight, call.scale, groups=call.step.groups, precision="tf32")
                assert same_bits(conv_delta(sample.delta, filters, call.step, sample.places, call.clean), sample.run())


def test_the_samples_reach_what_they_should():
    """A generator that never drew the hard cases would make the tests above say nothing."""
    samples = [draw(seed) for seed in range(200)]
    patches = [sample.delta for sample in samples]
    assert max(d.size(1) for d in patches) == 600 and min(d.size(1) for d in patches) == 1
    assert max(len(d) for d in patches) == 60
    assert sum(not d.any() for d in patches) > 5
    assert sum(d.shape[2:] == (1, 1) for d in patches) > 20
    assert sum(sample.call.clean is not None for sample in samples) > 80
    assert sum(sample.call.scale is not None for sample in samples) > 50
    assert sum(not d.is_contiguous(memory_format=torch.channels_last) for d in patches) > 60
    assert sum(bool(sample.wanted().any()) for sample in samples) > 130


@pytest.mark.parametrize("seed", range(12000, 12040))
def test_the_bits_do_not_depend_on_threads_batch_or_layout(seed):
    sample = draw(seed)
    changes.does_not_depend_on_batch_or_threads(sample, random.Random(seed))
    ours, delta = sample.run(), sample.delta
    for layout in ("contiguous", "channels_last", "sliced", "transposed", "stepped"):
        sample.delta = changes.lay_out(delta, layout)
        assert same_bits(sample.run(), ours), layout


@pytest.mark.parametrize("seed", range(12100, 12130))
def test_nothing_is_written_outside_of_the_result(seed):
    sample = draw(seed)
    before = sample.delta.clone()
    changes.writes_nothing_else(sample)
    assert torch.equal(sample.delta, before)


def test_a_result_that_is_given_is_returned():
    sample = draw(3)
    ours = sample.run()
    out = torch.full_like(ours, torch.nan)
    assert sample.run(out) is out and same_bits(out, ours)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("seeds", [range(i, i + 10) for i in range(12200, 12240, 10)], ids=lambda r: str(r.start))
def test_changes_that_are_not_finite(seeds, value):
    """No weight is zero here: what a zero times an infinity is, the definition leaves open."""
    for seed in seeds:
        sample = draw(seed)
        sample.delta = sample.delta.clone(memory_format=torch.contiguous_format)
        flat = sample.delta.view(-1)
        flat[torch.randint(0, len(flat), (1 + len(flat) // 50,))] = value
        agrees(sample)


@pytest.mark.parametrize("seeds", [range(i, i + 10) for i in range(12300, 12340, 10)], ids=lambda r: str(r.start))
def test_clean_maps_that_are_not_finite(seeds):
    found = 0
    for seed in seeds:
        sample = draw(seed)
        if (clean := sample.call.clean) is None:
            continue
        for value in (torch.inf, -torch.inf, torch.nan, -0.0):
            clean[tuple(torch.randint(0, n, (1 + clean.numel() // 20,)) for n in clean.shape)] = value
        agrees(sample)
        found += 1
    assert found


def test_one_patch_that_is_not_finite_leaves_the_others_alone():
    for seed in range(12400, 12420):
        sample = draw(seed)
        sample.delta = sample.delta.clone(memory_format=torch.contiguous_format)
        ours = sample.run()
        bad = len(ours) // 2
        sample.delta[bad] = torch.nan
        others = [i for i in range(len(ours)) if i != bad]
        assert same_bits(sample.run()[others], ours[others])


def test_a_change_of_nothing_gives_nothing():
    for seed in range(12500, 12520):
        sample = draw(seed)
        for zero in (0.0, -0.0):
            sample.delta = torch.full_like(sample.delta, zero)
            assert not sample.run().any()


# ---- One sample whose numbers are known, for what follows


class Plain:
    """4 patches of 4 x 5 in two images' maps of 12 x 11, under filters of 3 x 3: every field may be set."""

    def __init__(self):
        torch.manual_seed(0)
        self.delta, self.weight, self.scale, self.groups = torch.randn(4, 16, 4, 5), torch.randn(24, 16, 3, 3), None, 1
        self.clean, self.out, self.filters = torch.randn(2, 24, 12, 11), None, None
        self.window = ((3, 3), (1, 1), (1, 1), (1, 1))
        self.map = self.above = (12, 11)
        self.image = torch.tensor([0, 1, 1, 0])
        self.origin = torch.tensor([[0, 0], [8, 6], [3, 2], [0, 6]])
        self.out_origin, self.size = torch.tensor([[0, 0], [6, 4], [2, 1], [0, 4]]), (6, 7)

    def step(self):
        return ConvChange(self.window, self.groups, self.map, self.above)

    def places(self):
        return Places(self.image, self.origin, self.out_origin, self.size)

    def run(self):
        filters = self.filters or delta_filters(self.weight, self.scale, groups=self.groups)
        return conv_delta(self.delta, filters, self.step(), self.places(), self.clean, self.out)

    def wanted(self):
        parts = [cast(x, torch.float64) for x in (self.delta, self.weight, self.clean, self.scale)]
        return reference.conv_delta(*parts[:2], self.step(), self.places(), *parts[2:])


@pytest.fixture
def plain():
    sample = Plain()
    close(sample.run(), sample.wanted(), torch.float32, 5.0)
    return sample


# ---- The kept filters


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: w.data.mul_(2),
        lambda w: w.numpy().__setitem__((23, 15, 2, 2), 3.0),
        lambda w: w.data.view(torch.int32).view(-1).__setitem__(0, 5),
        lambda w: w.set_(torch.ones(24, 16, 3, 3)),
    ],
    ids=["in place", "through data", "through numpy", "one word", "other memory"],
)
def test_a_change_of_the_weight_is_noticed(plain, change):
    before = plain.run()
    assert same_bits(plain.run(), before)
    change(plain.weight)
    after = plain.run()
    assert not torch.equal(after, before)
    close(after, plain.wanted(), torch.float32, 5.0)


def test_a_change_of_the_scale_is_noticed(plain):
    plain.scale = torch.ones(24)
    before = plain.run()
    plain.scale.data[3] = 2
    assert not torch.equal(plain.run(), before)
    close(plain.run(), plain.wanted(), torch.float32, 5.0)


def test_filters_are_kept_while_the_weight_lives(plain):
    first = delta_filters(plain.weight)
    assert delta_filters(plain.weight).packed is first.packed
    scaled = delta_filters(plain.weight, torch.ones(24))
    assert scaled.packed is not first.packed and torch.equal(scaled.packed, first.packed)
    kept, key = len(_filters._kept), id(plain.weight)
    assert key in _filters._kept
    plain.weight = None
    assert len(_filters._kept) == kept - 1 and key not in _filters._kept


def test_filters_stay_good_when_the_weight_has_gone(plain):
    wanted = plain.run()
    plain.filters = delta_filters(plain.weight)
    plain.weight = None
    assert same_bits(plain.run(), wanted)


def test_weights_of_any_layout_pack_alike(plain):
    first = delta_filters(plain.weight).packed
    for weight in (
        plain.weight.contiguous(memory_format=torch.channels_last),
        torch.stack([plain.weight, plain.weight])[1],
        plain.weight.transpose(0, 1).contiguous().transpose(0, 1),
        torch.nn.Parameter(plain.weight.clone()),
    ):
        assert torch.equal(delta_filters(weight).packed, first)


def test_a_full_layers_matrix_is_a_filter_as_large_as_the_map():
    torch.manual_seed(0)
    matrix, delta = torch.randn(10, 6 * 4 * 5), torch.randn(3, 6, 2, 5)
    step = ConvChange(((4, 5), (1, 1), (0, 0), (1, 1)), 1, (4, 5), (1, 1))
    rows = torch.tensor([[0, 0], [2, 0], [1, 0]])
    places = Places(torch.zeros(3, dtype=torch.int64), rows, torch.zeros_like(rows), (1, 1))
    ours = conv_delta(delta, delta_filters(matrix, shape=(10, 6, 4, 5)), step, places)
    whole = torch.zeros(3, 6, 4, 5)
    for i, row in enumerate(rows[:, 0].tolist()):
        whole[i, :, row : row + 2] = delta[i]
    close(ours[:, :, 0, 0], whole.flatten(1).double() @ matrix.double().T, torch.float32)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_filters_say_whether_they_are_finite(backend):
    with use_backend(backend):
        for value in (torch.inf, -torch.inf, torch.nan):
            for place in (0, 700, 24 * 17 * 9 - 1):
                weight = torch.randn(24, 17, 3, 3)
                assert delta_filters(weight).finite
                weight.view(-1)[place] = value
                assert not delta_filters(weight).finite
            scale = torch.ones(24)
            scale[23] = value
            assert not delta_filters(torch.randn(24, 17, 3, 3), scale).finite


# ---- What is refused


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(origin=torch.tensor([[0, 0], [8, 6], [3, 2], [0, 7]])), ValueError, "patch 3 is not inside its map"),
        (dict(origin=torch.tensor([[-1, 0], [8, 6], [3, 2], [0, 6]])), ValueError, "patch 0 is not inside its map"),
        (dict(origin=torch.full((4, 2), 2**62)), ValueError, "patch 0 is not inside its map"),
        (dict(out_origin=torch.tensor([[0, 0], [7, 4], [2, 1], [0, 4]])), ValueError, "patch 1"),
        (dict(out_origin=torch.tensor([[0, 0], [6, 4], [2, -1], [0, 4]])), ValueError, "patch 2"),
        (dict(out_origin=torch.full((4, 2), 2**62)), ValueError, "patch 0"),
        (dict(out_origin=torch.tensor([[0, 0], [6, 4], [3, 1], [0, 4]])), ValueError, "reaches outputs outside"),
        (dict(size=(5, 7)), ValueError, "patch 1 .* reaches outputs outside of its result"),
        (dict(size=(6, 6)), ValueError, "reaches outputs outside of its result"),
        (dict(size=(13, 11)), ValueError, "patch 0"),
        (dict(image=torch.tensor([0, 2, 1, 0])), ShapeError, "image: expected 0 to 1"),
        (dict(image=torch.tensor([0, -1, 1, 0])), ShapeError, "image: expected 0 to 1"),
        (dict(image=torch.zeros(3, dtype=torch.int64)), ShapeError, r"image of .*expected int64 \[4\]"),
        (dict(image=torch.zeros(4)), ShapeError, r"image of torch.float32 .*expected int64 \[4\]"),
        (dict(origin=torch.zeros(4, 3, dtype=torch.int64)), ShapeError, r"origin of .*expected int64 \[4, 2\]"),
        (dict(out_origin=torch.zeros(4, 2, dtype=torch.int32)), ShapeError, r"out_origin of torch.int32"),
        (dict(delta=torch.randn(4, 16, 4, 5).half()), DtypeError, "delta of torch.float16"),
        (dict(delta=torch.randn(4, 16, 20)), DtypeError, r"expected float32 or float64 \[B, C, h, w\]"),
        (dict(delta=torch.randn(4, 15, 4, 5)), ShapeError, "they do not take 15 channels"),
        (dict(weight=torch.randn(24, 16, 3, 2)), ShapeError, r"filters of \(24, 16, 3, 2\)"),
        (dict(weight=torch.randn(24, 8, 3, 3)), ShapeError, "they do not take 16 channels"),
        (dict(weight=torch.randn(25, 8, 3, 3), groups=2), ShapeError, "in 2 groups"),
        (dict(weight=torch.randn(24, 16, 3, 3).double()), ShapeError, "expected the changes' torch.float32"),
        (dict(clean=torch.randn(2, 24, 12, 12)), ShapeError, r"expected \[N, 24, \*\(12, 11\)\]"),
        (dict(clean=torch.randn(2, 23, 12, 11)), ShapeError, r"expected \[N, 24, \*\(12, 11\)\]"),
        (dict(clean=torch.randn(2, 24, 12, 11).double()), ShapeError, "maps of torch.float64"),
        (dict(clean=torch.randn(24, 12, 11)), ShapeError, "maps of torch.float32"),
        (dict(clean=torch.randn(0, 24, 12, 11)), ShapeError, "image: expected"),
        (dict(out=torch.empty(4, 24, 6, 6)), ShapeError, r"expected torch.float32 \(4, 24, 6, 7\), channels last"),
        (dict(out=torch.empty(3, 24, 6, 7)), ShapeError, "channels last"),
        (dict(out=torch.empty(4, 24, 6, 7)), ShapeError, "channels last"),
        (dict(out=torch.empty(4, 6, 7, 24).double().permute(0, 3, 1, 2)), ShapeError, "expected torch.float32"),
    ],
)  # fmt: skip
def test_refusals(plain, change, error, words):
    for name, value in change.items():
        setattr(plain, name, value)
    with pytest.raises(error, match=words):
        plain.run()


def test_filters_that_another_backend_made_ready_are_packed_for_the_call(plain):
    want = plain.run()
    with use_backend("reference"):
        plain.filters = delta_filters(plain.weight)
    assert torch.equal(plain.run(), want)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_empty_batch(plain, backend):
    none = slice(0, 0)
    for name in ("delta", "image", "origin", "out_origin"):
        setattr(plain, name, getattr(plain, name)[none])
    with use_backend(backend):
        for plain.clean in (plain.clean, None):
            ours = plain.run()
            assert ours.shape == (0, 24, 6, 7) and ours.dtype == torch.float32


def test_gradients_are_not_asked_for(plain):
    plain.weight.requires_grad_()
    assert not plain.run().requires_grad
