"""The two analyses beside Captum's, at 224 x 224 pixels, once both give the same numbers; times are of one projection.

zfcore projects the units of a layer at their strongest positions in one image, cropped, the clean forward included;
Captum is called as its users call it, once a unit. It runs a twin of the network with torch's own pools; weights
are the initial ones.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from typing import NamedTuple

import networks
import pytest
import torch
import torch.nn.functional as F
import zfcore
from timing import timed
from torch import nn
from zfcore.models import ZFNet

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
PEERS = (3, 17, 42, 90)  # the units that Captum is asked for, in turn
DEEP = {"vgg16 conv5_3": ("vgg16", networks.CONV5_3, 32), "resnet18 layer4": ("resnet18", "layer4", 128)}
DENSE_LAYER, DENSE_SEEDS = "conv5", 16  # of batched dense PyTorch
ROUNDS = 4


class Occlusion(NamedTuple):
    """box, stride: pixels. Captum's stride is the box, the widest that it takes; times are of one position."""

    network: str
    box: int
    stride: int
    precision: str = "exact"
    rounds: int = 3


OCCLUSIONS = {
    "zfnet-box32-stride8": Occlusion("zfnet", 32, 8),
    "zfnet-box32-stride8-bf16": Occlusion("zfnet", 32, 8, "bf16"),
    "zfnet-box16-stride4": Occlusion("zfnet", 16, 4, rounds=2),
    "zfnet-box64-stride16": Occlusion("zfnet", 64, 16),
    "vgg16-box32-stride16": Occlusion("vgg16-classifier", 32, 16, rounds=1),
    "resnet18-box32-stride16": Occlusion("resnet18", 32, 16),
}
PERTURBATIONS = (4, 8, 16)  # of Captum's perturbations_per_eval, the best of which is taken
SECONDS = 1.0
TARGET = 7  # the class whose probability is mapped
MAX_BF16_ERROR = 2e-2  # relative
MAX_ERROR = 1e-5  # relative to the largest magnitude
ROWS = ("captum", "zfcore")
DENSE_ROWS = ("pytorch", "zfcore")
DENSE_GROUP = f"deconv_project {DENSE_LAYER}-dense nchw"
GROUPS = [
    *(f"deconv_project {layer} nchw" for layer in LAYERS),
    *(f"deconv_project {name.replace(' ', '-')} nchw" for name in DEEP),
    DENSE_GROUP,
    *(f"occlusion_map {name} nchw" for name in OCCLUSIONS),
]


class Subject(NamedTuple):
    """model, and twin: the same weights, torch's pools; images: [1, 3, 224, 224]."""

    model: nn.Module
    twin: nn.Module
    images: torch.Tensor


@functools.cache
def subject() -> Subject:
    torch.manual_seed(0)
    model = ZFNet().eval()
    twin = copy.deepcopy(model)
    for name, module in model.named_children():
        if isinstance(module, nn.MaxPool2d):
            setattr(twin, name, nn.MaxPool2d(module.kernel_size, module.stride, module.padding))
    return Subject(model, twin, torch.rand(1, 3, 224, 224) * 255 - 128)


@functools.cache
def deep_subject(name: str) -> Subject:
    model = networks.randomised(name)
    return Subject(model, model, torch.randn(1, 3, 224, 224))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= MAX_ERROR, f"relative error {error:.1e}"


def cut(pixels: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """pixels: [C, H, W]. The part inside a box y0, x0, y1, x1, zeros where it reaches past the edge."""
    y0, x0, y1, x1 = box.tolist()
    height, width = pixels.shape[1:]
    return F.pad(pixels, (-x0, x1 - width, -y0, y1 - height))


def beside_captum(groups, benchmark, group: str, row: str, found: Subject, layer: str, units: int | None) -> None:
    """units: how many are projected, None for all."""
    attr = pytest.importorskip("captum.attr", reason="Captum is the other side of this comparison")
    model, twin, images = found
    deconvolution = attr.NeuronDeconvolution(twin, twin.get_submodule(layer))
    chosen = None if units is None else range(units)

    def project():
        return zfcore.deconv_project(model, images, layer, chosen, seed="one", crop=True)

    first = project()
    peers = [unit for unit in PEERS if unit < first.pixels.shape[1]]
    turn = itertools.cycle(peers)

    def attribute(unit=None):
        unit = next(turn) if unit is None else unit
        return deconvolution.attribute(images, (unit, *first.positions[0, unit].tolist())).detach()

    def check(outputs):
        projection = outputs["zfcore"]
        for unit in peers:
            close(projection.pixels[0, unit], cut(attribute(unit)[0], projection.boxes[0, unit]))

    groups.row(
        benchmark,
        group,
        row,
        {"captum": attribute, "zfcore": project},
        check,
        against="captum",
        seconds=SECONDS,
        least=ROUNDS,
        items={"zfcore": first.pixels.shape[1]},
    )


# Captum says at every call that it will turn gradients on and that it sets hooks.
quiet = [
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients"),
    pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations"),
]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("layer", [pytest.param(layer, marks=quiet) for layer in LAYERS])
def test_deconv_project(layer, row, groups, benchmark):
    beside_captum(groups, benchmark, f"deconv_project {layer} nchw", row, subject(), layer, None)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=quiet) for name in DEEP])
def test_deconv_project_of_deep_networks(name, row, groups, benchmark):
    network, layer, units = DEEP[name]
    group = f"deconv_project {name.replace(' ', '-')} nchw"
    beside_captum(groups, benchmark, group, row, deep_subject(network), layer, units)


def dense_projections(model: nn.Module, image: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """[U, 3, H, W]: the same, as batched whole maps in plain PyTorch; seeds are one, at the strongest positions."""
    stages, x = [], image
    for name, module in model.named_children():
        before = x.shape[2:]
        if isinstance(module, nn.MaxPool2d):
            x, index = F.max_pool2d(
                x, module.kernel_size, module.stride, module.padding, return_indices=True
            )
            stages.append((module, before, index))
        else:
            x = module(x)
            stages.append((module, before, None))
        if name == DENSE_LAYER:
            break
    strongest = x[0, units].flatten(1).argmax(1)
    g = torch.zeros(len(units), x[0].numel())
    g[torch.arange(len(units)), units * x[0, 0].numel() + strongest] = 1
    g = g.view(len(units), *x.shape[1:])
    for module, before, index in reversed(stages):
        if isinstance(module, nn.MaxPool2d):
            flat = g.new_zeros(*g.shape[:2], before.numel())
            g = flat.scatter_add_(2, index.expand(g.shape).flatten(2), g.flatten(2)).unflatten(2, before)
        elif isinstance(module, nn.Conv2d):
            reached = [
                (n - 1) * s - 2 * p + k
                for n, s, p, k in zip(g.shape[2:], module.stride, module.padding, module.kernel_size, strict=True)
            ]
            extra = [a - b for a, b in zip(before, reached, strict=True)]
            g = F.conv_transpose2d(g, module.weight, None, module.stride, module.padding, extra)
        elif isinstance(module, nn.ReLU):
            g = F.relu(g)
    return g


@pytest.mark.parametrize("row", DENSE_ROWS)
def test_deconv_project_beside_dense_maps(row, groups, benchmark):
    model, twin, images = subject()
    units = torch.arange(DENSE_SEEDS)

    def project():
        return zfcore.deconv_project(model, images, DENSE_LAYER, seed="one", crop=True)

    @torch.no_grad()
    def dense():
        return dense_projections(twin, images, units)

    def check(outputs):
        projection = outputs["zfcore"]
        for unit in units.tolist():
            close(projection.pixels[0, unit], cut(outputs["pytorch"][unit], projection.boxes[0, unit]))

    groups.row(
        benchmark,
        DENSE_GROUP,
        row,
        {"pytorch": dense, "zfcore": project},
        check,
        against="pytorch",
        seconds=SECONDS,
        least=ROUNDS,
        items={"pytorch": DENSE_SEEDS, "zfcore": model.conv5.out_channels},
    )


class CaptumOcclusion:
    """Captum's side of an occlusion: its coarser grid, at the perturbations_per_eval that suit it best."""

    def __init__(self, occlusion: Occlusion, found: Subject, target: int):
        attr = pytest.importorskip("captum.attr", reason="Captum is the other side of this comparison")
        self.attribution = attr.Occlusion(lambda x: found.twin(x).softmax(1))
        self.occlusion, self.images, self.target = occlusion, found.images, target
        with torch.inference_mode():
            batches = {count: self.images.repeat(count, 1, 1, 1) for count in PERTURBATIONS}
            found.twin(batches[PERTURBATIONS[0]])  # a first forward makes the model's own preparations
            self.best = min(PERTURBATIONS, key=lambda n: timed(lambda: found.twin(batches[n])) / n)

    def __call__(self) -> torch.Tensor:
        box = self.occlusion.box
        with torch.inference_mode():
            return self.attribution.attribute(
                self.images,
                sliding_window_shapes=(3, box, box),
                strides=(3, box, box),
                target=self.target,
                perturbations_per_eval=self.best,
            )


def positions(box: int, stride: int) -> int:
    return (math.ceil((224 - box) / stride) + 1) ** 2


@functools.cache
def captum_occlusion(name: str) -> CaptumOcclusion:
    occlusion = OCCLUSIONS[name]
    return CaptumOcclusion(occlusion, occlusion_subject(occlusion), TARGET)


def occlusion_subject(occlusion: Occlusion) -> Subject:
    return subject() if occlusion.network == "zfnet" else deep_subject(occlusion.network)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", OCCLUSIONS)
def test_occlusion_map(name, row, groups, benchmark):
    """Every position of zfcore's grid, the clean forward included; Captum's has fewer, which cost it as much each."""
    occlusion, captum = OCCLUSIONS[name], captum_occlusion(name)
    model, _, images = occlusion_subject(occlusion)

    def occlude(stride=occlusion.stride, precision=occlusion.precision):
        return zfcore.occlusion_map(
            model, images, TARGET, box=occlusion.box, stride=stride, precision=precision
        )

    def check(outputs):
        ours, theirs = occlude(occlusion.box, "exact"), outputs["captum"][0, 0]
        # Of the score: what it falls by is a difference of numbers that are nearly equal.
        error = (ours.heatmap()[0] - theirs).abs().max() / ours.clean[0]
        assert error <= MAX_ERROR, f"relative error {error:.1e}"
        if occlusion.precision == "bf16":
            exact = occlude(precision="exact").scores
            assert ((outputs["zfcore"].scores - exact).abs() <= MAX_BF16_ERROR * exact.abs()).all()

    groups.row(
        benchmark,
        f"occlusion_map {name} nchw",
        row,
        {"captum": captum, "zfcore": occlude},
        check,
        against="captum",
        seconds=SECONDS,
        least=occlusion.rounds,
        items={
            "captum": positions(occlusion.box, occlusion.box) + 1,  # and the picture without a box
            "zfcore": positions(occlusion.box, occlusion.stride),
        },
    )
