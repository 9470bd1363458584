"""What both functions do with a model and its images before they start: one gate, with the same words for both."""

import copy
import functools
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import zfcore
from zfcore.call import eagerly
from zfcore.errors import ArgumentError, DeviceError, DtypeError, LayerNotFound, ShapeError, UnsupportedOperation

pytestmark = pytest.mark.filterwarnings("ignore:zfcore. (the dense path|plain forwards)")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


class Unread(nn.Module):
    """A network that no tracer follows."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) if x.sum() < 1e9 else x


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def project(model, images=IMAGES, layer="", **options):
    return zfcore.deconv_project(model, images, layer, 1, **options)


def occlude(model, images=IMAGES, **options):
    return zfcore.occlusion_map(model, images, box=4, stride=4, **options)


BOTH = pytest.mark.parametrize("call", (project, occlude))


def compiled(model):
    return torch.compile(model, backend="eager")


# ---- Wrappers and layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, AveragedModel, lambda m: compiled(AveragedModel(m))])
def test_wrappers_are_looked_through(wrap):
    model = network()
    wrapped = wrap(copy.deepcopy(model))
    wanted = project(model, layer="3"), occlude(model, feature=("3", 2))
    for layer in ("3", "module.3", "_orig_mod.3", "_orig_mod.module.3"):
        assert torch.equal(project(wrapped, layer=layer, strict=True).pixels, wanted[0].pixels)
        found = occlude(wrapped, feature=(layer, 2), strict=True)
        assert torch.equal(found.scores, wanted[1].scores) and torch.equal(found.activation, wanted[1].activation)
        assert found.path == "engine" and found.reason == ""
    for name in ("module.33", "net.3", "_orig_mod"):
        if name != "_orig_mod":
            with pytest.raises(LayerNotFound):
                project(wrapped, layer=name)
            with pytest.raises(LayerNotFound):
                occlude(wrapped, feature=(name, 2))
    assert torch.equal(project(wrapped, layer=wrapped).pixels, project(model, layer=model).pixels)


@pytest.mark.parametrize("wrap", [lambda m: m, compiled, nn.DataParallel, Unread])
def test_no_name_and_the_model_are_its_output(wrap):
    model = wrap(network())
    wanted = project(network(), layer="7")
    for layer in ("", model):
        found = project(model, layer=layer)
        torch.testing.assert_close(found.pixels, wanted.pixels)
        assert found.layer == ""
        total = occlude(model, feature=(layer, 1), score="logit", targets=1)
        torch.testing.assert_close(total.activation, total.scores)


@BOTH
@pytest.mark.parametrize("unread", (False, True))
def test_inner_compiled_parts_run_eagerly(call, unread):
    runs = []

    def backend(graph, _):
        runs.append(graph)
        return graph.forward

    model = network()
    wanted = call(Unread(copy.deepcopy(model)) if unread else copy.deepcopy(model))
    for index in (0, 3):
        model[index] = torch.compile(model[index], backend=backend)
    model[4].compile(backend=backend)
    found = call(Unread(model) if unread else model)
    name = "pixels" if call is project else "scores"
    torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
    assert not runs
    model(IMAGES)
    assert runs  # compiled again once the call has ended


def test_threads_turn_the_compiler_back_on_together():
    compiled(nn.ReLU())(torch.ones(1))  # so that the compiler is there
    from torch._dynamo import eval_frame

    first, second = eagerly(), eagerly()
    barrier = threading.Barrier(2)

    def other():
        with second:
            barrier.wait()
            barrier.wait()

    thread = threading.Thread(target=other)
    with first:
        thread.start()
        barrier.wait()
    assert eval_frame._stance.stance == "force_eager"
    barrier.wait()
    thread.join()
    assert eval_frame._stance.stance == "default"


# ---- Models that cannot be called --------------------------------------------------------------------------


@BOTH
def test_lazy_models_are_refused_and_stay_lazy(call):
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ArgumentError, match="model: '0.weight' has no shape yet; expected a model that has run once"):
        call(model)
    assert isinstance(model[0], nn.LazyConv2d)


@BOTH
def test_the_meta_device_holds_no_model_and_no_images(call):
    with torch.device("meta"):
        model = network()
    with pytest.raises(DeviceError, match="model: '0.weight' is on the meta device"):
        call(model)
    with pytest.raises(DeviceError, match="images: on the meta device"):
        call(network(), IMAGES.to("meta"))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, mask, *more, scale=1.0, bias):
        return self.net(x * mask)


@BOTH
def test_models_that_need_more_than_images(call):
    with pytest.raises(ArgumentError, match="model: Two.forward needs 'mask' and 'bias' besides the images"):
        call(Two())
    hooked = Two()
    hooked.register_forward_pre_hook(lambda m, args, kwargs: ((args[0], 1.0), {"bias": 0}), with_kwargs=True)
    call(hooked)
    given = Two()
    given.forward = functools.partial(given.forward, mask=1.0, bias=0)
    call(given)


@BOTH
def test_what_is_no_module(call):
    with pytest.raises(DtypeError, match="model: a str; expected a torch.nn.Module"):
        call("resnet")


# ---- Images ------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (lambda x: x.to_sparse(), "images: a torch.sparse_coo tensor; expected a dense one"),
        (lambda x: x.to_mkldnn(), "images: a torch._mkldnn tensor"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "images: a quantised tensor"),
        (lambda x: torch.nested.nested_tensor(list(x)), "images: a nested tensor"),
        (lambda x: x.int(), "images: torch.int32; expected a floating point dtype"),
        (lambda x: x.numpy(), "images: a ndarray; expected a tensor"),
    ],
)
def test_images_that_are_no_dense_floats(call, kind, words):
    with pytest.raises(DtypeError, match=words):
        call(network(), kind(IMAGES))


@BOTH
@pytest.mark.parametrize("unread", (False, True))
@pytest.mark.parametrize("images", (IMAGES[:, :1], IMAGES[:, :, :3, :3], torch.cat([IMAGES, IMAGES], 1)))
def test_images_that_do_not_fit(call, unread, images):
    model = Unread(network()) if unread else network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if unread else "error")
        with pytest.raises(ShapeError, match="images"):
            call(model, images)


@BOTH
def test_an_exported_program_for_images_of_another_size(call):
    exported = torch.export.export(network(), (torch.randn(1, 3, 12, 12),)).module()
    with pytest.raises(ShapeError, match=r"images: shape \(1, 3, 16, 16\).*Guard failed"):
        call(exported, IMAGES[:1])


@BOTH
@pytest.mark.parametrize("unread", (False, True))
def test_a_batch_size_larger_than_any_number_of_torch(call, unread):
    call(Unread(network()) if unread else network(), batch_size=10**25)


@BOTH
def test_an_error_of_the_models_own_code_is_not_said_of_the_images(call):
    def fails(x):
        raise RuntimeError("on purpose")

    model = network()
    model.append(Unread(nn.Identity()))
    model[-1].forward = fails
    with pytest.raises(RuntimeError, match="^on purpose$"):
        call(model)


@BOTH
def test_another_default_device(call):
    model = network()
    wanted = [call(model), call(Unread(model))]
    with torch.device("meta"):
        found = [call(model), call(Unread(model))]
    for a, b in zip(wanted, found, strict=True):
        for name in ("pixels", "boxes", "positions") if call is project else ("scores", "labels", "boxes", "targets"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_another_default_device_with_every_argument():
    model = network()
    options = dict(targets=[1, 2], fill=[0.1, 0.2, 0.3], feature=("3", [1, 2]), mode="adaptive", stride=2)
    wanted = zfcore.occlusion_map(model, IMAGES, box=4, **options)
    with torch.device("meta"):
        found = zfcore.occlusion_map(model, IMAGES, box=4, **options)
        assert not found.heatmap().is_meta
    assert torch.equal(found.scores, wanted.scores) and torch.equal(found.activation, wanted.activation)


# ---- Which path --------------------------------------------------------------------------------------------


def test_an_occlusion_map_says_which_path_it_took():
    model = network()
    assert (occlude(model).path, occlude(model).reason) == ("engine", "")
    unread = occlude(Unread(model))
    assert unread.path == "forwards" and "Unread" in unread.reason
    whole = zfcore.occlusion_map(model, IMAGES, box=16, stride=16, strict=True)
    if whole.path == "forwards":
        assert "work" in whole.reason


def test_strict_refuses_dtypes_and_weights_that_keep_the_engine_out():
    half = network().bfloat16()
    assert occlude(half).path == "forwards" and "torch.bfloat16" in occlude(half).reason
    with pytest.raises(UnsupportedOperation, match="torch.bfloat16"):
        occlude(half, strict=True)
    infinite = network()
    infinite[3].weight.data[0, 0, 0, 0] = torch.inf
    assert "not finite" in occlude(infinite, score="logit").reason
    with pytest.raises(UnsupportedOperation, match="not finite"):
        occlude(infinite, score="logit", strict=True)


@pytest.mark.parametrize("batch", (1, 2, 5))
@pytest.mark.parametrize("count", (1, 3))
def test_exported_programs_of_one_batch_size(batch, count):
    model = network()
    exported = torch.export.export(model, (torch.randn(batch, 3, 16, 16),)).module()
    images = torch.cat([IMAGES, IMAGES[:1] * 2])[:count]
    wanted = occlude(model, images, score=lambda out: out[:, 2])
    for score in (lambda out: out[:, 2], lambda out: out.softmax(1)[:, 1], "logit"):
        found = occlude(exported, images, score=score)
        assert found.scores.shape == wanted.scores.shape
    found = occlude(exported, images, score=lambda out: out[:, 2])
    torch.testing.assert_close(found.scores, wanted.scores)
    torch.testing.assert_close(found.labels, wanted.labels)


# ---- Outputs that are no logits ----------------------------------------------------------------------------


class Ends(nn.Module):
    def __init__(self, function, classes=5):
        super().__init__()
        self.net, self.function = network(), function
        self.net[7] = nn.Linear(8, classes)

    def forward(self, x):
        return self.function(self.net(x))


@pytest.mark.parametrize("unread", (False, True))
@pytest.mark.parametrize(
    ("function", "classes"),
    [
        (torch.sigmoid, 2),
        (lambda x: torch.sigmoid(x)[:, None].squeeze(1), 2),
        (F.hardsigmoid, 3),
        (lambda x: x.view(len(x), 2, -1).softmax(2).flatten(1), 6),
        (lambda x: 1 / (1 + (-x).exp()), 10),
        (lambda x: x.sigmoid().detach(), 10),
        (lambda x: (x / 10 + 0.5).clamp(0, 1), 10),
    ],
)
def test_outputs_of_sigmoids_are_refused(function, classes, unread):
    model = Ends(function, classes)
    model = Unread(model) if unread else model
    with pytest.raises(ArgumentError, match="outputs all lie in 0..1, as a sigmoid's do; expected score='logit'"):
        occlude(model)
    occlude(model, score="logit")
    occlude(model, score=lambda out: out[:, 0])


@pytest.mark.parametrize("unread", (False, True))
@pytest.mark.parametrize("function", [lambda x: x, F.relu, lambda x: x[:, :, None].mean(2), lambda x: x * 1.0])
def test_logits_that_happen_to_lie_in_0_to_1_are_taken(function, unread):
    model = Ends(function, 3)
    nn.init.constant_(model.net[7].weight, 0.0)
    model.net[7].bias.data = torch.tensor([0.2, 0.9, 0.4])
    model = Unread(model) if unread else model
    found = occlude(model)
    torch.testing.assert_close(found.clean, torch.tensor([0.2, 0.9, 0.4]).softmax(0)[1].expand(2))


def test_the_look_at_the_last_operation_leaves_the_model_as_it_was():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return x.sigmoid()

    model = Unread(nn.Sequential(network(), Counts()))
    with pytest.raises(ArgumentError, match="sigmoid"):
        occlude(model)
    assert model.net[1].count == 0
