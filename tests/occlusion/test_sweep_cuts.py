"""The engine cut between changes and values at every step, its new kinds of stages, and how it is chosen."""

import pytest
import torch
import torch.nn.functional as F
from occluded_networks import CLASSES, NETWORKS, build, by_forwards, close, painted, pictures, totals
from torch import nn

from zfcore.engine.grid import Grid
from zfcore.engine.sweep import Sweep
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
