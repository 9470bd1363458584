"""The engine as a job meets it: the same bits at any number of threads, weights that change, bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest
import torch
from deconvnet_networks import NETWORKS, make
from deconvnet_oracle import project
from test_projection import close
from torch import nn

import zfcore
from zfcore.engine import gradients, patches

JOB = """
import torch, zfcore
from zfcore.models import ZFNet
torch.manual_seed(0)
model = ZFNet().eval()
images = torch.rand(40, 3, 224, 224) * 255 - 128
list(zfcore.iter_projections(model, images[:1], "conv5", [0], crop=True))
count = total = 0
for part in zfcore.iter_projections(model, images, "conv5", crop=True):
    count += len(part.pixels)
    total += part.pixels.abs().sum().item()
# Not getrusage: what it calls the peak counts that of the process which started this one.
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(count, total > 0, peak - sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.parametrize("name", ["vgg", "alexnet", "resnet", "googlenet", "overlapping"])
@pytest.mark.parametrize("rule", ["deconvnet", "guided", "gradient"])
def test_threads_and_batches_change_no_bit(name, rule):
    model, images = make(name)
    layer = [layer for layer in NETWORKS[name][2] if layer not in ("5", "fc", "head")][-1]
    threads, found = torch.get_num_threads(), []
    try:
        for count, batch in ((1, None), (2, None), (3, 5)):
            torch.set_num_threads(count)
            seeds = torch.zeros(len(images), 7, 2, dtype=torch.int64)
            p = zfcore.deconv_project(
                model, images, layer, [0, 1, 0, 1, 0, 1, 0], positions=seeds, rule=rule, seed="one", batch_size=batch
            )
            found.append(p.pixels)
    finally:
        torch.set_num_threads(threads)
    assert found[0].any()
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


class First(nn.Module):
    """A convolution of the picture, and what makes of it a network."""

    def __init__(self, *arguments, **options):
        super().__init__()
        self.conv = nn.Conv2d(*arguments, **options)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv(x))


FIRST = {
    "zfnet": First(3, 96, 7, stride=2, padding=1),
    "alexnet": First(3, 64, 11, stride=4, padding=2, bias=False),
    "vgg": First(3, 10, 3, padding=1),
    "same": First(3, 5, (4, 2), padding="same", dilation=(1, 3)),
    "of a vector": First(3, 8, (1, 5), stride=(3, 1)),
    "groups": First(4, 6, 3, groups=2),
    "double": First(3, 6, 3).double(),
    "bfloat16": First(3, 6, 3).bfloat16(),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("seed", ["activation", "one"])
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("name", FIRST)
def test_the_first_convolution_is_searched_without_its_maps(name, crop, seed, monkeypatch):
    model = FIRST[name].eval()
    images = torch.randn(3, model.conv.in_channels, 45, 51)[:, :, :, ::2].to(model.conv.weight.dtype)
    units, made = [4, 0, 4, 1], []
    up = patches.Engine.up
    monkeypatch.setattr(patches.Engine, "up", lambda *given: made.append(given) or up(*given))

    def projections():
        with torch.autocast("cpu"):
            return zfcore.deconv_project(model, images, "conv", units, crop=crop, seed=seed)

    ours = projections()
    assert bool(made) == (name in ("groups", "double", "bfloat16"))
    monkeypatch.setattr(patches.Engine, "reads_picture", lambda engine: False)
    plain = projections()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0}[images.dtype]
    for field in ("positions", "boxes", "images", "units"):
        assert torch.equal(getattr(ours, field), getattr(plain, field))
    for field in ("activations", "pixels"):
        a, b = getattr(ours, field).double(), getattr(plain, field).double()
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    assert ours.pixels.any()


def test_a_first_convolution_of_a_negated_view():
    """The imaginary part of a conjugate: what lies in memory has the other sign."""
    images = torch.randn(2, 3, 12, 12, dtype=torch.complex64).conj().imag
    assert images.is_neg()
    model = First(3, 8, 3).eval()
    ours, plain = (zfcore.deconv_project(model, x, "conv") for x in (images, images.clone()))
    assert torch.equal(ours.positions, plain.positions)
    torch.testing.assert_close(ours.pixels, plain.pixels)


@pytest.mark.parametrize("change", [lambda p: p.mul_(1.5), lambda p: p.data.mul_(1.5)], ids=["in place", "data"])
def test_changed_weights_count_at_the_next_call(change):
    model, images = make("alexnet")
    first = zfcore.deconv_project(model, images, "conv4", [0, 1])
    with torch.no_grad():
        for parameter in model.parameters():
            change(parameter)
    p = zfcore.deconv_project(model, images, "conv4", [0, 1])
    wanted = project(model, images, "conv4", [0, 1], p.positions)[0]
    assert (p.pixels.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not torch.equal(p.pixels, first.pixels)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc/self/status to read the peak from")
def test_ten_thousand_projections_stay_under_a_gigabyte():
    """conv5 of ZFNet, cropped, consumed as they come; beside the model's own 250 MB."""
    away = tempfile.gettempdir()  # not the source tree, which would hide the install
    done = subprocess.run([sys.executable, "-c", JOB], capture_output=True, text=True, timeout=500, cwd=away)
    assert done.returncode == 0, done.stderr
    count, any_signal, peak = done.stdout.split()
    assert (int(count), any_signal) == (40 * 256, "True")
    assert int(peak) < 1e9


@pytest.mark.parametrize("rule", ["deconvnet", "guided"])
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize(
    ("name", "layer"),
    [("resnet", "layer2"), ("googlenet", "b"), ("efficientnet", "head"), ("shufflenet", "conv"), ("densenet", "norm"),
     ("products", "last")],
)  # fmt: skip
def test_seeds_that_go_down_one_by_one(name, layer, crop, rule, monkeypatch):
    """Large signals are taken down some seeds at a time; the seeds of two images, some of which share a turn."""
    model, images = make(name)

    def projections():
        return zfcore.deconv_project(model, images, layer, [3, 0, 2], crop=crop, rule=rule).pixels

    together = projections()
    for size in (1, 40_000):
        monkeypatch.setattr(patches, "TOGETHER_BYTES", size)
        apart = projections()
        assert (apart - together).abs().max() <= 1e-6 * together.abs().max()


@pytest.mark.parametrize("small", [0, 2**30])
@pytest.mark.parametrize("units", [[3, 0], [1]])
def test_the_plain_gradient_seed_by_seed_and_at_once(small, units, monkeypatch):
    """Operations without a rule of their own: of one map, of two, views, and one that no gradient passes."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            x = torch.relu(self.conv(x))
            x = nn.functional.softmax(x, 1) + nn.functional.adaptive_max_pool2d(x, 5).mean((2, 3), keepdim=True)
            x = torch.sub(x.permute(0, 1, 3, 2), x.amax((2, 3), keepdim=True))
            return self.last(x)

    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(3, 3, 16, 18)
    monkeypatch.setattr(gradients, "SMALL", small)
    for options in ({}, {"rule": "gradient"}, {"crop": True}, {"positions": "all"}, {"batch_size": 2}):
        found = zfcore.deconv_project(model, images, "last", units, strict=True, **options)
        at = options.get("positions", found.positions)
        wanted = project(model, images, "last", units, at, rule=options.get("rule", "deconvnet"))[0]
        assert (found.pixels - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_function_of_each_value_without_a_gradient():
    z = torch.randn(2, 3, 4, 4)
    value, slope = gradients.derivative(torch.sign, z)
    assert torch.equal(value, z.sign()) and not slope.any()
    value, slope = gradients.derivative(torch.ones_like, z)
    assert torch.equal(value, torch.ones_like(z)) and not slope.any()


@pytest.mark.parametrize("rule", ("deconvnet", "guided", "gradient"))
def test_the_rectifier_inside_a_power_pool_rectifies_nothing(rule):
    """Its input is an absolute value; and it keeps what is no number from where the pool's root has no slope."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.LPPool2d(2, 2), nn.Conv2d(8, 6, 3)).eval()
    images = torch.randn(2, 3, 20, 20)
    p = zfcore.deconv_project(model, images, "3", [0, 3], rule=rule, strict=True)
    wanted = project(model, images, "3", [0, 3], p.positions, rule=rule)[0]
    assert wanted.isfinite().all()
    close(p.pixels, wanted, torch.float32)


@pytest.mark.parametrize("rule", ("deconvnet", "gradient"))
@pytest.mark.parametrize(
    "norm",
    (nn.InstanceNorm2d(16, affine=True), nn.GroupNorm(4, 16), nn.Upsample(scale_factor=2, mode="bilinear"), nn.RReLU(),
     nn.ReflectionPad2d(2), nn.ConvTranspose2d(16, 16, 2, 2)),
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_operations_on_whole_maps_that_are_large(norm, rule):
    """So large that they go down seed by seed, with one image's values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), norm, nn.Conv2d(16, 16, 3), nn.ReLU()).eval()
    images = torch.randn(2, 3, 34, 34)
    for layer in ("2", "4"):
        p = zfcore.deconv_project(model, images, layer, [0, 3], rule=rule, strict=True)
        close(p.pixels, project(model, images, layer, [0, 3], p.positions, rule=rule)[0], torch.float32)
