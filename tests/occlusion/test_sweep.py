"""The incremental engine of occlusion_map against plain forwards: networks, boxes, features, and what is not finite."""

import copy
import math
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from occluded_networks import (
    NETWORKS,
    SIZE,
    build,
    by_forwards,
    close,
    painted,
    pictures,
    totals,
)
from test_occlusion_map import NETWORKS as FOUR
from test_occlusion_map import network, same_state, state
from torch import nn

from zfcore.engine.sweep import Sweep
from zfcore.errors import UnitNotFound, UnsupportedOperation
from zfcore.network.guard import recording
from zfcore.occlusion import occlusion_map
from zfcore.ops import use_backend

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Maps of a few kilobytes: with more threads, most of the time goes in threads waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Forwards:
    """Counts the pictures that a model is given."""

    def __init__(self, model):
        self.pictures = 0

        class Counted(type(model)):
            def forward(counted, x):
                if getattr(recording, "record", None) is None:  # the reader's, which computes nothing
                    self.pictures += len(x)
                return super().forward(x)

        model.__class__ = Counted


def equals_forwards(model, images, box, stride, fill=0.0, dtype=torch.float32, **options):
    """Scores, labels and clean values of given classes and of each image's own."""
    images, model = images.to(dtype), model.to(dtype)
    logits = by_forwards(model, images, box, stride, fill)
    clean, rows = model(images).detach(), torch.arange(len(images))
    given = (torch.arange(len(images)) * 3 + 1) % clean.shape[1]
    o = occlusion_map(model, images, given, box=box, stride=stride, fill=fill, score="logit", **options)
    assert o.scores.dtype == dtype and o.scores.shape == logits.shape[:3]
    assert close(o.scores, logits[rows, :, :, given], TOLERANCE[dtype])
    assert close(o.clean, clean[rows, given], TOLERANCE[dtype])
    assert torch.equal(o.labels, logits.argmax(-1)) and torch.equal(o.clean_labels, clean.argmax(1))
    assert torch.equal(o.targets, given)
    return o


# ---- Networks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_plain_forwards(name, dtype, engine):
    equals_forwards(build(name), pictures(2), (7, 6), (5, 4), 0.25, dtype)
    assert engine == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", FOUR)
def test_the_four_networks_equal_plain_forwards(kind, dtype, engine):
    equals_forwards(network(kind), pictures(3, (29, 37)), (7, 9), (5, 4), dtype=dtype)
    assert engine == [3]


@pytest.mark.parametrize("name", ["branches", "contrast", "crops", "any function", "full layers"])
def test_probabilities_equal_those_of_forwards(name, engine):
    model, images = build(name), pictures(2)
    if name == "full layers":
        model = model[:-1]  # whose last layer is a softmax already
    o = occlusion_map(model, images, box=7, stride=5)
    logits = by_forwards(model, images, 7, 5)
    top = model(images).argmax(1)
    assert torch.equal(o.targets, top) and engine
    assert close(o.scores, logits.softmax(-1)[torch.arange(2), :, :, top])


@pytest.mark.parametrize("channels", [1, 4, 40])
def test_pictures_of_other_channels(channels, engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 10 * 8, 7))
    equals_forwards(model.eval(), torch.randn(2, channels, 16, 14), 5, 4)
    assert engine


def test_a_network_that_is_one_full_layer(engine):
    torch.manual_seed(0)
    equals_forwards(nn.Sequential(nn.Flatten(), nn.Linear(3 * 26 * 23, 7)), pictures(2), 7, 5)
    assert engine


# ---- Boxes, fills, batches


@pytest.mark.parametrize("name", ["branches", "max pools", "strides above the kernel", "full layers"])
@pytest.mark.parametrize(
    "box, stride",
    [
        (1, 9), (2, 7), (40, 3), ((26, 4), 5), ((3, 23), (4, 1)), ((100, 5), 6), ((2, 9), (13, 3)), (3, (30, 8)),
        (9, 25), ((25, 22), 1),
    ],
    ids=str,
)  # fmt: skip
def test_boxes(name, box, stride, engine):
    o = equals_forwards(build(name), pictures(2), box, stride, -0.4)
    assert engine and int(o.boxes[..., 2].max()) <= 26 and int(o.boxes[..., 3].max()) <= 23


@pytest.mark.parametrize(
    "fill",
    [2, -1.5, [0.1, -0.2, 0.3], pictures(1, seed=9)[0], pictures(2, seed=8), torch.zeros(()), 1e4],
    ids=["int", "float", "colour", "picture", "pictures", "scalar", "large"],
)
@pytest.mark.parametrize("name", ["contrast", "squeeze and excitation"])
def test_fills(name, fill, engine):
    equals_forwards(build(name), pictures(2), 8, 6, fill)
    assert engine


def test_a_fill_that_is_the_image_changes_nothing_at_all(engine):
    model, images = build("branches"), pictures(2)
    o = occlusion_map(model, images, box=8, stride=6, fill=images, feature=("wide", 2))
    assert engine and torch.equal(o.scores, o.clean[:, None, None].expand_as(o.scores))
    assert torch.equal(o.activation, o.clean_activation[:, None, None].expand_as(o.activation))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 59, 60, 1000, None])
def test_any_batch_size_gives_the_same_map(batch_size, engine):
    model, images = build("contrast"), pictures(3)
    want = occlusion_map(model, images, box=(7, 6), stride=(5, 5), feature=("4", 3), batch_size=60)
    o = occlusion_map(model, images, box=(7, 6), stride=(5, 5), feature=("4", 3), batch_size=batch_size)
    assert close(o.scores, want.scores, 1e-6) and close(o.activation, want.activation, 1e-6)
    assert torch.equal(o.labels, want.labels) and sum(engine) == 6


def test_images_that_do_not_fit_a_batch_of_clean_maps(engine, monkeypatch):
    model, images = build("branches"), pictures(5)
    want = occlusion_map(model, images, box=7, stride=5, feature=("far", None))
    monkeypatch.setattr("zfcore.engine.sweep.CLEAN_BYTES", 150_000)
    o = occlusion_map(model, images, box=7, stride=5, feature=("far", None))
    assert len(engine) > 2 and sum(engine) == 10
    assert close(o.scores, want.scores) and close(o.activation, want.activation)
    assert torch.equal(o.units, want.units) and torch.equal(o.targets, want.targets)


def test_an_image_is_measured_alike_alone_and_among_others(engine):
    model, images = build("branches"), pictures(4)
    together = occlusion_map(model, images, box=7, stride=5)
    for n in range(4):
        assert close(occlusion_map(model, images[n], box=7, stride=5).scores[0], together.scores[n])


# ---- Features


LAYERS = [
    pytest.param(name, layer, id=f"{name}: {layer or 'the network'}")
    for name in ("branches", "squeeze and excitation", "full layers", "factors below zero", "crops", "any function")
    for layer, _ in build(name).named_modules()
]


@pytest.mark.parametrize("name, layer", LAYERS)
def test_features_of_every_layer(name, layer, engine):
    """Containers, what is fused with a convolution and what is not, the first layer and the last."""
    model, images = build(name), pictures(2)
    rows = painted(images, 9, 7).flatten(0, 2)
    o = occlusion_map(model, images, 1, box=9, stride=7, feature=(model.get_submodule(layer), 2), score="logit")
    assert engine and o.units.tolist() == [2, 2]
    assert close(o.activation.flatten(), totals(model, model.get_submodule(layer), rows)[:, 2])
    assert close(o.clean_activation, totals(model, model.get_submodule(layer), images)[:, 2])
    assert close(o.scores, by_forwards(model, images, 9, 7)[..., 1])


@pytest.mark.parametrize("kind", FOUR)
def test_features_of_units_of_each_images_own(kind, engine):
    model, images = network(kind), pictures(3, (29, 37))
    layer = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][1]
    rows = painted(images, 9, 7).flatten(0, 2)
    every, clean = totals(model, model.get_submodule(layer), rows), totals(model, model.get_submodule(layer), images)
    for units in ([2, 0, 3], None):
        o = occlusion_map(model, images, box=9, stride=7, feature=(layer, units))
        assert o.units.tolist() == (units or clean.argmax(1).tolist())
        own = o.units.repeat_interleave(len(rows) // 3)
        assert close(o.activation.flatten(), every[torch.arange(len(rows)), own])
        assert close(o.clean_activation, clean[torch.arange(3), o.units])
    assert engine == [3, 3]


@pytest.mark.parametrize("call", [0, 1, 2])
def test_features_of_one_call_of_several(call, engine):
    model, images = build("shared modules"), pictures(2)
    o = occlusion_map(model, images, 1, box=9, stride=7, feature=(f"relu@{call}", 5))
    want = totals(model, model.relu, painted(images, 9, 7).flatten(0, 2), call)[:, 5]
    assert engine and close(o.activation.flatten(), want)


def test_the_feature_of_a_layer_that_gives_the_picture(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 12 * 11, 7))
    images = pictures(2)
    o = occlusion_map(model, images, box=9, stride=7, feature=("0", 1), fill=0.25)
    want = painted(images, 9, 7, 0.25)[:, :, :, 1].sum((-1, -2))
    assert engine and close(o.activation, want)


def test_a_feature_does_not_change_the_scores(engine):
    model, images = build("factors below zero"), pictures(2)
    want = occlusion_map(model, images, box=7, stride=5)
    for module in model.modules():
        assert close(occlusion_map(model, images, box=7, stride=5, feature=(module, 0)).scores, want.scores)


def test_a_unit_that_the_layer_lacks_is_refused_before_any_work(engine):
    with pytest.raises(UnitNotFound, match="feature: unit 6 of layer 'wide'; expected 0 to 5"):
        occlusion_map(build("branches"), pictures(1), box=7, stride=5, feature=("wide", 6))
    assert not engine


# ---- What is not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["branches", "contrast", "rectifiers", "full layers"])
def test_an_image_that_is_not_finite_is_run_by_forwards_and_the_others_are_not(name, value, engine):
    model, images = build(name), pictures(4)
    want = occlusion_map(model, images, [1, 2, 3, 4], box=9, stride=6, score="logit", feature=(model, 1))
    images[2, 1, 10, 12] = value
    counted = Forwards(model)
    o = occlusion_map(model, images, [1, 2, 3, 4], box=9, stride=6, score="logit", feature=(model, 1))
    count = want.scores[0].numel()
    assert counted.pictures == 1 + count
    others = [0, 1, 3]
    assert torch.equal(o.scores[others], want.scores[others]) and torch.equal(o.labels[others], want.labels[others])
    assert torch.equal(o.activation[others], want.activation[others])
    logits = by_forwards(model, images[2:3], 9, 6)[..., 3]
    assert not logits.isfinite().all() and logits.isfinite().any()
    torch.testing.assert_close(o.scores[2:3], logits, rtol=1e-5, atol=1e-5, equal_nan=True)
    finite = by_forwards(model, images[2:3], 9, 6).isfinite().all(-1)
    assert torch.equal(o.labels[2:3][finite], by_forwards(model, images[2:3], 9, 6).argmax(-1)[finite])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["branches", "contrast", "rectifiers", "any function", "max pools", "adaptive pools"])
def test_fills_that_are_not_finite(name, value, engine):
    model, images = build(name), pictures(2)
    logits = by_forwards(model, images, 9, 6, value)
    o = occlusion_map(model, images, 3, box=9, stride=6, score="logit", fill=value)
    assert engine
    torch.testing.assert_close(o.scores, logits[..., 3], rtol=1e-5, atol=1e-5, equal_nan=True)
    fill = images.clone()
    fill[1, 0, :10] = value  # of one image, at some of the positions
    o = occlusion_map(model, images, 3, box=9, stride=6, score="logit", fill=fill)
    torch.testing.assert_close(
        o.scores, by_forwards(model, images, 9, 6, fill)[..., 3], rtol=1e-5, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("scale", [1e38, 1e20])
@pytest.mark.parametrize("last", [nn.ReLU(), nn.Sigmoid(), nn.ReLU6(), nn.Tanh()], ids=lambda module: type(module).__name__)
def test_weights_so_large_that_sums_overflow_or_lose_their_digits(last, scale, engine):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3), last,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7),
    ).eval()  # fmt: skip
    for parameters in ([4], [0, 4, 8]):
        scaled = copy.deepcopy(model)
        for index in parameters:
            scaled[index].weight.data *= scale
        for images, fill in ((pictures(2), 0.0), (pictures(2) * 1e-3, 0.0), (pictures(2), 1e3), (pictures(2) / scale, 1.0)):
            found = occlusion_map(scaled, images[:1], 3, box=9, stride=6, score="logit", fill=fill, batch_size=1)
            wanted = torch.stack([
                scaled(picture[None])[0, 3]
                for picture in painted(images[:1], 9, 6, fill).flatten(0, 2)
            ]).detach()  # one at a time: torch's own sums overflow or not by the number of images
            largest = float(wanted[wanted.isfinite()].abs().max()) if wanted.isfinite().any() else 1.0
            torch.testing.assert_close(
                found.scores.flatten(), wanted, rtol=1e-4, atol=1e-4 * max(largest, 1e-30), equal_nan=True
            )


def test_an_infinity_that_a_rectifier_takes_away_costs_no_forwards(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 10 * 9, 7))
    with torch.no_grad():
        model[0].weight.abs_()
    images = pictures(2)
    counted = Forwards(model)
    o = occlusion_map(model, images, 3, box=9, stride=6, score="logit", fill=math.inf)
    assert engine and counted.pictures == 0 and o.scores.isfinite().all()
    assert close(o.scores, by_forwards(model, images, 9, 6, math.inf)[..., 3])


def test_a_feature_that_is_not_finite_is_measured_by_forwards(engine):
    """The score is finite all the while."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 10 * 9, 7))
    images = pictures(2)
    with torch.no_grad():
        model[0].weight.abs_()
    o = occlusion_map(model, images, 3, box=9, stride=6, score="logit", fill=math.inf, feature=("0", 2))
    want = totals(model, model[0], painted(images, 9, 6, math.inf).flatten(0, 2))[:, 2]
    assert (want == math.inf).all() and torch.equal(o.activation.flatten(), want)
    assert close(o.scores, by_forwards(model, images, 9, 6, math.inf)[..., 3])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["0.weight", "1.running_var", "3.weight", "6.bias"])
def test_parameters_that_are_not_finite(where, value, engine):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 10 * 9, 7),
    ).eval()  # fmt: skip
    model.state_dict()[where].view(-1)[3] = value
    images = pictures(2)
    o = occlusion_map(model, images, 3, box=9, stride=6, score="logit")
    logits = by_forwards(model, images, 9, 6)[..., 3]
    torch.testing.assert_close(o.scores, logits, rtol=1e-5, atol=1e-5, equal_nan=True)


# ---- The same bits


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_bits_twice_and_on_two_threads(name, engine, monkeypatch):
    """The clean maps are torch's, whose bits depend on its threads where a BLAS multiplies: they get one."""
    model, images, up = build(name), pictures(2), Sweep.up

    def one_thread_up(self, images):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return up(self, images)
        finally:
            torch.set_num_threads(before)

    monkeypatch.setattr(Sweep, "up", one_thread_up)
    options = dict(box=7, stride=5, feature=(model, 1), score="logit", batch_size=17)
    first, second = (occlusion_map(model, images, **options) for _ in range(2))
    torch.set_num_threads(2)
    try:
        third = occlusion_map(model, images, **options)
    finally:
        torch.set_num_threads(1)
    for o in (second, third):
        assert torch.equal(o.scores, first.scores) and torch.equal(o.activation, first.activation)
        assert torch.equal(o.heatmap(), first.heatmap())
    assert engine


@pytest.mark.parametrize("name", ["branches", "contrast", "factors below zero", "full layers", "same padding, even kernels"])
def test_the_reference_backend_agrees(name, engine):
    model, images = build(name), pictures(2)
    o = occlusion_map(model, images, 2, box=9, stride=7, score="logit", feature=(model, 3))
    with use_backend("reference"):
        want = occlusion_map(model, images, 2, box=9, stride=7, score="logit", feature=(model, 3))
    assert engine == [2, 2]
    assert close(o.scores, want.scores) and close(o.activation, want.activation) and torch.equal(o.labels, want.labels)


def test_images_of_any_layout_and_dtype(engine):
    model, images = build("branches"), pictures(2)
    want = occlusion_map(model, images, box=7, stride=5)
    for other in (
        images.contiguous(memory_format=torch.channels_last),
        torch.cat([images, images], 3)[..., : images.shape[3]],
        images.transpose(2, 3).contiguous().transpose(2, 3),
        images.double(),
        images.clone().requires_grad_(),
    ):
        o = occlusion_map(model, other, box=7, stride=5)
        assert close(o.scores, want.scores) and o.scores.dtype == torch.float32 and not o.scores.requires_grad
    assert len(engine) == 6


# ---- When the engine runs, and when forwards do


def deep(padding=1):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=padding), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(16, 16, 3, padding=padding), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7)).eval()


def test_the_engine_runs_where_that_is_less_work_and_runs_no_forward(runs):
    model, images = deep(), pictures(2, (32, 32))
    counted = Forwards(model)
    o = occlusion_map(model, images, 1, box=5, stride=4, score="logit", feature=("4", 3))
    assert runs == [2] and counted.pictures == 0
    assert close(o.scores, by_forwards(model, images, 5, 4)[..., 1])


def test_values_run_where_a_box_changes_everything(runs):
    model, images = deep(padding=0), pictures(2, (32, 32))
    want = by_forwards(model, images, 40, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # which is nothing to warn of
        o = occlusion_map(model, images, 1, box=40, stride=8, score="logit", strict=True)
    assert runs == [2]
    assert close(o.scores, want[..., 1])


def test_the_engine_is_chosen_by_what_it_saves(runs, monkeypatch):
    model, images, divide = deep(), pictures(1, (32, 32)), Sweep.divide
    for share, expected in ((1.01, 1), (1.0, 0), (0.5, 0)):
        runs.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Sweep, "divide", lambda self, at, share=share: (1.0, share) if divide(self, at) else None)
            occlusion_map(model, images, box=5, stride=4)
        assert len(runs) == expected


class Odd(nn.Module):
    """Sorts a map, which the reader does not know."""

    def __init__(self):
        super().__init__()
        self.a, self.full = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 7)

    def forward(self, x):
        return self.full(torch.fft.fft(self.a(x).flatten(2)).real[:, :, -3:].mean(2))


def test_a_network_that_cannot_be_read_warns_once_and_names_the_operation(runs):
    torch.manual_seed(0)
    model, images = Odd().eval(), pictures(2)
    with pytest.warns(UserWarning) as caught:
        o = occlusion_map(model, images, 1, box=9, stride=7, score="logit", batch_size=3)
    assert len(caught) == 1
    assert "plain forwards" in str(caught[0].message) and "fft" in str(caught[0].message)
    assert not runs and close(o.scores, by_forwards(model, images, 9, 7)[..., 1])


def test_strict_refuses_a_network_that_cannot_be_read(runs):
    model = Odd().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnsupportedOperation, match="fft"):
            occlusion_map(model, pictures(1), box=9, stride=7, strict=True)
    assert model.training and not runs


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), "max_pool2d_with_indices"),
        (lambda x: x.round(), "round"),
        (lambda x: x * (x > 0.1).float(), "goes by gt"),
        (lambda x: torch.where(x > 0, x, -1.0), "a condition"),
        (lambda x: x * F.one_hot(x.argmax(1), 8).movedim(3, 1), "argmax|one_hot"),
    ],
)
def test_what_rounding_may_tip_over_is_measured_by_forwards(code, name, engine):
    """A constant box gives ties, which a sum of a clean value and a change breaks this way or that."""

    class Jumps(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.full = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 6, 3), nn.Linear(6, 7)

        def forward(self, x):
            return self.full(self.b(code(self.a(x))).mean((2, 3)))

    torch.manual_seed(0)
    model, images = Jumps().eval(), pictures(2, (16, 16))
    with pytest.warns(UserWarning, match=name):
        o = occlusion_map(model, images, 1, box=6, stride=3, score="logit")
    assert not engine and o.path == "forwards"
    assert close(o.scores, by_forwards(model, images, 6, 3)[..., 1])


@pytest.mark.parametrize("norm", (nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)), ids=("group", "instance"))
def test_maps_are_normalised_as_well_as_the_model_does(norm, engine, monkeypatch):
    """Their mean is far from zero, where sums of squares lose digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), norm, nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(540, 7)).eval()
    with torch.no_grad():
        model[0].bias.fill_(40.0)
    images = pictures(2)
    monkeypatch.setattr(Sweep, "refusal", None)
    o = occlusion_map(model, images, 1, box=7, stride=5, score="logit", strict=True)
    loop = by_forwards(model, images, 7, 5)[..., 1]
    right = by_forwards(model.double(), images.double(), 7, 5)[..., 1]
    assert engine and (o.scores - right).abs().max() <= max(3 * (loop - right).abs().max(), 1e-5 * right.std())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_full_layers_of_several_rows(dtype, engine):
    """Tokens, and maps whose channels come last."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.one, self.two = nn.Conv2d(3, 12, 3, 2), nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
            self.three, self.norm, self.full = nn.Linear(12, 9), nn.LayerNorm(12), nn.Linear(9, 7)

        def forward(self, x):
            x = self.a(x)
            x = x + self.two(F.gelu(self.one(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
            tokens = self.norm(x.flatten(2).transpose(1, 2))
            return self.full(self.three(tokens).mean(1))

    torch.manual_seed(0)
    model, images = Rows().to(dtype).eval(), pictures(2).to(dtype)
    o = occlusion_map(model, images, 1, box=7, stride=5, score="logit", strict=True, feature=("two", 3))
    wanted = by_forwards(model.double(), images.double(), 7, 5)[..., 1]
    assert engine and (o.scores - wanted).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12) * wanted.std()


def test_conditions_whose_sides_meet_do_not_jump(engine):
    class Meets(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.full = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 7)

        def forward(self, x):
            x = self.a(x)
            x = torch.where(x > 0, x, 0.0)
            x[x > 1] = 1.0
            return self.full(x.mean((2, 3)))

    torch.manual_seed(0)
    model, images = Meets().eval(), pictures(2)
    o = occlusion_map(model, images, 1, box=6, stride=3, score="logit", strict=True)
    assert engine and close(o.scores, by_forwards(model, images, 6, 3)[..., 1])


def test_a_feature_on_a_way_that_does_not_lead_to_the_output(engine):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.full = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 4, 1), nn.Linear(8, 7)

        def forward(self, x):
            x = self.a(x).relu()
            self.b(x)
            return self.full(x.mean((2, 3)))

    torch.manual_seed(0)
    model, images = Aside().eval(), pictures(2)
    with pytest.warns(UserWarning, match="layer 'b' does not lead to the network's output"):
        o = occlusion_map(model, images, box=9, stride=7, feature=("b", 1))
    assert not engine
    assert close(o.activation.flatten(), totals(model, model.b, painted(images, 9, 7).flatten(0, 2))[:, 1])
    with pytest.raises(UnsupportedOperation, match="layer 'b'"):
        occlusion_map(model, images, box=9, stride=7, feature=("b", 1), strict=True)


def test_what_hooks_change_counts(runs):
    model, images = deep(), pictures(1, (32, 32))
    handle = model[2].register_forward_hook(lambda m, i, y: y * 2)
    try:
        o = occlusion_map(model, images, 1, box=5, stride=8, score="logit", strict=True)
        assert runs and o.path == "engine" and close(o.scores, by_forwards(model, images, 5, 8)[..., 1])
    finally:
        handle.remove()


def test_half_precision_is_run_by_forwards(runs):
    model, images = deep(), pictures(1, (32, 32))
    want = occlusion_map(model, images, 1, box=5, stride=8)
    runs.clear()
    o = occlusion_map(model.bfloat16(), images, 1, box=5, stride=8)
    assert not runs and o.scores.dtype == torch.float32 and close(o.scores, want.scores, 0.1)


# ---- What is left as it was


class Bar:
    made = []
    disable = False

    def __init__(self, total, **options):
        self.total, self.steps = total, []
        Bar.made.append(self)

    def update(self, count):
        self.steps.append(count)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("bad", [(), (1,), (0, 1, 2)])
def test_progress_counts_positions(bad, engine, monkeypatch):
    monkeypatch.setattr("zfcore.progress.Drawn", Bar)
    Bar.made.clear()
    model, images = build("branches"), pictures(3)
    images[list(bad), 0, 0, 0] = math.nan
    o = occlusion_map(model, images, box=7, stride=5, batch_size=8, progress=True)
    (bar,) = Bar.made
    assert bar.total == o.scores.numel() == sum(bar.steps)
    assert len(bar.steps) > o.scores.numel() // 8 and sum(bar.steps[:3]) == 24


def test_a_real_bar_ends_at_its_total(engine, capfd):
    images = pictures(2)
    images[1, 0, 0, 0] = math.nan
    o = occlusion_map(build("branches"), images, box=7, stride=5, progress=True)
    assert f"{o.scores.numel()}/{o.scores.numel()}" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["dense", "factors below zero", "full layers"])
def test_the_model_and_the_caller_are_left_as_they_were(name, engine):
    model, images = build(name).train(), pictures(2)
    next(model.children()).eval()  # a mixture of modes must come back as it was
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    fill = torch.randn(2, 3, *SIZE)
    before, generator, given = state(model), torch.get_rng_state(), (images.clone(), fill.clone())
    occlusion_map(model, images, box=9, stride=7, fill=fill, feature=(model, 0), score="logit")
    assert engine and same_state(before, state(model))
    assert torch.equal(images, given[0]) and torch.equal(fill, given[1])
    assert torch.equal(torch.get_rng_state(), generator) and torch.is_grad_enabled()
    assert all((p.grad == 1).all() and p.requires_grad for p in model.parameters())


def test_a_score_that_raises_leaves_the_model_as_it_was(engine):
    model = build("branches").train()
    before = state(model)

    def fails(output):
        if len(output) > 2:
            raise RuntimeError("no score")
        return output[:, 0]

    with pytest.raises(RuntimeError, match="no score"):
        occlusion_map(model, pictures(2), box=7, stride=5, score=fails)
    assert engine and same_state(before, state(model)) and torch.is_grad_enabled()


def test_weights_that_change_between_calls_are_noticed(engine):
    model, images = build("branches"), pictures(1)
    for change in (
        lambda: None, lambda: model.wide.weight.data.mul_(-1), lambda: model.stem.weight.data.zero_(),
        lambda: model.full.load_state_dict({"weight": torch.randn(7, 16), "bias": torch.randn(7)}),
    ):  # fmt: skip
        change()
        equals_forwards(model, images, 7, 5)
    assert len(engine) == 4


# ---- Threads


def test_threads_that_share_a_model(engine):
    model = build("factors below zero")
    jobs = [(pictures(1 + s % 2, seed=s), s % 7) for s in range(4)]
    options = dict(box=7, stride=6, score="logit")
    want = [occlusion_map(model, x, u, feature=("3", u), **options) for x, u in jobs]
    wrong, start = [], threading.Barrier(len(jobs))

    def work(index):
        images, unit = jobs[index]
        start.wait()
        for _ in range(4):
            try:
                o = occlusion_map(model, images, unit, feature=("3", unit), **options)
                good = torch.equal(o.scores, want[index].scores) and torch.equal(o.activation, want[index].activation)
            except Exception as error:
                good, index = False, error
            if not good:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not any(module._forward_hooks for module in model.modules())


def test_two_calls_interleaved(engine, monkeypatch):
    """Batch by batch in turns: each call's buffers and filters are its own, though they share weights."""
    model, turns = build("branches"), threading.Barrier(2, timeout=60)
    jobs = [(pictures(2, seed=5), 0.5), (pictures(2, seed=6), -1.0)]

    def score(output):
        if in_turns:
            turns.wait()
        return output[:, 1] * 1.0

    in_turns = False
    want = [occlusion_map(model, x, box=7, stride=5, fill=f, batch_size=6, score=score) for x, f in jobs]
    in_turns, got = True, [None, None]

    def work(i):
        images, fill = jobs[i]
        got[i] = occlusion_map(model, images, box=7, stride=5, fill=fill, batch_size=6, score=score)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, wanted in zip(got, want, strict=True):
        assert torch.equal(ours.scores, wanted.scores)


def test_under_autocast(engine):
    """The parameters' own precision, whatever surrounds the call."""
    model, images = build("factors below zero"), pictures(2)
    want = occlusion_map(model, images, 1, box=7, stride=5, score="logit")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = occlusion_map(model, images, 1, box=7, stride=5, score="logit")
    assert len(engine) == 2 and o.scores.dtype == torch.float32 and torch.equal(o.scores, want.scores)


def test_under_inference_mode(engine):
    model, images = build("branches"), pictures(2)
    want = occlusion_map(model, images, box=7, stride=5)
    with torch.inference_mode():
        o = occlusion_map(model, images.clone(), box=7, stride=5)
    assert len(engine) == 2 and torch.equal(o.scores, want.scores) and not o.scores.is_inference()


@pytest.mark.parametrize("name", ["dense", "branches", "full layers", "depthwise separable"])
def test_narrow_products_are_close(name, engine, monkeypatch):
    """As on a CPU that multiplies bf16 in pairs; what has none unpacks them."""
    monkeypatch.setattr("zfcore.occlusion.pays", lambda precision, device: True)
    model, images = build(name), pictures(2)
    exact = occlusion_map(model, images, box=9, stride=7, score="logit")
    narrow = occlusion_map(model, images, box=9, stride=7, score="logit", precision="bf16")
    assert engine and close(narrow.scores, exact.scores, 2e-2)
    assert not torch.equal(narrow.scores, exact.scores) and torch.equal(narrow.clean, exact.clean)
