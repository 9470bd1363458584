"""deconv_project against the oracle to the precision of float64, at every border, and where values are not
numbers.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from deconvnet_networks import NETWORKS, Overlapping, make, randomise
from deconvnet_oracle import crop, project
from torch import nn

import zfcore
from zfcore.models import ZFNet

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
LAYERS = [(name, layer) for name, (_, _, layers) in NETWORKS.items() for layer in layers]
DEEP = [("vgg", "0.12"), ("alexnet", "conv4"), ("alexnet", "pool4"), ("resnet", "layer2.0"), ("googlenet",
"a"),
        ("googlenet", "b.pool"), ("mobilenet", "bn"), ("overlapping", "conv3"),
        ("overlapping", "pool3")]  # fmt: skip


def close(ours, wanted, dtype):
    assert ours.dtype == dtype
    assert ours.shape == wanted.shape
    error = (ours.double() - wanted).abs().max()
    assert error <= TOLERANCE[dtype] * wanted.abs().max(), f"relative error {error / wanted.abs().max():.1e}"


@pytest.mark.parametrize("rule", ("deconvnet", "guided"))
@pytest.mark.parametrize("name, layer", LAYERS)
def test_every_layer_in_float64(name, layer, rule):
    model, images = make(name, torch.float64)
    p = zfcore.deconv_project(model, images, layer, [1, 0], rule=rule, strict=True)
    wanted, activations = project(model, images, layer, [1, 0], p.positions, rule=rule)
    close(p.pixels, wanted, torch.float64)
    close(p.activations, activations, torch.float64)
    p = zfcore.deconv_project(model, images, layer, [1, 0], rule=rule, crop=True)
    assert (p.boxes[..., 2:] - p.boxes[..., :2] == torch.tensor(p.pixels.shape[-2:])).all()
    assert crop(torch.ones_like(wanted), p.boxes).amax() == 1  # the box meets the image
    close(p.pixels, crop(wanted, p.boxes), torch.float64)
    for i in range(len(images)):
        for j in range(2):
            y0, x0, y1, x1 = p.boxes[i, j].clamp(min=0).tolist()
            wanted[i, j, :, y0:y1, x0:x1] = 0
    assert not wanted.any()  # nothing lies outside the box


@pytest.mark.parametrize("overlap", ("sum", "last"))
@pytest.mark.parametrize("name, layer", [case for case in DEEP if case[1] not in ("5", "fc", "head")])
def test_every_position(name, layer, overlap):
    """All corners, edges and the middle: patches that reach past the map on every side."""
    model, images = make(name)
    height, width = zfcore.network.read_network(model, images.shape[1:], layer).layer.shape[1:]
    rows, columns = {0, 1, height // 2, height - 1}, {0, width // 2, width - 2, width - 1}
    places = [(y, x) for y in sorted(rows) for x in sorted(columns) if y < height and x >= 0]
    positions = torch.tensor(places).expand(len(images), -1, -1)
    units = [i % 2 for i in range(len(places))]
    p = zfcore.deconv_project(model, images, layer, units, positions=positions, overlap=overlap)
    wanted, activations = project(model, images, layer, units, positions, overlap=overlap)
    close(p.pixels, wanted, torch.float32)
    close(p.activations, activations, torch.float32)
    assert torch.equal(p.positions, positions)
    p = zfcore.deconv_project(model, images, layer, units, positions=positions, overlap=overlap, crop=True)
    close(p.pixels, crop(wanted, p.boxes), torch.float32)


def test_contrast_normalisation_is_passed_over():
    model = randomise(ZFNet(num_classes=3, contrast_norm=True))
    images = torch.randn(1, 3, 224, 224) * 50
    p = zfcore.deconv_project(model, images, "conv3", [11, 200], crop=True)
    wanted = project(model, images, "conv3", [11, 200], p.positions)[0]
    close(p.pixels, crop(wanted, p.boxes), torch.float32)


def test_gradient_rule_is_the_gradient():
    model, images = make("resnet", torch.float64)
    p = zfcore.deconv_project(model, images, "fc", [4], rule="gradient", seed="one")
    x = images.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x)[:, 4].sum(), x)
    close(p.pixels[:, 0], g, torch.float64)


def test_written_out():
    """A chain worked out by hand, layer by layer, with no autograd: the oracle and the engine against it."""
    model = randomise(Overlapping()).double()
    x = torch.randn(1, 2, 33, 29, dtype=torch.float64)
    u1 = model.conv1(x)
    y1, at1 = F.max_pool2d(u1, 3, 1, 1, return_indices=True)
    u2 = model.conv2(y1)
    y2, at2 = F.max_pool2d(u2.relu(), 3, 2, 1, return_indices=True)
    u3 = model.conv3(y2)
    unit = 3
    place = int(u3[0, unit].argmax())
    value = u3[0, unit].flatten()[place]

    def unpool(y, at, like):
        out = torch.zeros_like(like).flatten(2)
        for k in range(at[0, 0].numel()):
            for c in range(at.shape[1]):
                out[0, c, at[0, c].flatten()[k]] += y[0, c].flatten()[k]
        return out.reshape(like.shape)

    seed = torch.zeros_like(u3)
    seed[0, unit].flatten()[place] = value
    down = F.conv_transpose2d(seed, model.conv3.weight, padding=1)
    down = F.conv_transpose2d(unpool(down, at2, u2).relu(), model.conv2.weight)
    down = F.conv_transpose2d(unpool(down, at1, u1), model.conv1.weight, padding=1)
    p = zfcore.deconv_project(model, x, "conv3", [unit])
    close(p.pixels[:, 0], down, torch.float64)
    close(project(model, x, "conv3", [unit], p.positions)[0][:, 0], down, torch.float64)


def test_smallest_images():
    """Where the map is one pixel every patch is the map."""
    model = randomise(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1)))
    images = torch.randn(2, 1, 4, 4)
    for layer in "0123":
        p = zfcore.deconv_project(model, images, layer, [0, 1])
        close(p.pixels, project(model, images, layer, [0, 1], p.positions)[0], torch.float32)


def test_ties_and_nan():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU())
    nn.init.ones_(model[0].weight)
    images = torch.ones(2, 1, 4, 5)
    images[1, 0, 0, 0] = torch.nan
    images[1, 0, 2, 3] = 7
    p = zfcore.deconv_project(model, images, "0")
    assert p.positions[0].tolist() == [[0, 0], [0, 0]]  # the first of equals
    assert p.positions[1].tolist() == [[2, 3], [2, 3]]  # NaN is no maximum
    images[1] = torch.nan
    p = zfcore.deconv_project(model, images, "0")
    assert p.positions[1].tolist() == [[0, 0], [0, 0]] and p.activations[1].isnan().all()
    assert p.pixels[1, :, 0, 0, 0].isnan().all()  # and goes down
    images[1, 0, 3, 4] = -torch.inf
    assert zfcore.deconv_project(model, images, "0").positions[1].tolist() == [[3, 4], [3, 4]]


def test_nan_in_the_weights_goes_down():
    model, images = make("vgg")
    with torch.no_grad():
        model[0][0].weight[2, 1, 1, 1] = torch.nan
    p = zfcore.deconv_project(model, images[:1], "0.0", [2])
    assert p.pixels[0, 0, 1].isnan().any()
