"""pool_delta, lrn_delta, relu_delta and pointwise_delta against their definitions in float64: drawn shapes, borders,
layouts, values.

ZFCORE_FUZZ_EXAMPLES sets how many samples of each op are drawn.
"""

from __future__ import annotations

import random

import changes
import pytest
import torch
import torch.nn.functional as F
from changes import EXAMPLES, Sample, cast, close, same_bits
from running import present, running_on

from zfcore import reference
from zfcore.errors import ArgumentError, DtypeError, ShapeError
from zfcore.ops import use_backend
from zfcore.ops.lrn_delta import lrn_delta
from zfcore.ops.pointwise_delta import pointwise_delta
from zfcore.ops.pool_delta import pool_delta
from zfcore.ops.relu_delta import relu_delta
from zfcore.reference._params import Limits, Lrn, Places
from zfcore.reference.pointwise_delta import FUNCTIONS

CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 130, 600)
RECTIFIERS = (Limits(), Limits(0.1), Limits(1.0), Limits(0.0, 0.7), Limits(0.25, 0.5))
SPECIAL = (torch.inf, -torch.inf, torch.nan, -0.0)


def draw_shapes(choose):
    """The maps [N, C, H, W] and the patches [B, C, h, w] of a sample, and where these begin."""
    while True:
        size = choose.randint(1, 16), choose.randint(1, 16)
        images, channels, batch = choose.choice([1, 2, 3]), choose.choice(CHANNELS), choose.choice([1, 2, 7, 25, 60])
        if max(images, batch) * channels * size[0] * size[1] <= 300_000:
            break
    patch = tuple(changes.draw_length(choose, n) for n in size)
    starts = [changes.draw_starts(choose, batch, n - h) for n, h in zip(size, patch, strict=True)]
    return (images, channels, *size), (batch, channels, *patch), torch.tensor(starts).T


def draw_maps(choose, shape, patches, special):
    """Clean maps, and their changes, in any layout and either precision."""
    dtype = choose.choice([torch.float32, torch.float32, torch.float64])
    before = torch.randn(shape).to(dtype)
    if choose.random() < 0.3:
        before = before.round()  # ties, and minus zeros
    delta = changes.draw_values(choose, patches).to(dtype)
    if special:
        for x in (before, delta):
            for value in SPECIAL:
                x[tuple(torch.randint(0, n, (1 + x.numel() // 30,)) for n in x.shape)] = value
    return changes.lay_out(before, choose.choice(changes.LAYOUTS[:4])), changes.lay_out(delta, choose.choice(changes.LAYOUTS))


def draw_pool(seed: int, special: bool = False) -> Sample:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        shape, patches, origin = draw_shapes(choose)
        kernel = choose.choice([(1, 1), (2, 2), (3, 3), (3, 3), (choose.randint(1, 5), choose.randint(1, 5)), (15, 15)])
        dilation = choose.choice([1, 1, 2]), choose.choice([1, 1, 1, 3])
        padding = tuple(choose.randint(0, k // 2) for k in kernel)
        window = kernel, (choose.randint(1, 4), choose.randint(1, 4)), padding, dilation
        if min(changes.window_size(shape[2:], window)) >= 1:
            break
    before, delta = draw_maps(choose, shape, patches, special)
    after = F.max_pool2d(before.double(), *window, choose.random() < 0.4).to(before.dtype)
    above = tuple(after.shape[2:])
    size = tuple(choose.choice([n, choose.randint(1, n)]) for n in above)
    corner = torch.stack([torch.randint(0, n - s + 1, (len(delta),)) for n, s in zip(above, size, strict=True)], 1)
    image = torch.randint(0, len(before), (len(delta),))

    def call(sample, out, dtype):
        if dtype is None:
            return pool_delta(sample.delta, before, after, window, sample.places, out)
        maps = (cast(x, dtype) for x in (sample.delta, before, after))
        return reference.pool_delta(*maps, window, sample.places)

    call.clean = before
    return Sample(delta, Places(image, origin, corner, size), call)


def draw_lrn(seed: int, special: bool = False) -> Sample:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    shape, patches, origin = draw_shapes(choose)
    before, delta = draw_maps(choose, shape, patches, special)
    beta = choose.choice([0.75, 0.75, 0.5, 1.0, 0.6, 2.0])
    lrn = Lrn(choose.choice([1, 2, 3, 4, 5, 5, 9, 20]), choose.choice([1e-4, 0.1, 2.0]), beta, choose.choice([1.0, 2.0]))
    after = F.local_response_norm(before.double(), *lrn).to(before.dtype)
    image = torch.randint(0, len(before), (len(delta),))

    def call(sample, out, dtype):
        if dtype is None:
            return lrn_delta(sample.delta, before, after, lrn, sample.places, out)
        maps = (cast(x, dtype) for x in (sample.delta, before, after))
        return reference.lrn_delta(*maps, lrn, sample.places)

    call.clean = before
    return Sample(delta, Places(image, origin, origin, patches[2:]), call)


def draw_relu(seed: int, special: bool = False) -> Sample:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    shape, patches, origin = draw_shapes(choose)
    before, delta = draw_maps(choose, shape, patches, special)
    rectifier = choose.choice(RECTIFIERS)
    image = torch.randint(0, len(before), (len(delta),))

    def call(sample, out, dtype):
        if dtype is None:
            return relu_delta(sample.delta, before, rectifier, sample.places, out)
        return reference.relu_delta(cast(sample.delta, dtype), cast(before, dtype), rectifier, sample.places)

    call.clean = before
    return Sample(delta, Places(image, origin, origin, patches[2:]), call)


PARAMETERS = {"softplus": [(1.0, 20.0), (0.5, 1.0), (3.0, 8.0)], "elu": [(1.0, 0.0), (0.3, 0.0)]}


def draw_pointwise(seed: int, special: bool = False) -> Sample:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    name = list(FUNCTIONS)[seed % len(FUNCTIONS)]
    function = (name, *choose.choice(PARAMETERS.get(name, [(0.0, 0.0)])))
    shape, patches, origin = draw_shapes(choose)
    before, delta = draw_maps(choose, shape, patches, special)
    image = torch.randint(0, len(before), (len(delta),))
    if name == "sqrt" and not special:
        before, delta = before.abs(), delta.abs()

    def call(sample, out, dtype):
        if dtype is None:
            return pointwise_delta(sample.delta, before, function, sample.places, out)
        return reference.pointwise_delta(cast(sample.delta, dtype), cast(before, dtype), function, sample.places)

    call.clean = before
    return Sample(delta, Places(image, origin, origin, patches[2:]), call)


DRAW = {"pool_delta": draw_pool, "lrn_delta": draw_lrn, "relu_delta": draw_relu, "pointwise_delta": draw_pointwise}


def largest(x) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if len(finite) else 0.0


def agrees(sample) -> None:
    """Where value and change are added, the last bit of the sum is lost; where LRN takes a power, some more."""
    close(sample.run(), sample.wanted(), sample.delta.dtype, 8 * (largest(sample.call.clean) + largest(sample.delta)))


CHUNKS = [range(i, min(i + 50, EXAMPLES)) for i in range(0, EXAMPLES, 50)]


@pytest.mark.parametrize("op", DRAW)
@pytest.mark.parametrize("seeds", CHUNKS, ids=lambda r: str(r.start))
def test_equals_the_definition(op, seeds):
    for seed in seeds:
        agrees(DRAW[op](seed))


@pytest.mark.parametrize("op", DRAW)
@pytest.mark.parametrize("name", present())
def test_every_backend_and_instruction_set_equals_the_definition(op, name):
    with running_on(name):
        for seed in range(10000, 10040):
            agrees(DRAW[op](seed))
            agrees(DRAW[op](seed, special=True))


@pytest.mark.parametrize("op", DRAW)
def test_the_samples_reach_what_they_should(op):
    samples = [DRAW[op](seed) for seed in range(200)]
    patches = [sample.delta for sample in samples]
    assert {1, 600} <= {d.size(1) for d in patches} and {1, 60} <= {len(d) for d in patches}
    assert sum(not d.any() for d in patches) > 5
    assert sum(d.shape[2:] == (1, 1) for d in patches) > 10
    assert sum(d.shape[2:] == s.call.clean.shape[2:] for d, s in zip(patches, samples, strict=True)) > 10
    assert sum(bool(sample.wanted().any()) for sample in samples) > 120


@pytest.mark.parametrize("op", DRAW)
@pytest.mark.parametrize("seeds", [range(i, i + 10) for i in range(12000, 12040, 10)], ids=lambda r: str(r.start))
def test_values_that_are_not_finite(op, seeds):
    found = 0
    for seed in seeds:
        sample = DRAW[op](seed, special=True)
        agrees(sample)
        found += bool(sample.wanted().isnan().any())
    assert found


@pytest.mark.parametrize("op", DRAW)
@pytest.mark.parametrize("seeds", [range(i, i + 10) for i in range(12100, 12140, 10)], ids=lambda r: str(r.start))
def test_the_bits_do_not_depend_on_threads_batch_or_layout(op, seeds):
    for seed in seeds:
        sample = DRAW[op](seed)
        changes.does_not_depend_on_batch_or_threads(sample, random.Random(seed))
        ours, delta = sample.run(), sample.delta
        for layout in ("contiguous", "channels_last", "sliced", "transposed", "stepped"):
            sample.delta = changes.lay_out(delta, layout)
            assert same_bits(sample.run(), ours), layout


@pytest.mark.parametrize("op", DRAW)
@pytest.mark.parametrize("seeds", [range(i, i + 10) for i in range(12200, 12230, 10)], ids=lambda r: str(r.start))
def test_nothing_is_written_outside_of_the_result(op, seeds):
    for seed in seeds:
        sample = DRAW[op](seed)
        before = sample.delta.clone(), sample.call.clean.clone()
        changes.writes_nothing_else(sample)
        assert torch.equal(sample.delta, before[0]) and torch.equal(sample.call.clean, before[1])


@pytest.mark.parametrize("op", DRAW)
def test_a_result_that_is_given_is_returned(op):
    sample = DRAW[op](3)
    ours = sample.run()
    out = torch.full_like(ours, torch.nan)
    assert sample.run(out) is out and same_bits(out, ours)


@pytest.mark.parametrize("op", ["relu_delta", "pointwise_delta"])
def test_the_result_may_lie_over_the_change(op):
    for seed in range(12300, 12330):
        sample = DRAW[op](seed, special=seed % 2 == 0)
        ours = sample.run()
        sample.delta = sample.delta.clone(memory_format=torch.channels_last)
        if sample.delta.stride(1) == 1:
            assert sample.run(sample.delta) is sample.delta
            assert torch.equal(sample.delta.nan_to_num(7), ours.nan_to_num(7))


@pytest.mark.parametrize("op", ["pool_delta", "relu_delta", "pointwise_delta"])
def test_a_change_of_nothing_gives_nothing(op):
    for seed in range(12400, 12420):
        sample = DRAW[op](seed)
        for zero in (0.0, -0.0):
            sample.delta = torch.full_like(sample.delta, zero)
            assert not sample.run().any()


# ---- How exact the functions are


def function_of_values(name, values, change, backend):
    """The op on values that are one map, channels of every length that leaves a part of a vector."""
    count = len(values) // 33 * 33
    x, d = (v[:count].view(1, -1, 1, 33).permute(0, 3, 1, 2) for v in (values, change))
    zero = torch.zeros(1, 2, dtype=torch.int64)
    places = Places(zero[:, 0], zero, zero, tuple(x.shape[2:]))
    function = (name, *PARAMETERS.get(name, [(0.0, 0.0)])[0])
    with running_on(backend):
        ours = pointwise_delta(d, x, function, places)
        nothing = pointwise_delta(torch.zeros_like(d), x, function, places)
    f = FUNCTIONS[name]
    torchs = f(x + d, *function[1:]) - f(x, *function[1:])
    after, before = f((x + d).double(), *function[1:]), f(x.double(), *function[1:])
    return ours, nothing, torchs, after - before, torch.maximum(after.abs(), before.abs())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", [name for name in present() if name.startswith("cpu")])
def test_a_function_is_as_exact_as_torchs(name, backend):
    torch.manual_seed(0)
    for scale, change in ((1, 1), (1e-3, 1e-3), (8, 0.1), (4, 20), (40, 40)):
        x, d = torch.randn(200_000) * scale, torch.randn(200_000) * change
        if name == "sqrt":
            x, d = x.abs(), d.abs()
        if name == "exp":
            x, d = (v.clamp(max=40) for v in (x, d))
        ours, nothing, torchs, wanted, size = function_of_values(name, x, d, backend)
        assert not nothing.any()
        error = (ours - wanted).abs()
        assert (error <= 1e-6 * size.clamp(min=1)).all()
        assert (error / size.clamp(min=1)).max() <= 2 * ((torchs - wanted).abs() / size.clamp(min=1)).max()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", [name for name in present() if name.startswith("cpu")])
def test_a_function_of_numbers_at_the_ends_of_float(name, backend):
    """Beside torch's own in float32, which overflows where ours has to; the smallest numbers may be taken for zero."""
    small, middle = [0, 1e-45, 1e-38, 1e-20, 1e-8, 0.5], [9, 16, 20, 87, 88.1, 88.6, 88.8, 103, 104]
    ends = torch.tensor([*small, *middle, 1e5, 1e19, 1e38, torch.inf])
    x = torch.cat((ends, -ends, torch.tensor([torch.nan] * 31)))
    x = x[x >= 0] if name == "sqrt" else x
    x = x.repeat(33)
    ours, nothing, torchs, wanted, _ = function_of_values(name, torch.zeros_like(x), x, backend)
    if name == "gelu":  # torch's own vectors make NaN of infinity, where its numbers do not
        torchs = wanted.float()
    assert torch.equal(ours.isnan(), torchs.isnan())
    assert torch.equal(ours.isinf(), torchs.isinf()) and torch.equal(ours[ours.isinf()], torchs[torchs.isinf()])
    finite = torchs.isfinite()
    assert ((ours - torchs)[finite].abs() <= 2e-6 * torchs[finite].abs().clamp(min=1)).all()
    assert not nothing.any()


def test_a_function_without_a_name():
    plain = Plain("pointwise_delta")
    plain.function = ("relu6", 0.0, 0.0)
    with pytest.raises(ArgumentError, match="relu6.*expected one of sigmoid, tanh"):
        plain.run()


def test_a_window_of_minus_infinities():
    """Its clean maximum is no number to differ from, until a change lets one in."""
    before, after = torch.full((1, 17, 4, 4), -torch.inf), torch.full((1, 17, 2, 2), -torch.inf)
    zero = torch.zeros(1, 2, dtype=torch.int64)
    places = Places(zero[:, 0], zero, zero, (2, 2))
    delta = torch.zeros(1, 17, 2, 2)
    assert pool_delta(delta, before, after, ((2, 2), (2, 2), (0, 0), (1, 1)), places).isnan().all()
    delta[0, :, 1, 1] = torch.nan
    ours = pool_delta(delta, before, torch.zeros_like(after), ((2, 2), (2, 2), (0, 0), (1, 1)), places)
    assert ours[0, :, 0, 0].isnan().all() and (ours[0, :, 1] == -torch.inf).all()


# ---- What is refused


class Plain:
    """4 patches of 4 x 5 in two images' maps of 12 x 11: every field may be set."""

    def __init__(self, op):
        torch.manual_seed(0)
        self.op, self.out, self.window = op, None, ((3, 3), (1, 1), (1, 1), (1, 1))
        self.delta, self.before, self.after = torch.randn(4, 16, 4, 5), torch.randn(2, 16, 12, 11), torch.randn(2, 16, 12, 11)
        self.image, self.origin = torch.tensor([0, 1, 1, 0]), torch.tensor([[0, 0], [8, 6], [3, 2], [0, 6]])
        self.out_origin, self.size = self.origin, (4, 5)
        self.function = ("silu", 0.0, 0.0)

    def run(self):
        places = Places(self.image, self.origin, self.out_origin, self.size)
        if self.op == "pool_delta":
            return pool_delta(self.delta, self.before, self.after, self.window, places, self.out)
        if self.op == "lrn_delta":
            return lrn_delta(self.delta, self.before, self.after, Lrn(5, 1e-4, 0.75, 1.0), places, self.out)
        if self.op == "pointwise_delta":
            return pointwise_delta(self.delta, self.before, self.function, places, self.out)
        return relu_delta(self.delta, self.before, Limits(), places, self.out)


BAD = [
    (dict(origin=torch.tensor([[0, 0], [8, 6], [3, 2], [0, 7]])), ValueError, "patch 3 is not inside its map"),
    (dict(origin=torch.tensor([[-1, 0], [8, 6], [3, 2], [0, 6]])), ValueError, "patch 0 is not inside its map"),
    (dict(origin=torch.full((4, 2), 2**62)), ValueError, "patch 0 is not inside its map"),
    (dict(out_origin=torch.tensor([[0, 0], [9, 6], [3, 2], [0, 6]])), ValueError, "patch 1 is not inside its map"),
    (dict(out_origin=torch.tensor([[0, 0], [8, 6], [3, -2], [0, 6]])), ValueError, "patch 2 is not inside its map"),
    (dict(out_origin=torch.full((4, 2), 2**62)), ValueError, "patch 0 is not inside its map"),
    (dict(image=torch.tensor([0, 2, 1, 0])), ShapeError, "image: expected 0 to 1"),
    (dict(image=torch.tensor([0, -1, 1, 0])), ShapeError, "image: expected 0 to 1"),
    (dict(image=torch.zeros(3, dtype=torch.int64)), ShapeError, r"image of .*expected int64 \[4\]"),
    (dict(origin=torch.zeros(4, 2)), ShapeError, r"origin of torch.float32 .*expected int64 \[4, 2\]"),
    (dict(out_origin=torch.zeros(4, dtype=torch.int64)), ShapeError, r"out_origin of .*expected int64 \[4, 2\]"),
    (dict(delta=torch.randn(4, 16, 4, 5).bfloat16()), DtypeError, "delta of torch.bfloat16"),
    (dict(delta=torch.randn(16, 4, 5)), DtypeError, r"expected float32 or float64 \[B, C, h, w\]"),
    (dict(delta=torch.randn(4, 15, 4, 5)), ShapeError, r"\(4, 15, 4, 5\), \w+ \(2, 16, 12, 11\)"),
    (dict(before=torch.randn(2, 16, 12, 11).double()), ShapeError, "maps of torch.float64"),
    (dict(before=torch.randn(16, 12, 11)), ShapeError, "maps of torch.float32"),
    (dict(before=torch.randn(0, 16, 12, 11)), ShapeError, "image: expected|as many images|belong together"),
    (dict(out=torch.empty(4, 16, 5, 5)), ShapeError, r"expected torch.float32 \(4, 16, 4, 5\), channels last"),
    (dict(out=torch.empty(4, 16, 4, 5)), ShapeError, "channels last"),
    (dict(out=torch.empty(4, 4, 5, 16).double().permute(0, 3, 1, 2)), ShapeError, "expected torch.float32"),
]


@pytest.mark.parametrize("op", DRAW)
@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_refusals(op, change, error, words):
    plain = Plain(op)
    plain.run()
    for name, value in change.items():
        setattr(plain, name, value)
    with pytest.raises(error, match=words):
        plain.run()


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("pool_delta", dict(after=torch.randn(2, 15, 12, 11))),
        ("pool_delta", dict(after=torch.randn(3, 16, 12, 11))),
        ("pool_delta", dict(window=((16, 16), (1, 1), (8, 8), (1, 1)))),
        ("lrn_delta", dict(after=torch.randn(2, 16, 12, 12))),
        ("lrn_delta", dict(size=(4, 4))),
        ("relu_delta", dict(size=(4, 4))),
        ("pointwise_delta", dict(size=(4, 4))),
    ],
)
def test_maps_and_results_that_do_not_belong_together(op, change):
    plain = Plain(op)
    for name, value in change.items():
        setattr(plain, name, value)
    with pytest.raises(ShapeError, match="expected|belong together"):
        plain.run()


@pytest.mark.parametrize("op", DRAW)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_empty_batch(op, backend):
    plain, none = Plain(op), slice(0, 0)
    for name in ("delta", "image", "origin", "out_origin"):
        setattr(plain, name, getattr(plain, name)[none])
    with use_backend(backend):
        ours = plain.run()
        assert ours.shape == (0, 16, 4, 5) and ours.dtype == torch.float32
