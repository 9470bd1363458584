"""The incremental engine on outputs, values and scores that are easy to get wrong."""

import pytest
import torch
from occluded_networks import (
    CLASSES,
    SIZE,
    build,
    by_forwards,
    close,
    painted,
    pictures,
    totals,
)
from test_occlusion_map import VGGLike, network
from test_sweep import equals_forwards
from torch import nn

from zfcore.occlusion import occlusion_map


def fully_convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)).eval()


@pytest.mark.parametrize(
    "score", [lambda y: y.amax((1, 2, 3)), lambda y: y[:, 2].sum((1, 2)), lambda y: y.flatten(1)[:, 17]]
)
def test_a_callable_score_of_maps(score, engine):
    model, images = fully_convolutional(), pictures(2)
    o = occlusion_map(model, images, box=7, stride=5, score=score)
    maps = by_forwards(model, images, 7, 5)
    assert engine and o.labels is None and o.targets is None
    assert close(o.scores, score(maps.flatten(0, 2)).view(maps.shape[:3]))
    assert close(o.clean, score(model(images).detach()))


@pytest.mark.parametrize("kernel", [3, SIZE])
def test_a_network_that_is_one_convolution(kernel, engine):
    torch.manual_seed(0)
    model, images = nn.Conv2d(3, 7, kernel), pictures(2)
    o = occlusion_map(model, images, box=7, stride=5, score=lambda y: y[:, 4].sum((1, 2)), feature=(model, 4))
    want = by_forwards(model, images, 7, 5)[:, :, :, 4].sum((-1, -2))
    assert engine and close(o.scores, want) and close(o.activation, want)


def test_a_convolution_rectified_at_the_networks_end(engine):
    torch.manual_seed(0)
    for last in (nn.ReLU(), nn.Identity(), nn.BatchNorm2d(7).eval()):
        model, images = nn.Sequential(nn.Conv2d(3, 7, 5, 3), last), pictures(2)
        o = occlusion_map(model, images, box=7, stride=5, score=lambda y: y[:, 4].sum((1, 2)))
        assert close(o.scores, by_forwards(model, images, 7, 5)[:, :, :, 4].sum((-1, -2)))
    assert len(engine) == 3


def test_a_map_at_the_end_whose_change_is_one_column_wide(engine):
    """Which would fit the clean map by broadcasting, and be wrong."""
    torch.manual_seed(0)
    model, images = nn.Conv2d(3, 7, 1), pictures(2)
    o = occlusion_map(model, images, box=1, stride=5, score=lambda y: y[:, 4].sum((1, 2)))
    assert engine and close(o.scores, by_forwards(model, images, 1, 5)[:, :, :, 4].sum((-1, -2)))


def test_a_callable_score_may_read_maps_by_view(engine):
    """A forward returns maps that are contiguous for images that are."""
    model, images = fully_convolutional(), pictures(2)
    o = occlusion_map(model, images, box=40, stride=5, score=lambda y: y.view(len(y), -1)[:, 17])
    assert engine and close(o.scores, by_forwards(model, images, 40, 5).flatten(3)[..., 17])


def test_a_callable_score_may_work_in_place(engine):
    model, images = network(VGGLike), pictures(2)
    o = occlusion_map(model, images, box=7, stride=5, score=lambda y: y.exp_()[:, 2])
    assert engine and close(o.scores, by_forwards(model, images, 7, 5)[..., 2].exp())


class Rows(nn.Module):
    """Each map a row of its pixels, and its mean: neither a map nor a row of features in between."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.full = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.full(self.b(self.a(x).relu()).relu().flatten(2).mean(2))


class Shuffled(nn.Module):
    """The channels of groups shuffled, as ShuffleNet has it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.c, self.full = nn.Conv2d(8, 8, 5, padding=2), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.full(self.c(x).relu().mean((2, 3)))


class Twice(nn.Module):
    """As Rows, by one mean after the other."""

    def __init__(self):
        super().__init__()
        self.a, self.full = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.full(self.a(x).relu().mean(3).mean(2))


class TwoHeads(nn.Module):
    """The sum of two rows of features."""

    def __init__(self):
        super().__init__()
        self.a, self.one, self.two = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.a(x).relu().mean((2, 3))
        return self.one(x) + self.two(x)


@pytest.mark.parametrize("kind", [Rows, Twice, Shuffled, TwoHeads])
def test_values_that_are_no_maps(kind, engine):
    torch.manual_seed(0)
    equals_forwards(kind().eval(), pictures(2), 7, 5)


def test_the_feature_of_a_layer_that_gives_rows_of_pixels(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 24 * 21, 7)).eval()
    images = pictures(2)
    o = occlusion_map(model, images, 1, box=9, stride=7, feature=("2", 3), score="logit")
    want = totals(model, model[2], painted(images, 9, 7).flatten(0, 2))[:, 3]
    assert close(o.activation.flatten(), want)


def test_a_number_fills_a_float64_network_in_float64(engine):
    equals_forwards(build("contrast"), pictures(2), 7, 5, 0.3, torch.float64)


def test_the_warning_names_the_line_that_called():
    class Odd(VGGLike):
        def forward(self, x):
            return torch.fft.fft(super().forward(x)).real

    with pytest.warns(UserWarning, match="fft") as caught:
        occlusion_map(network(Odd), pictures(1), box=9, stride=7)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("value", [1e5, 1e7])
def test_a_pixel_far_larger_than_the_others_does_not_blur_what_hides_it(value, engine):
    """A box over it leaves ordinary scores, which a clean map of its size and a change as large do not add up to."""
    model, images = network(VGGLike), pictures(1)
    images[0, :, 12, 12] = value
    o = occlusion_map(model, images, 1, box=7, stride=5)
    want = by_forwards(model.double(), images.double(), 7, 5)
    plain = by_forwards(model.float(), images, 7, 5)
    hidden = [b for b in range(25) if b // 5 * 5 <= 12 < b // 5 * 5 + 7 and b % 5 * 5 <= 12 < b % 5 * 5 + 7]
    assert hidden and (plain.softmax(-1) - want.softmax(-1)).abs().max() < 1e-6
    assert torch.equal(o.labels, want.argmax(-1))
    assert (o.scores - want.softmax(-1)[..., 1]).abs().max() <= 1e-5


def test_constants_that_are_added_behind_an_operation_on_whole_maps():
    class Flipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * (SIZE[0] - 2) * (SIZE[1] - 2), 5)

        def forward(self, x):
            return self.head((self.conv(x.flip(3)) * 2 + 1).flatten(1))

    torch.manual_seed(0)
    model, images = Flipped().eval(), pictures(2)
    o = occlusion_map(model, images, 3, box=7, stride=5, score="logit")
    assert close(o.scores, by_forwards(model, images, 7, 5)[..., 3])
