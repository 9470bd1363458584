"""mode="adaptive": what it measures, what it makes up, and what it says of that."""

import math
import warnings

import pytest
import torch
from test_occlusion_map import ResNetLike, VGGLike, close, network, pictures
from torch import nn

from zfcore.errors import ArgumentError, DtypeError
from zfcore.occlusion import occlusion_map

GRID = {"box": 12, "stride": 2}


class Spots(nn.Module):
    """Answers by the mean of two small parts of the picture, far apart."""

    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(1, 2, 64)
        with torch.no_grad():
            self.look.weight.zero_()
            self.look.bias.zero_()
            self.look.weight[0, 0, 8:12, 8:12] = 1
            self.look.weight[0, 0, 50:54, 48:52] = 1

    def forward(self, x):
        return self.look(x).flatten(1)


class Unread(VGGLike):
    def forward(self, x):
        return torch.sort(super().forward(x), 1)[0]


def both(model, images, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = occlusion_map(model, images, **options)
        return exact, occlusion_map(model, images, mode="adaptive", **options)


@pytest.mark.parametrize("kind", [VGGLike, ResNetLike, Unread])
def test_what_is_measured_is_exact_and_the_rest_lies_between(kind):
    feature = ("a" if kind is ResNetLike else "0", 1)
    exact, o = both(network(kind), pictures(3, (48, 40)), feature=feature, tolerance=0.4, **GRID)
    assert o.measured.shape == o.scores.shape and 0 < o.measured.float().mean() < 1
    for name in ("scores", "activation"):
        assert close(getattr(o, name)[o.measured], getattr(exact, name)[o.measured])
    assert torch.equal(o.labels[o.measured], exact.labels[o.measured])
    assert close(o.clean, exact.clean) and exact.measured is None and exact.error is None
    off = (o.scores - exact.scores).abs().flatten(1).amax(1)
    extent = exact.scores.flatten(1).amax(1) - exact.scores.flatten(1).amin(1)
    assert (off <= 0.5 * extent).all() and off.any()
    assert (o.error >= 0).all() and (o.error <= 0.5 * extent).all()


def test_every_part_where_the_answer_moves_is_measured_and_no_box_around_them():
    images = torch.ones(1, 1, 64, 64)
    exact, o = both(Spots().eval(), images, targets=0, score="logit", box=8, stride=1)
    assert close(o.scores, exact.scores) and exact.scores.unique().numel() > 3
    for edge in (o.measured[0, 0:5, 0:13], o.measured[0, 40:45, 40:53]):  # a spot each
        assert edge.all()
    assert not o.measured[0, 24:34, 24:34].all() and o.measured.float().mean() < 0.5
    assert o.error[0] <= 1e-5


def test_an_answer_that_moves_everywhere_is_measured_everywhere():
    exact, o = both(network(VGGLike), pictures(2, (32, 32)), tolerance=0.0, **GRID)
    assert o.measured.all() and close(o.scores, exact.scores) and o.error.isnan().all()


@pytest.mark.parametrize(
    "options", [{"box": (40, 8), "stride": (3, 2)}, {"box": 60, "stride": 4}, {"box": 4, "stride": 9}, {"box": 8, "stride": 32}]
)
def test_grids_of_one_row_of_one_position_and_without_overlap(options):
    exact, o = both(network(VGGLike), pictures(2, (32, 40)), **options)
    assert o.scores.shape == exact.scores.shape and close(o.scores[o.measured], exact.scores[o.measured])
    assert o.heatmap().shape == exact.heatmap().shape


def test_pictures_that_are_not_finite_are_measured_all_the_same():
    images = pictures(3, (32, 32))
    images[1, 0, 3, 3] = math.nan
    exact, o = both(network(VGGLike), images, **GRID)
    assert torch.equal(o.scores[1].isnan(), exact.scores[1].isnan())
    for i in (0, 2):
        assert close(o.scores[i][o.measured[i]], exact.scores[i][o.measured[i]])


def test_no_pictures():
    o = occlusion_map(network(VGGLike), torch.empty(0, 3, 32, 32), mode="adaptive", **GRID)
    assert o.scores.shape == o.measured.shape == (0, 11, 11) and o.error.shape == (0,)


def test_the_same_twice():
    first, second = (occlusion_map(network(VGGLike), pictures(2, (48, 48)), mode="adaptive", **GRID) for _ in range(2))
    assert torch.equal(first.scores, second.scores) and torch.equal(first.measured, second.measured)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"mode": "fast"}, ArgumentError, "mode: 'fast'; expected one of"),
        ({"tolerance": -0.1}, ArgumentError, "tolerance: -0.1; expected a share between 0 and 1"),
        ({"tolerance": math.nan}, ArgumentError, "tolerance: nan"),
        ({"tolerance": "1"}, DtypeError, "tolerance: '1'; expected a number"),
        ({"tolerance": True}, DtypeError, "tolerance: True"),
    ],
)
def test_refusals(options, error, words):
    with pytest.raises(error, match=words):
        occlusion_map(network(VGGLike), pictures(1, (32, 32)), box=8, stride=4, **options)
