"""Networks that no tracer can follow, and every way to write a ReLU, by autograd with the rules on each
operation.
"""

from __future__ import annotations

import random
import threading
import types
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from deconvnet_networks import Attention, Controlled, make, randomise
from deconvnet_oracle import project
from test_projection import close
from torch import nn

import zfcore
from zfcore.errors import ArgumentError, UnsupportedOperation
from zfcore.network import kept

pytestmark = pytest.mark.filterwarnings("ignore:zfcore. the dense path")


def unread(*args, **kwargs):
    raise UnsupportedOperation("a network that is not read")


@pytest.mark.parametrize("rule", ("deconvnet", "guided", "gradient"))
@pytest.mark.parametrize("layer", ("stem", "conv", "head"))
def test_attention(layer, rule, monkeypatch):
    model = randomise(Attention())
    images = torch.randn(2, 3, 32, 32)
    p = zfcore.deconv_project(model, images, layer, [0, 3], rule=rule)
    assert p.path == "engine"
    close(p.pixels, project(model, images, layer, [0, 3], p.positions, rule=rule)[0], torch.float32)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr("zfcore.deconvnet.read_network", unread)
        dense = zfcore.deconv_project(model, images, layer, [0, 3], positions=p.positions, rule=rule)
    assert dense.path == "dense"
    close(dense.pixels, p.pixels.double(), torch.float32)


class Rectifiers(nn.Module):
    """Every way to write a ReLU, some of them in place without using the result."""

    def __init__(self, traceable):
        super().__init__()
        self.traceable = traceable
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(9))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        if not self.traceable and x.sum() > 1e9:
            return x
        c = self.convs
        x = c[0](x)
        F.relu(x, inplace=True)
        x = c[1](x)
        x.relu_()
        x = torch.relu(c[2](x))
        x = c[3](x).relu()
        x = c[4](x).clamp(min=0)
        x = F.relu_(c[5](x)) + self.relu(x)
        x = self.relu(c[6](x))
        y = c[7](x)
        z = y
        torch.relu_(y)
        return c[8](z).clamp_min(0)


@pytest.mark.parametrize("traceable", (True, False))
@pytest.mark.parametrize("rule", ("deconvnet", "guided", "gradient"))
def test_every_spelling_of_relu(rule, traceable):
    model = randomise(Rectifiers(traceable))
    images = torch.randn(2, 3, 12, 11)
    for layer in ("convs.8", "convs.5", "convs.0"):
        p = zfcore.deconv_project(model, images, layer, [1, 2], rule=rule)
        assert p.path == ("engine" if traceable else "dense")
        close(p.pixels, project(model, images, layer, [1, 2], p.positions, rule=rule)[0], torch.float32)


@pytest.mark.parametrize("batch_size", (1, 3, 25, None))
def test_dense_batches_equal_single_images(batch_size):
    model, images = make("resnet")
    model = Controlled(model)
    images = torch.cat([images] * 2)
    positions = torch.randint(6, (4, 12, 2))
    for where in ("max", positions):
        many = zfcore.deconv_project(model, images, "net.layer2.0", positions=where, batch_size=batch_size)
        at = where if isinstance(where, str) else where[3:]
        one = zfcore.deconv_project(model, images[3], "net.layer2.0", positions=at)
        close(many.pixels[3], one.pixels[0].double(), torch.float32)
        assert torch.equal(many.positions[3], one.positions[0]) and many.units[3].tolist() == list(range(12))
    parts = list(
        zfcore.iter_projections(model, images, "net.layer2.0", positions=positions, batch_size=batch_size)
    )
    assert max(len(part.pixels) for part in parts) <= (batch_size or 48)
    close(
        torch.cat([part.pixels for part in parts]).unflatten(0, (4, 12)), many.pixels.double(), torch.float32
    )


def test_a_model_without_gradient_is_refused():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            with torch.no_grad():
                return self.conv(torch.fft.fft(x).real)

    with pytest.raises(UnsupportedOperation, match="cut off from the images"):
        zfcore.deconv_project(Frozen(), torch.ones(1, 3, 8, 8), "conv", [0])


def test_says_what_keeps_the_engine_out():
    model, images = make("vgg")
    model[1] = nn.FractionalMaxPool2d(2, output_size=2)
    model.append(nn.Flatten())
    with pytest.warns(UserWarning, match=r"'1' \(FractionalMaxPool2d\)") as caught:
        p = zfcore.deconv_project(model[:2], images, "1", [0])
    assert caught[0].filename == __file__
    assert p.path == "dense" and "'1' (FractionalMaxPool2d)" in p.reason
    with pytest.raises(UnsupportedOperation, match=r"'1' \(FractionalMaxPool2d\)"):
        zfcore.deconv_project(model[:2], images, "1", [0], strict=True)
    with pytest.raises(UnsupportedOperation, match=r"\(Controlled\).*control flow"):
        zfcore.deconv_project(Controlled(model[0]), images, "net.0", [0], strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zfcore.deconv_project(model, images, "0.12", [0], strict=True)  # all that counts is readable


def test_batches_of_a_job_warn_once():
    model, images = make("vgg")
    with pytest.warns(UserWarning) as caught:
        list(zfcore.iter_projections(Controlled(model), images, "net.0.5", batch_size=2))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_random_networks_do_not_move_the_callers_generator():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(F.dropout(x, 0.5, training=True))

    model = Random()
    before = torch.get_rng_state()
    p = zfcore.deconv_project(model, torch.ones(1, 3, 8, 8), "conv", [0])
    assert p.path == "dense"
    assert torch.equal(torch.get_rng_state(), before)


# ---- The rules act on ATen operations, however they are called ---------------------------------------------


class Written(nn.Module):
    """Two convolutions with a function between, which no tracer follows."""

    def __init__(self, function):
        super().__init__()
        self.c1, self.c2, self.function = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), function

    def forward(self, x):
        return self.c2(self.function(self.c1(x))) if x.sum() < 1e9 else x


aten, built_in = torch.ops.aten, torch._C._nn


@torch.jit.script
def scripted(x):
    return F.relu(x) * 1.0


@torch.jit.script
def scripted_before(x):
    return F.relu(x) * 1.0


def in_place_on_a_view(function):
    def run(x):
        function(x.view(len(x), -1))
        return x

    return run


def of_a_transpose(x):
    x = x.transpose(2, 3)
    torch.relu_(x)
    return x.transpose(2, 3)


def capped(x):
    return F.relu6(x)


def leaky(x):
    return F.leaky_relu(x, negative_slope=0.2)


SPELLINGS = {
    "aten.relu": (aten.relu, F.relu),
    "aten.relu.default": (aten.relu.default, F.relu),
    "aten.relu_": (lambda x: aten.relu_(x * 1.0), F.relu),
    "aten.clamp": (lambda x: aten.clamp(x, 0), F.relu),
    "aten.clamp_min": (lambda x: aten.clamp_min(x, 0), F.relu),
    "aten.clamp_min_": (lambda x: aten.clamp_min_(x, 0.0), F.relu),
    "aten.threshold": (lambda x: aten.threshold(x, 0, 0), F.relu),
    "aten.threshold_": (lambda x: aten.threshold_(x, 0, 0), F.relu),
    "aten.hardtanh": (lambda x: aten.hardtanh(x, 0, 6), capped),
    "aten.hardtanh_": (lambda x: aten.hardtanh_(x, 0, 6), capped),
    "aten.relu6": (aten.relu6, capped),
    "_nn.relu6": (built_in.relu6, capped),
    "_nn.relu6_": (built_in.relu6_, capped),
    "clip to 6": (lambda x: x.clip(0, 6), capped),
    "_nn.leaky_relu": (lambda x: built_in.leaky_relu(x, 0.2), leaky),
    "_nn.leaky_relu_": (lambda x: built_in.leaky_relu_(x, 0.2), leaky),
    "aten.leaky_relu": (lambda x: aten.leaky_relu(x, 0.2), leaky),
    "scripted": (scripted, F.relu),
    "scripted before": (scripted_before, F.relu),
    "vmap": (torch.func.vmap(torch.relu), F.relu),
    "relu_ of a view": (in_place_on_a_view(torch.relu_), F.relu),
    "F.relu of a view": (in_place_on_a_view(lambda x: F.relu(x, inplace=True)), F.relu),
    "aten.relu_ of a view": (in_place_on_a_view(aten.relu_), F.relu),
    "relu6 of a view": (in_place_on_a_view(lambda x: F.relu6(x, True)), capped),
    "clamp_ of a view": (in_place_on_a_view(lambda x: x.clamp_(min=0)), F.relu),
    "leaky relu of a view": (in_place_on_a_view(lambda x: F.leaky_relu(x, 0.2, inplace=True)), leaky),
    "relu_ of a transpose": (of_a_transpose, F.relu),
    "reentrant checkpoint": (lambda x: torch.utils.checkpoint.checkpoint(F.relu, x, use_reentrant=True), F.relu),
    "checkpoint": (lambda x: torch.utils.checkpoint.checkpoint(F.relu, x, use_reentrant=False), F.relu),
}


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("rule", ("deconvnet", "guided", "gradient"))
@pytest.mark.parametrize("name", SPELLINGS)
def test_rules_however_an_operation_is_called(name, rule):
    function, same = SPELLINGS[name]
    if name == "scripted before":  # and made one node of several operations by what ran it
        for _ in range(4):
            function(torch.randn(2, 3, requires_grad=True))
    model = randomise(Written(function))
    images = torch.randn(2, 3, 12, 11)
    p = zfcore.deconv_project(model, images, "c2", [1, 2], rule=rule)
    assert p.path == "dense"
    model.function = same
    close(p.pixels, project(model, images, "c2", [1, 2], p.positions, rule=rule)[0], torch.float32)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("runs", (0, 4))
def test_torchscript_inside_a_model(runs):
    inner = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.LeakyReLU(0.2)).eval()
    model, images = Written(torch.jit.script(inner)), torch.randn(2, 3, 12, 11)
    for _ in range(runs):  # after which TorchScript may have made one node of several operations
        model(images.clone().requires_grad_())
    p = zfcore.deconv_project(model, images, "c2", [1, 2])
    with pytest.raises(UnsupportedOperation, match="'function.1' is a TorchScript module"):
        zfcore.deconv_project(model, images, "function.1", [1, 2])
    model.function = inner
    close(p.pixels, project(model, images, "c2", [1, 2], p.positions)[0], torch.float32)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clamp(min=0.1), lambda x: x.clamp(max=1), lambda x: F.hardtanh(x), lambda x: F.threshold(x, 0.1, 0),
        lambda x: F.threshold(x, 0, 3.0), lambda x: aten.threshold(x, 0, 3), lambda x: F.leaky_relu(x, -0.5),
        lambda x: F.prelu(x, torch.full((1,), 0.2)), lambda x: torch.clamp(x, torch.zeros(())), torch.sigmoid,
    ],
)  # fmt: skip
def test_what_is_no_rectifier_has_its_gradient(function):
    model, images = Written(function), torch.randn(1, 3, 9, 9)
    found, wanted = (zfcore.deconv_project(model, images, "c2", [1], rule=rule) for rule in ("deconvnet", "gradient"))
    assert torch.equal(found.pixels, wanted.pixels)


@pytest.mark.parametrize("rule", ("deconvnet", "guided", "gradient"))
@pytest.mark.parametrize("batch", (1, 2, None))
def test_exported_programs(batch, rule):
    plain = randomise(
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.ReLU6(), nn.AvgPool2d(2),
            nn.Conv2d(5, 4, 1),
        )  # fmt: skip
    )
    images = torch.randn(3, 3, 16, 16)
    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(plain, (images[: batch or 2],), dynamic_shapes=shapes).module()
    found = zfcore.deconv_project(exported, images, "", [1, 2], rule=rule)
    close(found.pixels, project(plain, images, "6", [1, 2], found.positions, rule=rule)[0], torch.float32)
    assert found.pixels.shape[:2] == (3, 2)


class Pools(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.c1, self.c2, self.pool = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), pool

    def forward(self, x):
        return self.c2(self.pool(self.c1(x))) if x.sum() < 1e9 else x


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.max_pool2d(x, 3, 1, 1), lambda x: aten.max_pool2d(x, [3, 3], [1, 1], [1, 1]),
        lambda x: torch.stack([F.max_pool2d(each, 3, 1, 1) for each in x]),
        lambda x: zfcore.ops.max_pool2d_with_switches(x, 3, 1, 1)[0],
        lambda x: torch.stack([zfcore.ops.max_pool2d_with_switches(each, 3, 1, 1)[0] for each in x]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("overlap", ("sum", "last"))
def test_pools_however_they_are_called(pool, overlap):
    model, images = Pools(pool), torch.randn(2, 3, 12, 12)
    p = zfcore.deconv_project(model, images, "c2", [0, 1], overlap=overlap)
    assert p.path == "dense"
    model.pool = lambda x: F.max_pool2d(x, 3, 1, 1)
    close(p.pixels, project(model, images, "c2", [0, 1], p.positions, overlap=overlap)[0], torch.float32)


def test_a_pool_with_too_many_taps_keeps_no_last():
    model = Pools(lambda x: F.max_pool2d(x, 16, 1))
    zfcore.deconv_project(model, torch.randn(1, 3, 32, 32), "c2", [0])
    with pytest.raises(ArgumentError, match="at most 255 taps"):
        zfcore.deconv_project(model, torch.randn(1, 3, 32, 32), "c2", [0], overlap="last")


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x)))


def test_a_function_with_a_backward_of_its_own_keeps_it():
    model, images = Written(lambda x: Swish.apply(x).relu()), torch.randn(2, 3, 9, 9)
    p = zfcore.deconv_project(model, images, "c2", [1, 2])
    close(p.pixels, project(model, images, "c2", [1, 2], p.positions)[0], torch.float32)


@pytest.mark.parametrize("frozen", (True, False))
@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x.detach().relu(), lambda x: x.data, lambda x: torch.from_numpy(x.detach().numpy() * 2),
        torch.no_grad()(torch.relu), lambda x: torch.zeros_like(x), lambda x: (x > 0).float(),
    ],
)  # fmt: skip
def test_a_signal_that_is_cut_is_refused(cut, frozen):
    model = Written(cut).requires_grad_(not frozen)
    with pytest.raises(UnsupportedOperation, match="'c2'.*its output is cut off from the images"):
        zfcore.deconv_project(model, torch.ones(1, 3, 9, 9), "c2", [0])
    zfcore.deconv_project(model, torch.ones(1, 3, 9, 9), "c1", [0])


def test_a_gate_that_is_cut_is_a_constant():
    model = Written(lambda x: x * x.detach().sigmoid())
    p = zfcore.deconv_project(model, torch.randn(1, 3, 9, 9), "c2", [0])
    close(p.pixels, project(model, *at(p), rule="deconvnet")[0], torch.float32)


def at(p):
    torch.manual_seed(0)
    Written(None)
    return torch.randn(1, 3, 9, 9), "c2", [0], p.positions


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = Written(torch.relu)
        model.register_buffer("shift", torch.ones(1))
    images = torch.randn(2, 3, 9, 9)
    for layer in ("c1", "c2"):
        p = zfcore.deconv_project(model, images, layer, [1, 2])
        same = randomise(Written(torch.relu))
        same.load_state_dict(model.state_dict(), strict=False)
        close(p.pixels, project(same, images, layer, [1, 2], p.positions)[0], torch.float32)
    assert model.c1.weight.is_inference()


@pytest.mark.parametrize("split", [
    lambda x: x.chunk(2, 1), lambda x: torch.split(x, 3, dim=1), lambda x: torch.tensor_split(x, 2, 1),
    lambda x: x.split([3, 3], 1), lambda x: aten.split.Tensor(x, 3, 1),
])  # fmt: skip
def test_work_in_place_on_one_of_several_views(split):
    def in_place(x):
        a, b = split(x)
        a.mul_(2)
        b.relu_()
        return torch.cat([b, a], 1)

    def beside(x):
        a, b = x.chunk(2, 1)
        return torch.cat([b.relu(), a * 2], 1)

    model, images = Written(in_place), torch.randn(2, 3, 9, 9)
    p = zfcore.deconv_project(model, images, "c2", [1, 2])
    model.function = beside
    close(p.pixels, project(model, images, "c2", [1, 2], p.positions)[0], torch.float32)


def test_a_buffer_that_is_written_to_after_its_use():
    """Its gradient is by what it was, in autograd's graph too."""

    class Decays(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
            self.register_buffer("gate", torch.linspace(0.5, 2, 4).view(1, 4, 1, 1))

        def forward(self, x):
            y = self.conv(x) * self.gate
            self.gate.mul_(0)
            return self.last(y.sin() + (0 if y.mean() > 100 else 1))

    model = Decays().eval()
    images = torch.randn(2, 3, 12, 12)
    at = torch.tensor([[[3, 4]], [[2, 0]]])
    p = zfcore.deconv_project(model, images, "last", 1, positions=at, rule="gradient")
    assert p.path == "dense" and model.gate.flatten()[0] == 0.5
    leaf, gate = images.clone().requires_grad_(), model.gate
    out = model.last((model.conv(leaf) * gate).sin() + 1)[range(2), 1, at[:, 0, 0], at[:, 0, 1]]
    (wanted,) = torch.autograd.grad(out.square().sum() / 2, leaf)
    torch.testing.assert_close(p.pixels[:, 0], wanted)


def test_a_part_of_a_map_whose_whole_is_written_to_later():
    class Splits(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.Softshrink(0.1)

        def forward(self, x):
            x = x * 1
            a, b = x.split([2, 1], 1)
            y = self.act(b if b.mean() < 100 else a)
            x[:, 2:] = 0.5
            return y

    images = torch.randn(2, 3, 6, 6)
    p = zfcore.deconv_project(Splits().eval(), images, "act", 0, positions=torch.ones(2, 1, 2).long(), rule="gradient")
    wanted = torch.zeros_like(images)
    wanted[:, 2, 1, 1] = F.softshrink(images[:, 2, 1, 1], 0.1)
    torch.testing.assert_close(p.pixels[:, 0], wanted)


def test_work_in_place_on_the_rows_of_a_batch():
    def in_place(x):
        for row in x:
            row.mul_(2)
        return x

    model, images = Written(in_place), torch.randn(2, 3, 9, 9)
    p = zfcore.deconv_project(model, images, "c2", [1, 2])
    model.function = lambda x: x * 2
    close(p.pixels, project(model, images, "c2", [1, 2], p.positions)[0], torch.float32)


def test_threads_with_checkpoints_do_not_meet():
    model, images = Written(SPELLINGS["reentrant checkpoint"][0]), torch.randn(1, 3, 9, 9)
    wanted = zfcore.deconv_project(model, images, "c2", [0]).pixels
    found, stop = [], threading.Event()

    def train():
        while not stop.is_set():
            x = torch.randn(1, 6, requires_grad=True)
            torch.utils.checkpoint.checkpoint(torch.relu, x, use_reentrant=True).sum().backward()
            found.append(x.grad is not None)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(10):
            assert torch.equal(zfcore.deconv_project(model, images, "c2", [0]).pixels, wanted)
    finally:
        stop.set()
        thread.join()
    assert found and all(found)
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)


# ---- What a call leaves in the model -----------------------------------------------------------------------


class Store:
    def __init__(self):
        self.map, self.maps = None, []


class Keeps(nn.Module):
    """Keeps what it sees in every place that a model has."""

    def __init__(self, fails=False):
        super().__init__()
        self.c1, self.c2, self.fails = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), fails
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("last", torch.zeros(1, 4, 7, 7))
        self.register_buffer("bulk", torch.zeros(1, 8, 7, 7))
        self.register_buffer("none", None)
        self.scale = nn.Parameter(torch.ones(1))
        self.plain, self.count, self.tensor = None, 0, torch.zeros(4)
        self.list, self.dict, self.set = [1], {"a": {"b": []}}, set()
        self.tuple, self.spaces, self.store = ([],), types.SimpleNamespace(x=1), Store()
        self.branches = nn.ModuleList([nn.Identity()])
        self.other = [nn.Identity()]

    def forward(self, x):
        h = F.relu(self.c1(x))
        self.seen, self.plain, self.new = h, h, h
        self.none = h
        self.count += 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean((0, 2, 3)))
            self.scale.data.mul_(2)
            self.tensor += 1
            self.c2.bias.fill_(3)
        self.last.copy_(h[:1, :, :7, :7])
        self.bulk[:, :4] += h[:1, :, :7, :7]
        self.list.append(h)
        self.list[0] = h
        self.dict["a"]["b"].append(h)
        self.dict["c"] = h
        self.set.add(h)
        self.tuple[0].append(h)
        self.spaces.x, self.spaces.y = h, h
        self.store.map = h
        self.store.maps.append(h)
        self.other[0].mark = h
        self.branches.append(nn.Identity())
        self.scale.requires_grad_(False)
        self.c1.weight.requires_grad_(False)
        self.c1.register_forward_hook(lambda *a: None)
        self.train()
        random.random(), numpy.random.rand(), torch.rand(1)
        if self.fails and x.sum() < 1e9:
            raise KeyError("on purpose")
        return self.c2(h + torch.rand(1)).mean((2, 3)) if x.sum() < 1e9 else x


def state_of(model):
    def flat(value, depth=0):
        if isinstance(value, torch.Tensor):
            return id(value), value.requires_grad, value.grad_fn is None, value.tolist()
        if isinstance(value, dict):
            return type(value), [(key, flat(each)) for key, each in value.items()]
        if isinstance(value, (list, tuple, set)):
            return type(value), [flat(each) for each in value]
        if isinstance(value, (Store, types.SimpleNamespace)):
            return flat(vars(value))
        return flat(vars(value)) if isinstance(value, nn.Module) else value

    randoms = torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())
    return flat(vars(model)), randoms


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fails", (False, True))
@pytest.mark.parametrize("call", ("run", "project", "jobs", "occlude", "occlude a feature"))
def test_a_model_that_keeps_what_it_sees_is_as_it_was(call, fails):
    model, images = Keeps(fails), torch.randn(2, 3, 9, 9)
    state_before = state_of(model)

    def run():
        if call == "run":
            with kept(model) as held, held.watching():
                model(images)
        elif call == "project":
            zfcore.deconv_project(model, images, "c2", [1, 2])
        elif call == "jobs":
            for _ in zfcore.iter_projections(model, images, "c2", batch_size=2):
                assert state_of(model) == state_before
        else:
            feature = ("c1", 1) if "feature" in call else None
            zfcore.occlusion_map(model, images, box=3, stride=3, feature=feature, score="logit")

    if fails:
        with pytest.raises(KeyError, match="on purpose"):
            run()
    else:
        run()
    assert state_of(model) == state_before


def test_threads_share_a_model_that_keeps_what_it_sees():
    model, images = Keeps(), torch.randn(1, 3, 9, 9)
    before = state_of(model)[0]
    errors = []

    def run():
        try:
            for _ in range(5):
                zfcore.deconv_project(model, images, "c1", [1])
        except Exception as error:  # noqa: BLE001 (a thread's own traceback would be lost)
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and state_of(model)[0] == before


def test_a_model_that_draws_and_counts_gives_each_batch_the_same():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.calls = nn.Conv2d(3, 4, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.conv(x) * torch.rand(4, 1, 1) * self.calls if x.sum() < 1e9 else x

    model, images = Draws(), torch.randn(1, 3, 9, 9).expand(3, -1, -1, -1)
    whole = zfcore.deconv_project(model, images, "", [1, 2])
    parts = list(zfcore.iter_projections(model, images, "", [1, 2], batch_size=2))
    close(torch.cat([part.pixels for part in parts]), whole.pixels.flatten(0, 1).double(), torch.float32)
    assert model.calls == 0
