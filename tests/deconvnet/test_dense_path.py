"""Networks that no tracer can follow, and every way to write a ReLU, by autograd with the rules on each
operation.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from deconvnet_networks import Attention, Controlled, make, randomise
from deconvnet_oracle import project
from test_projection import close
from torch import nn

import zfcore
from zfcore.errors import UnsupportedOperation

pytestmark = pytest.mark.filterwarnings("ignore:zfcore. the dense path")


@pytest.mark.parametrize("rule", ("deconvnet", "guided", "gradient"))
@pytest.mark.parametrize("layer", ("stem", "conv", "head"))
def test_attention(layer, rule):
    model = randomise(Attention())
    images = torch.randn(2, 3, 32, 32)
    p = zfcore.deconv_project(model, images, layer, [0, 3], rule=rule)
    assert p.path == ("engine" if layer == "stem" else "dense")
    close(p.pixels, project(model, images, layer, [0, 3], p.positions, rule=rule)[0], torch.float32)


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
