"""deconv_step against its definition in float64: drawn geometries, borders, layouts, rules; and its kept filters."""

from __future__ import annotations

import pytest
import torch
from steps import TOLERANCE, Sample, close, depthwise, draw, too_large_for_half

from zfcore import ops, reference
from zfcore.errors import DeviceError, DtypeError, ShapeError
from zfcore.ops import _filters
from zfcore.ops.deconv_step import packed_for_cuda
from zfcore.reference._params import StepParams


@pytest.mark.parametrize("seeds", [range(i, i + 50) for i in range(0, 400, 50)], ids=lambda r: str(r.start))
def test_equals_the_definition(seeds):
    for seed in seeds:
        sample = draw(seed)
        ours = sample.run()
        close(ours, sample.run(reference.deconv_step, torch.float64), sample.signal.dtype)


@pytest.mark.parametrize("seeds", [range(i, i + 50) for i in range(0, 200, 50)], ids=lambda r: str(r.start))
def test_depthwise_filters_equal_the_definition(seeds):
    for seed in seeds:
        sample = depthwise(seed)
        ours = sample.run()
        close(ours, sample.run(reference.deconv_step, torch.float64), sample.signal.dtype, what=seed)


def test_sums_of_half_values_are_rounded_once():
    sample = too_large_for_half()
    expected = sample.run(reference.deconv_step, torch.float64)
    assert expected.max() == 40000
    close(sample.run(), expected, torch.float16)


@pytest.mark.parametrize("draw", [draw, depthwise])
@pytest.mark.parametrize("seed", range(400, 440))
def test_the_bits_do_not_depend_on_threads_batch_or_layout(seed, draw):
    sample = draw(seed)
    ours = sample.run()
    out = torch.full(ours.shape, 7.0, dtype=ours.dtype)
    assert sample.run(out=out) is out
    assert torch.equal(out, ours)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(sample.run(), ours)
    finally:
        torch.set_num_threads(threads)
    last = slice(len(ours) - 1, None)
    assert torch.equal(sample.part(last).run(), ours[last])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("draw", [draw, depthwise])
@pytest.mark.parametrize("seed", range(440, 452))
def test_zeros_times_what_is_not_finite_are_left_out(seed, draw, value):
    sample = draw(seed)
    sample.scale = None
    sample.weight.view(-1)[:: sample.weight.numel() // 3 + 1] = value
    close(sample.run(), sample.run(reference.deconv_step, torch.float64), sample.signal.dtype)


@pytest.mark.parametrize("draw", [draw, depthwise])
def test_nan_and_infinity_come_down(draw):
    sample = draw(2)
    sample.scale, sample.passes, sample.signal = None, None, sample.signal.contiguous()
    sample.signal.view(-1)[::7] = torch.nan
    sample.signal.view(-1)[3::7] = torch.inf
    close(sample.run(), sample.run(reference.deconv_step, torch.float64), sample.signal.dtype)


def test_many_taps_share_places_too():
    """Windows of 225 taps at stride 1, whose differences of taps do not fit a byte."""
    torch.manual_seed(0)
    pool = ((15, 15), (1, 1), (7, 7), (1, 1))
    values, switches = ops.max_pool2d_with_switches(torch.randn(1, 40, 20, 20), *pool)
    conv = ((3, 3), (1, 1), (1, 1), (1, 1))
    for overlap in ("sum", "last"):
        step = StepParams(pool, conv, 1, (20, 20), (20, 20), True, True, overlap)
        sample = Sample(
            torch.randn_like(values), torch.randn(40, 4, 3, 3), step, torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, 2, dtype=torch.int64), switches, None, None, None,
        )  # fmt: skip
        close(sample.run(), sample.run(reference.deconv_step, torch.float64), torch.float32)


# ---- The kept filters


@pytest.fixture
def plain():
    torch.manual_seed(0)
    conv = ((3, 3), (1, 1), (1, 1), (1, 1))
    step = StepParams(None, conv, 1, (12, 12), (12, 12), False, True, "sum")
    zero = torch.zeros(2, 2, dtype=torch.int64)
    return Sample(torch.randn(2, 16, 4, 4), torch.randn(16, 8, 3, 3), step, zero[:, 0], zero + 3, *[None] * 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: w.data.mul_(2),
        lambda w: w.numpy().__setitem__((15, 7, 2, 2), 3.0),
        lambda w: w.data.view(torch.int32).view(-1).__setitem__(0, 5),
        lambda w: w.set_(torch.ones(16, 8, 3, 3)),
    ],
    ids=["in place", "through data", "through numpy", "one word", "other memory"],
)
def test_a_change_of_the_weight_is_noticed(plain, change):
    before = plain.run()
    assert torch.equal(plain.run(), before)
    change(plain.weight)
    after = plain.run()
    assert not torch.equal(after, before)
    close(after, plain.run(reference.deconv_step, torch.float64), torch.float32)


def test_filters_are_kept_while_the_weight_lives(plain):
    step = plain.step
    first = _filters.for_deconv(plain.weight, None, step.conv, 1)
    assert _filters.for_deconv(plain.weight, None, step.conv, 1) is first
    scaled = _filters.for_deconv(plain.weight, torch.ones(16), step.conv, 1)
    assert scaled is not first and torch.equal(scaled, first)
    kept = len(_filters._kept)
    plain.weight = None
    assert len(_filters._kept) == kept - 1


def test_within_one_call_a_weight_is_looked_at_once(plain, monkeypatch):
    step, looks = plain.step, []
    look = _filters._looked_up
    monkeypatch.setattr(_filters, "_looked_up", lambda *args: looks.append(args) or look(*args))
    double = torch.full((16,), 2.0)
    with _filters.held():
        first = _filters.for_deconv(plain.weight, None, step.conv, 1)
        assert _filters.for_deconv(plain.weight, None, step.conv, 1) is first and len(looks) == 1
        scaled = _filters.for_deconv(plain.weight, double, step.conv, 1)
        assert not torch.equal(scaled, first) and len(looks) == 2
        assert _filters.for_deconv(plain.weight, double.clone(), step.conv, 1) is scaled and len(looks) == 2
        assert torch.equal(_filters.for_deconv(plain.weight, double / 2, step.conv, 1), first) and len(looks) == 3
    plain.weight.data.mul_(2)
    assert torch.equal(_filters.for_deconv(plain.weight, None, step.conv, 1), scaled) and len(looks) == 4


# ---- The filters on a GPU


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_filters_packed_for_a_gpu(dtype):
    weight, scale = torch.randn(5, 3, 2, 4).to(dtype), torch.randn(5).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for factor in (None, scale):
        filters, not_finite = packed_for_cuda(weight, factor)
        product = weight.to(wide) if factor is None else weight.to(wide) * factor.to(wide)[:, None, None, None]
        assert filters.dtype == wide and filters.is_contiguous() and not not_finite
        assert torch.equal(filters, product.permute(0, 2, 3, 1))
    for value in (torch.inf, -torch.inf, torch.nan):
        weight[4, 2, 1, 3] = value
        assert packed_for_cuda(weight, None)[1]


# ---- What is refused


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(image=torch.zeros(3, dtype=torch.int64)), ShapeError, r"expected \[2\] and \[2, 2\]"),
        (dict(origin=torch.zeros(2, 2)), DtypeError, "expected int64"),
        (dict(weight=torch.zeros(15, 8, 3, 3)), ShapeError, r"expected \[16, C / groups, \*\(3, 3\)\]"),
        (dict(weight=torch.zeros(16, 8, 3, 3).double()), DtypeError, "expected the signal's torch.float32"),
        (dict(switches=torch.zeros(1, 16, 4, 4, dtype=torch.uint8)), ShapeError, "expected both or neither"),
        (dict(passes=torch.zeros(1, 16, 12, 12)), ShapeError, "expected torch.bool"),
        (dict(passes=torch.zeros(1, 16, 11, 12, dtype=torch.bool)), ShapeError, r"expected maps of \(12, 12\)"),
        (dict(passes=torch.ones(1, 16, 12, 12) > 0, image=torch.tensor([0, 1])), ShapeError, "expected 0 to 0"),
        (dict(scale=torch.ones(8)), ShapeError, r"expected \[16\]"),
        (dict(frame=(torch.zeros(2, 2, dtype=torch.int64), (4, 4))), ShapeError, "with step.whole"),
        (dict(weight=torch.zeros(16, 8, 3, 3, device="meta")), DeviceError, "weight on meta: expected cpu"),
        (dict(scale=torch.zeros(16, device="meta")), DeviceError, "scale on meta: expected cpu"),
    ],
)  # fmt: skip
def test_refusals(plain, change, error, words):
    for name, value in change.items():
        setattr(plain, name, value)
    with pytest.raises(error, match=words):
        plain.run()


def test_a_result_of_another_shape_is_refused(plain):
    with pytest.raises(ShapeError, match="expected torch.float32"):
        plain.run(out=torch.empty(2, 8, 5, 6))


def test_backends(plain):
    with ops.use_backend("reference"):
        close(plain.run(), plain.run(reference.deconv_step, torch.float64), torch.float32)
