"""The engine cut between changes and values at every step, its new kinds of stages, and how it is chosen."""

import pytest
import torch
import torch.nn.functional as F
from occluded_networks import (
    CLASSES,
    NETWORKS,
    build,
    by_forwards,
    close,
    painted,
    pictures,
    totals,
)
from torch import nn

from zfcore.engine import costs
from zfcore.engine.forwards import is_compiled
from zfcore.engine.grid import Grid
from zfcore.engine.sweep import Sweep, even
from zfcore.network import read_network
from zfcore.occlusion import occlusion_map
from zfcore.ops import use_backend

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cut(runs, monkeypatch):
    """Sets how many steps are taken on changes."""
    divide = Sweep.divide

    def at(changes):
        monkeypatch.setattr(
            Sweep, "divide", lambda self, _: (divide(self, min(changes, len(self.steps)))[0], float("inf"))
        )

    return at


def cuts(model, images, box=7, stride=5):
    """Of every network one fewer than there are ways to cut it."""
    grid = Grid.over(tuple(images.shape[2:]), (box, box), (stride, stride))
    network = read_network(model, tuple(images.shape[1:]))
    return len(Sweep(network, None, grid.y, grid.x, images.dtype, None, changes=10**6).steps)


class Gated(nn.Module):
    """Squeeze and excitation with functions that are no rectifiers, a product of two maps, and a gate of places."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.act = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU(inplace=True)
        self.deep, self.down, self.up = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.place, self.b, self.full = nn.Conv2d(16, 1, 1), nn.Conv2d(16, 12, 3, 2), nn.Linear(12, CLASSES)
        nn.init.uniform_(self.norm.running_mean, -0.3, 0.3)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        x = self.act(self.norm(self.a(x)))
        x = F.hardswish(self.deep(x))
        y = x * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        y = y * torch.sigmoid(self.place(x)) + x * torch.tanh(x)
        return self.full(F.gelu(self.b(y)).mean((2, 3)))


class Picked(nn.Module):
    """Channels split, picked in any order and more than once, and joined again."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(10, 8, 3, groups=2)
        self.full = nn.Linear(8, CLASSES)
        self.order = torch.tensor([7, 0, 3, 3, 1, 6, 2, 5, 4, 0])

    def forward(self, x):
        x = self.a(x).relu()
        one, two = x.chunk(2, 1)
        x = torch.cat([one, self.b(two).relu()], 1)[:, self.order]
        return self.full(F.mish(self.c(x)).mean((2, 3)))


class Overwritten(nn.Module):
    """Values that are read again after an operation that could have been in place, and sums of views."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.full = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.a(x)
        y = F.silu(x) + x
        left, right = y.split(4, 1)
        z = torch.cat([left * right, left + right], 1)
        w = self.b(z)
        return self.full((w.relu() * F.avg_pool2d(w, 3, 1, 1) + w + w).clone().mean((2, 3)))


def made(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return kind().to(dtype).eval()


NEW = [Gated, Picked, Overwritten]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", [*NEW, *NETWORKS], ids=lambda k: k if isinstance(k, str) else k.__name__)
def test_every_cut_equals_plain_forwards(kind, dtype, cut, runs):
    model = build(kind, dtype) if isinstance(kind, str) else made(kind, dtype)
    images = pictures(2, dtype=dtype)
    logits = by_forwards(model, images, 7, 5, 0.25)
    for at in range(cuts(model, images) + 1):
        cut(at)
        o = occlusion_map(model, images, [1, 4], box=7, stride=5, fill=0.25, score="logit")
        assert close(o.scores, logits[torch.arange(2), :, :, torch.tensor([1, 4])], TOLERANCE[dtype]), at
        assert torch.equal(o.labels, logits.argmax(-1))
    assert len(runs) == at + 1


@pytest.mark.parametrize("box, stride", [(1, 9), ((26, 4), 5), (9, 7), ((2, 9), (13, 3)), (40, 3)], ids=str)
@pytest.mark.parametrize("kind", NEW)
def test_boxes_of_the_new_kinds(kind, box, stride, cut):
    """As accurate as a forward in float32 is, beside float64."""
    model, images = made(kind), pictures(2)
    exact = by_forwards(made(kind, torch.float64), images.double(), box, stride, -0.4)[..., 2]
    noise = (by_forwards(model, images, box, stride, -0.4)[..., 2] - exact).abs().max()
    for at in (0, 2, 5, 1000):
        cut(at)
        o = occlusion_map(model, images, 2, box=box, stride=stride, fill=-0.4, score="logit")
        allowed = max(1e-5 * float(exact.max() - exact.min()), 2 * float(noise), 1e-6)
        assert (o.scores - exact).abs().max() <= allowed, at


@pytest.mark.parametrize("layer", ["a", "norm", "act", "deep", "down", "up", "place", "b", "full"])
def test_features_of_changes_and_of_values(layer, cut):
    model, images = made(Gated), pictures(2)
    module, rows = model.get_submodule(layer), painted(images, 9, 7).flatten(0, 2)
    every, clean = totals(model, module, rows)[:, 0], totals(model, module, images)[:, 0]
    scores = by_forwards(model, images, 9, 7)[..., 1]
    for at in range(cuts(model, images) + 1):
        cut(at)
        o = occlusion_map(model, images, 1, box=9, stride=7, feature=(layer, 0), score="logit")
        assert close(o.activation.flatten(), every) and close(o.clean_activation, clean), at
        assert close(o.scores, scores)


@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 17, 1000, None])
def test_any_batch_size_gives_the_same_map_from_values(batch_size, at, cut, monkeypatch):
    cut(at)
    model, images = made(Gated), pictures(3)
    want = occlusion_map(model, images, 1, box=7, stride=5, score="logit", feature=("b", 3))
    monkeypatch.setitem(costs.VALUE_BYTES, "cpu", 60_000)
    o = occlusion_map(model, images, 1, box=7, stride=5, score="logit", feature=("b", 3), batch_size=batch_size)
    again = occlusion_map(model, images, 1, box=7, stride=5, score="logit", feature=("b", 3), batch_size=batch_size)
    assert close(o.scores, want.scores, 1e-6) and close(o.activation, want.activation, 1e-6)
    assert torch.equal(o.scores, again.scores) and torch.equal(o.activation, again.activation)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["branches", "rectifiers", "squeeze and excitation", "max pools", "any function"])
def test_values_that_are_not_finite(name, value, cut):
    """A rectifier that is done with a product must not make a number of what is none."""
    model, images = build(name), pictures(2)
    logits = by_forwards(model, images, 9, 6, value)[..., 3]
    for at in (0, 2):
        cut(at)
        o = occlusion_map(model, images, 3, box=9, stride=6, score="logit", fill=value)
        torch.testing.assert_close(o.scores, logits, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_pixel_far_larger_than_the_others_leaves_no_trace_in_values(cut):
    cut(0)
    model, images = made(Gated), pictures(1)
    images[0, :, 12, 12] = 1e7
    o = occlusion_map(model, images, 1, box=26, stride=5, score="logit")
    assert close(o.scores, by_forwards(made(Gated, torch.float64), images.double(), 26, 5)[..., 1].float())


def test_the_reference_backend_agrees_on_the_new_kinds(cut):
    cut(1000)
    for kind in NEW:
        model, images = made(kind), pictures(2)
        o = occlusion_map(model, images, 2, box=9, stride=7, score="logit")
        with use_backend("reference"):
            want = occlusion_map(model, images, 2, box=9, stride=7, score="logit")
        assert close(o.scores, want.scores)


def test_the_callers_images_and_the_parameters_are_not_written_to(cut):
    cut(0)
    model, images = made(Overwritten), pictures(2)
    before, state = images.clone(), {name: value.clone() for name, value in model.state_dict().items()}
    occlusion_map(model, images, 1, box=9, stride=7, feature=("a", 1))
    assert torch.equal(images, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["unflattened", "full layers", "squeeze and excitation"])
def test_values_beside_changes_of_bf16(name, cut):
    model, images = build(name), pictures(2)
    logits = by_forwards(model, images, 9, 6)[..., 3]
    for at in range(0, cuts(model, images) + 1, 2):
        cut(at)
        o = occlusion_map(model, images, 3, box=9, stride=6, score="logit", precision="bf16")
        assert close(o.scores, logits, 3e-2)


# ---- What is counted


def sweep_of(model, size, box, stride):
    grid = Grid.over(size, (box, box), (stride, stride))
    return Sweep(read_network(model, (3, *size)), None, grid.y, grid.x, torch.float32, None)


def convolutions(function=nn.ReLU):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, 1, 1), function()]
    for _ in range(3):
        layers += [nn.Conv2d(32, 32, 3, 1, 1), function()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 7)).eval()


def test_small_boxes_are_changes_and_large_ones_values():
    assert sweep_of(convolutions(), (64, 64), 4, 8).values is None
    assert not sweep_of(convolutions(nn.SiLU), (64, 64), 64, 8).steps  # no function leaves zeros


def test_values_begin_where_all_of_a_map_is_changed():
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.gate = nn.Conv2d(3, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 1, 1), nn.Conv2d(32, 32, 1)
            self.c, self.full = nn.Conv2d(32, 32, 3, 1, 1), nn.Linear(32, 7)

        def forward(self, x):
            x = self.b(self.a(x).relu()).relu()
            x = x * self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid()
            return self.full(self.c(x).relu().mean((2, 3)))

    torch.manual_seed(0)
    sweep = sweep_of(Squeezed().eval(), (64, 64), 8, 8)
    assert [step.result.kind for step in sweep.steps][:2] == ["relu", "relu"]
    assert {"product", "conv"} & {operation.result.kind for operation in sweep.values.operations[:2]}
    assert sweep.cost < sweep.model_cost and sweep.refusal is None


def test_why_plain_forwards_run_is_said():
    sweep = sweep_of(convolutions(), (64, 64), 8, 8)
    sweep.cost, sweep.model_cost = 3.0, 2.0
    assert sweep.refusal == "plain forwards cost less: by count, the engine takes 1.50 times as long"


@pytest.mark.parametrize("count, most, size", [(49, 46, 25), (49, 49, 49), (49, 1, 1), (5, 256, 5), (50, 7, 7)])
def test_batches_are_near_equal(count, most, size):
    assert even(count, most) == size


@pytest.fixture
def forwards_only(monkeypatch):
    monkeypatch.setattr("zfcore.occlusion.sweeps", lambda images: False)


def test_forwards_of_a_compiled_model(forwards_only):
    model, images = convolutions(), pictures(1, (32, 32))
    want = by_forwards(model, images, 8, 8)[..., 1]
    for whole in (True, False):
        compiled = torch.compile(convolutions(), backend="eager") if whole else convolutions()
        if not whole:
            compiled[0] = torch.compile(compiled[0], backend="eager")
        assert is_compiled(compiled) and not is_compiled(model)
        with pytest.warns(UserWarning, match="plain forwards"):
            o = occlusion_map(compiled, images, 1, box=8, stride=8, score="logit")
        assert close(o.scores, want)
    torch.compiler.reset()


def test_what_a_function_compiles_is_not_watched(forwards_only):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 7, 5)
            self.part = torch.compile(lambda x: x.sin() + 1, backend="eager")

        def forward(self, x):
            return self.part(self.conv(x)).mean((2, 3))

    torch.manual_seed(0)
    model, images = Inner().eval(), pictures(1, (32, 32))
    with pytest.warns(UserWarning, match="plain forwards"):
        o = occlusion_map(model, images, 1, box=8, stride=8, score="logit")
    assert close(o.scores, by_forwards(model, images, 8, 8)[..., 1])
    torch.compiler.reset()
