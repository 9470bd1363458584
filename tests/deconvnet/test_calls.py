"""What a call takes and refuses, and what it leaves behind: nothing, whatever happens, from any number of threads."""

import random
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from deconvnet_networks import Controlled, Op, make
from torch import nn

import zfcore
from zfcore.errors import ArgumentError, DtypeError, LayerNotFound, ShapeError, UnitNotFound, UnsupportedOperation


@pytest.fixture
def vgg():
    return make("vgg")


def everything_of(model):
    return {
        "training": [module.training for module in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "grads": [p.grad is None for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "values": [p.detach().clone() for p in (*model.parameters(), *model.buffers())],
        "random": (torch.get_rng_state(), random.getstate()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    }


def assert_same(before, after):
    for name in before:
        for a, b in zip(before[name], after[name], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


WRONG = [
    (dict(layer="0.99"), LayerNotFound, "0.99.*nearest"),
    (dict(layer="0.10@3"), LayerNotFound, "0.10@3"),
    (dict(layer=7), LayerNotFound, "layer=7"),
    (dict(layer=nn.ReLU()), LayerNotFound, "ReLU"),
    (dict(units=[0, 16]), UnitNotFound, "units: 16.*0 to 15"),
    (dict(units=-1), UnitNotFound, "units: -1"),
    (dict(units=[]), ArgumentError, "units"),
    (dict(units=True), DtypeError, "units=True"),
    (dict(units=1.5), DtypeError, "units=1.5"),
    (dict(units=torch.tensor([True, False])), DtypeError, "units"),
    (dict(rule="relu"), ArgumentError, "rule='relu'.*guided"),
    (dict(seed=1), ArgumentError, "seed=1"),
    (dict(overlap="first"), ArgumentError, "overlap='first'"),
    (dict(crop=1), DtypeError, "crop=1"),
    (dict(strict=None), DtypeError, "strict=None"),
    (dict(batch_size=0), ArgumentError, "batch_size=0"),
    (dict(batch_size=2.0), ArgumentError, "batch_size=2.0"),
    (dict(positions="min"), ArgumentError, "positions='min'"),
    (dict(positions=[(0, 0)]), DtypeError, "positions"),
    (dict(positions=torch.zeros(2, 16, 2)), DtypeError, "positions"),
    (dict(positions=torch.zeros(2, 3, 2, dtype=torch.int64)), ShapeError, r"positions.*\[2, 16, 2\]"),
    (dict(positions=torch.full((2, 16, 2), 8)), UnitNotFound, r"positions: \(8, 8\).*\(8, 8\)"),
    (dict(images=torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), DtypeError, "images.*uint8"),
    (dict(images="cat.png"), DtypeError, "images: a str"),
    (dict(images=torch.zeros(32, 32)), ShapeError, r"images.*\(32, 32\)"),
    (dict(images=torch.zeros(1, 3, 0, 32)), ShapeError, "images"),
    (dict(images=torch.zeros(1, 4, 32, 32)), ShapeError, "images"),
    (dict(images=torch.zeros(1, 3, 2, 2)), ShapeError, "images"),
    (dict(model="vgg"), DtypeError, "model: a str"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments_are_named(vgg, change, error, message):
    model, images = vgg
    model.train()
    before = everything_of(model)
    arguments = {**dict(model=model, images=images, layer="0.10"), **change}
    with pytest.raises(error, match=message):
        zfcore.deconv_project(**arguments)
    with pytest.raises(error, match=message):
        zfcore.iter_projections(**arguments)
    assert_same(before, everything_of(model))


def test_iter_projections_names_an_unknown_option(vgg):
    with pytest.raises(ArgumentError, match="stride"):
        zfcore.iter_projections(*vgg, "0.10", stride=3)


@pytest.mark.parametrize("layer", ["0.2", "0.4", "0.10", "2", "5"])
@pytest.mark.parametrize("dense", [False, True])
def test_no_images(vgg, layer, dense):
    model, images = vgg
    if dense:
        model, layer = Controlled(model).eval(), f"net.{layer}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = zfcore.deconv_project(model, images, layer, [0, 1], crop=True)
        none = zfcore.deconv_project(model, images[:0], layer, [0, 1], crop=True)
    for name in ("pixels", "boxes", "activations", "positions", "images", "units"):
        a, b = getattr(one, name), getattr(none, name)
        assert (0, *a.shape[1:]) == b.shape and a.dtype == b.dtype


def test_units_and_images_in_every_spelling(vgg):
    model, images = vgg
    expected = zfcore.deconv_project(model, images[:1], "0.7", [4])
    for units in (4, (4,), range(4, 5), torch.tensor(4), torch.tensor([4]), torch.tensor([4]).numpy()):
        assert torch.equal(zfcore.deconv_project(model, images[0], "0.7", units).pixels, expected.pixels)
    for layer in (model[0][7], "0.7@0"):
        assert torch.equal(zfcore.deconv_project(model, images[:1], layer, 4).pixels, expected.pixels)
    assert zfcore.deconv_project(model, images, "0.7").units[1].tolist() == list(range(12))


class Fails(nn.Module):
    def __init__(self, module, when):
        super().__init__()
        self.module, self.when = module, when

    def forward(self, x):
        if self.when():
            raise KeyError("on purpose")
        return self.module(x)


METHODS = [
    dict(),
    dict(positions="all"),
    dict(rule="guided"),
    dict(rule="gradient", seed="one"),
    dict(overlap="last"),
    dict(crop=True, batch_size=1),
]


@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("failing", [None, 0, 3, 9, 12])
def test_nothing_is_left_behind(vgg, failing, dense, options):
    model, images = vgg
    if failing is not None:
        model[0][failing] = Fails(model[0][failing], lambda: True)
    model.train()
    model[0][1].eval()  # each module has its own mode
    model[2].weight.requires_grad_(False)
    whole = Controlled(model) if dense else model
    before = everything_of(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if failing is None:
            zfcore.deconv_project(whole, images, "net.0.12" if dense else "0.12", 1, **options)
        else:
            with pytest.raises(KeyError, match="on purpose"):
                zfcore.deconv_project(whole, images, "net.0.12" if dense else "0.12", 1, **options)
    assert_same(before, everything_of(whole))


def test_a_job_gives_the_model_back_between_batches(vgg):
    model, images = vgg
    model.train()
    job = zfcore.iter_projections(model, images, "5", batch_size=3)
    for _ in range(3):
        next(job)
        assert all(module.training for module in model.modules())
        assert torch.is_grad_enabled()
    del job


def test_signals_are_freed(vgg):
    model, images = vgg
    seen = [weakref.ref(part.pixels) for part in zfcore.iter_projections(model, images, "0.10", batch_size=4)]
    assert len(seen) == 8 and not any(ref() is not None for ref in seen[:-1])


@pytest.mark.parametrize("mode", ["inference", "autocast", "no_grad"])
@pytest.mark.parametrize("dense", [False, True])
def test_modes_of_the_caller_change_nothing(vgg, mode, dense):
    model, images = vgg
    layer = "5"
    if dense:
        model, layer = Controlled(model).eval(), "net.5"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = zfcore.deconv_project(model, images, layer, [0, 1])
        contexts = {
            "inference": torch.inference_mode(),
            "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
            "no_grad": torch.no_grad(),
        }
        with contexts[mode]:
            found = zfcore.deconv_project(model, images * 1.0, layer, [0, 1])
    assert found.pixels.dtype == torch.float32 and torch.equal(found.pixels, expected.pixels)


@pytest.mark.parametrize("dense", [False, True])
def test_eight_threads_share_one_model(dense):
    model, images = make("resnet")
    prefix = "net." if dense else ""
    model = Controlled(model) if dense else model
    model.train()
    jobs = [("layer1", "deconvnet"), ("layer2.0.relu@0", "guided"), ("fc", "gradient"), ("maxpool", "deconvnet")]

    def work(layer, rule):
        return zfcore.deconv_project(model, images, prefix + layer, [0, 2], rule=rule).pixels

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [work(*job) for job in jobs]
        wrong, errors = [], []

        def run(which):
            try:
                for i in range(6):
                    k = (which + i) % len(jobs)
                    if not torch.equal(work(*jobs[k]), expected[k]):
                        wrong.append(jobs[k])
            except Exception as error:  # noqa: BLE001 (a thread's own traceback would be lost)
                errors.append(error)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors and not wrong
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_runs_in_another_thread_is_not_traced(vgg):
    model, images = vgg
    other, others_images = make("resnet")
    stop, outputs = threading.Event(), []
    expected = other(others_images)

    def run():
        while not stop.is_set():
            outputs.append(other(others_images))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(30):
            zfcore.deconv_project(model, images, "0.1", 0, strict=True)
    finally:
        stop.set()
        thread.join()
    assert outputs and all(torch.equal(out, expected) for out in outputs)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models_are_what_they_wrap(vgg, wrap):
    model, images = vgg
    wrapped = wrap(model)
    expected = zfcore.deconv_project(model, images, "0.7", 2).pixels
    for layer in ("0.7", "module.0.7", "_orig_mod.0.7", model[0][7]):
        assert torch.equal(zfcore.deconv_project(wrapped, images, layer, 2, strict=True).pixels, expected)
    with pytest.raises(LayerNotFound):
        zfcore.deconv_project(wrapped, images, "module.0.70")


def test_a_model_without_shapes_is_refused():
    model = nn.Sequential(nn.LazyConv2d(4, 3))
    with pytest.raises(ArgumentError, match="model: '0.weight' has no shape yet"):
        zfcore.deconv_project(model, torch.randn(1, 3, 8, 8), "0")


def test_torchscript_layers_are_refused():
    """What a module inside a script returns cannot be seen; the whole script's output can."""
    model = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8))
    images = torch.randn(1, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsupportedOperation, match="TorchScript"):
            zfcore.deconv_project(model, images, "1")
    plain = nn.Sequential(model, nn.Conv2d(4, 2, 3))
    assert zfcore.deconv_project(plain, images, "1", strict=True).path == "engine"


@pytest.mark.parametrize(
    "pool",
    [lambda x: F.max_pool2d(x, 3, 1, return_indices=True)[0], lambda x: zfcore.ops.max_pool2d_with_switches(x, 3, 1)[0]],
    ids=["indices", "switches"],
)  # fmt: skip
def test_dense_pools_that_return_places_keep_the_last_too(pool):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 1), nn.Conv2d(4, 2, 3))
    same = nn.Sequential(plain[0], Op(pool), plain[2])
    images = torch.randn(2, 3, 12, 12)
    expected = zfcore.deconv_project(plain, images, "2", overlap="last", strict=True).pixels
    assert not torch.allclose(expected, zfcore.deconv_project(plain, images, "2").pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = zfcore.deconv_project(Controlled(same), images, "net.2", overlap="last")
    torch.testing.assert_close(found.pixels, expected)


def test_nan_and_infinity_in_the_images_are_no_error(vgg):
    model, images = vgg
    images[0, 0, 5, 5] = torch.nan
    images[1, 1, 9, 9] = torch.inf
    found = zfcore.deconv_project(model, images, "0.2", 0)
    assert not found.activations[0].isnan().any()  # NaN is passed over
    assert found.pixels[0].isfinite().all()
    assert zfcore.deconv_project(model, images[:1] * torch.nan, "0.2", 0).pixels.isnan().any()


def test_a_layer_that_does_not_depend_on_the_image_is_refused():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.layer = nn.Conv2d(3, 4, 3), nn.Conv2d(2, 3, 3)
            self.register_buffer("pattern", torch.randn(1, 2, 8, 8))

        def forward(self, x):
            y = self.layer(self.pattern.expand(len(x), -1, -1, -1)) if bool(x.isfinite().all()) else None
            return self.conv(x).mean() + y.mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsupportedOperation, match="'layer'.*cut off from the images"):
            zfcore.deconv_project(Apart(), torch.randn(2, 3, 9, 9), "layer", [0, 1])
