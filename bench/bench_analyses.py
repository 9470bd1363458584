"""The two analyses beside Captum's, at 224 x 224 pixels, once both give the same numbers; times are of one projection.

zfcore projects the units of a layer at their strongest positions in one image (on a GPU 16), cropped, the clean forward
included; Captum is called as its users call it, once a unit. It runs a twin of the network with torch's own pools; weights
are the initial ones. On a GPU occlusion is measured in each precision, both sides in the same (Captum's bf16 under autocast
and channels_last), beside batched plain forwards too, which need no Captum, and as a share of what the GPU could do of the
multiply-adds that the engine counts; times there are of the wall clock.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import calls
import networks
import pytest
import torch
import torch.nn.functional as F
import zfcore
from device import arithmetic, device, on_gpu
from stages import Work
from timing import timed
from torch import nn
from zfcore.engine.grid import Grid
from zfcore.models import ZFNet
from zfcore.occlusion import PRECISIONS

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
PEERS = (3, 17, 42, 90)  # the units that Captum is asked for, in turn
DEEP = {"vgg16 conv5_3": ("vgg16", networks.CONV5_3, 32), "resnet18 layer4": ("resnet18", "layer4", 128)}
DENSE_LAYER, DENSE_SEEDS = "conv5", 256 if on_gpu() else 16  # of batched dense PyTorch
IMAGES = 16 if on_gpu() else 1  # that zfcore projects at once
ROUNDS = 4


class Occlusion(NamedTuple):
    """box, stride: pixels. Captum's stride is the box, the widest that it takes, and on a GPU zfcore's, since it fills one
    with many positions only. Times are of one position.
    """

    network: str
    box: int
    stride: int
    precision: str = "exact"
    rounds: int = 3

    @property
    def captum_stride(self) -> int:
        return self.stride if on_gpu() else self.box


GPU_OCCLUSIONS = {
    **{f"zfnet-box32-stride4-{precision}": Occlusion("zfnet", 32, 4, precision) for precision in PRECISIONS},
    "vgg16-box32-stride16-exact": Occlusion("vgg16-classifier", 32, 16),
    "resnet18-box32-stride16-exact": Occlusion("resnet18", 32, 16),
}
CPU_OCCLUSIONS = {
    "zfnet-box32-stride8": Occlusion("zfnet", 32, 8),
    "zfnet-box32-stride8-bf16": Occlusion("zfnet", 32, 8, "bf16"),
    "zfnet-box16-stride4": Occlusion("zfnet", 16, 4, rounds=2),
    "zfnet-box64-stride16": Occlusion("zfnet", 64, 16),
    "vgg16-box32-stride16": Occlusion("vgg16-classifier", 32, 16, rounds=1),
    "resnet18-box32-stride16": Occlusion("resnet18", 32, 16),
}
OCCLUSIONS = GPU_OCCLUSIONS if on_gpu() else CPU_OCCLUSIONS
# Of Captum's perturbations_per_eval, the best of which is taken.
PERTURBATIONS = (32, 64, 128, 256, 512) if on_gpu() else (4, 8, 16)
PLAIN_BATCH = 256  # of plain forwards, on a GPU
SECONDS = 1.0
TARGET = 7  # the class whose probability is mapped
# Of the scores by precision, relative; and of everything else, relative to the largest magnitude.
MAX_SCORE_ERROR = {"tf32": 2e-3, "bf16": 2e-2}
MAX_ERROR = 1e-4 if on_gpu() else 1e-5  # a GPU's other side transforms its inputs
ROWS = ("captum", "zfcore")
DENSE_ROWS = ("pytorch", "zfcore")
DENSE_GROUP = f"deconv_project {DENSE_LAYER}-dense nchw"
GROUPS = [
    *(f"deconv_project {layer} nchw" for layer in LAYERS),
    *(f"deconv_project {name.replace(' ', '-')} nchw" for name in DEEP),
    DENSE_GROUP,
    *(f"occlusion_map {name} nchw" for name in OCCLUSIONS),
    *(f"occlusion_map {name}-plain nchw" for name in OCCLUSIONS if on_gpu()),
]


class Subject(NamedTuple):
    """model, and twin: the same weights, torch's pools; images: [IMAGES, 3, 224, 224]."""

    model: nn.Module
    twin: nn.Module
    images: torch.Tensor


@functools.cache
def subject() -> Subject:
    torch.manual_seed(0)
    model = ZFNet().eval().to(device())
    twin = copy.deepcopy(model)
    for name, module in model.named_children():
        if isinstance(module, nn.MaxPool2d):
            setattr(twin, name, nn.MaxPool2d(module.kernel_size, module.stride, module.padding))
    return Subject(model, twin, torch.rand(IMAGES, 3, 224, 224).to(device()) * 255 - 128)


@functools.cache
def deep_subject(name: str) -> Subject:
    model = networks.randomised(name).to(device())
    return Subject(model, model, torch.randn(IMAGES, 3, 224, 224).to(device()))


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
    places = first.positions[0].tolist()
    peers = [unit for unit in PEERS if unit < first.pixels.shape[1]]
    turn = itertools.cycle(peers)

    def attribute(unit=None):
        unit = next(turn) if unit is None else unit
        return deconvolution.attribute(images[:1], (unit, *places[unit])).detach()

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
        items={"zfcore": len(images) * first.pixels.shape[1]},
        wall=True,
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
    g = x.new_zeros(len(units), x[0].numel())
    g[torch.arange(len(units), device=x.device), units * x[0, 0].numel() + strongest] = 1
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
    units = torch.arange(DENSE_SEEDS, device=device())

    def project():
        return zfcore.deconv_project(model, images, DENSE_LAYER, seed="one", crop=True)

    @torch.no_grad()
    def dense():
        return dense_projections(twin, images[:1], units)

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
        items={"pytorch": DENSE_SEEDS, "zfcore": len(images) * model.conv5.out_channels},
        wall=True,
    )


@dataclass(frozen=True, eq=False)
class Plain:
    """What the other sides of an occlusion run, inside `running`: a network, and the first image."""

    network: nn.Module
    image: torch.Tensor
    precision: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x).softmax(1)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The occlusion's precision, once around all forwards, which share what autocast makes of the weights."""
        with torch.inference_mode(), arithmetic(self.precision if on_gpu() else "exact"):
            yield


def plain_of(occlusion: Occlusion) -> Plain:
    found = occlusion_subject(occlusion)
    network, image = found.twin, found.images[:1]
    if on_gpu() and occlusion.precision == "bf16":
        last = {"memory_format": torch.channels_last}
        network, image = copy.deepcopy(network).to(**last), image.contiguous(**last)
    return Plain(network, image, occlusion.precision)


class CaptumOcclusion:
    """Captum's side of an occlusion: its own grid, at the perturbations_per_eval that suit it best."""

    def __init__(self, occlusion: Occlusion, plain: Plain, target: int):
        attr = pytest.importorskip("captum.attr", reason="Captum is the other side of this comparison")
        self.attribution = attr.Occlusion(plain)
        self.occlusion, self.plain, self.target = occlusion, plain, target
        with plain.running():
            batches = {count: plain.image.repeat(count, 1, 1, 1) for count in PERTURBATIONS}
            for count in PERTURBATIONS if on_gpu() else PERTURBATIONS[:1]:
                plain(batches[count])  # a first forward makes the model's own preparations
            self.best = min(PERTURBATIONS, key=lambda n: timed(lambda: plain(batches[n])) / n)

    def __call__(self) -> torch.Tensor:
        box, stride = self.occlusion.box, self.occlusion.captum_stride
        with self.plain.running():
            return self.attribution.attribute(
                self.plain.image,
                sliding_window_shapes=(3, box, box),
                strides=(3, stride, stride),
                target=self.target,
                perturbations_per_eval=self.best,
            )


def positions(box: int, stride: int) -> int:
    return (math.ceil((224 - box) / stride) + 1) ** 2


@functools.cache
def captum_occlusion(name: str) -> CaptumOcclusion:
    occlusion = OCCLUSIONS[name]
    return CaptumOcclusion(occlusion, plain_of(occlusion), TARGET)


def occlusion_subject(occlusion: Occlusion) -> Subject:
    return subject() if occlusion.network == "zfnet" else deep_subject(occlusion.network)


def occlude(occlusion: Occlusion, **changed: object) -> zfcore.Occlusion:
    """zfcore's side of an occlusion, of the first image."""
    model, _, images = occlusion_subject(occlusion)
    options = {"box": occlusion.box, "stride": occlusion.stride, "precision": occlusion.precision, **changed}
    return zfcore.occlusion_map(model, images[:1], TARGET, **options)


def check_scores(occlusion: Occlusion, scores: torch.Tensor) -> None:
    """A narrow precision's beside the exact ones."""
    if occlusion.precision != "exact":
        exact = occlude(occlusion, precision="exact").scores
        assert ((scores - exact).abs() <= MAX_SCORE_ERROR[occlusion.precision] * exact.abs()).all()


def counted_work(occlusion: Occlusion) -> Work:
    """The multiply-adds of a position that the engine counts, and those of a whole forward."""
    model, _, images = occlusion_subject(occlusion)
    found = calls.ready(model, images[:1], box=occlusion.box, stride=occlusion.stride, precision=occlusion.precision)
    precision = "float32" if occlusion.precision == "exact" else occlusion.precision
    return Work(0, int(2 * found.sweep.macs), int(2 * found.sweep.plain_macs), precision)


def plain_scores(occlusion: Occlusion, plain: Plain) -> torch.Tensor:
    """[Gy * Gx]: the target's score at every position, by forwards of pictures with their boxes painted over."""
    size = plain.image.shape[2:]
    boxes = Grid.over(size, (occlusion.box,) * 2, (occlusion.stride,) * 2).boxes().view(-1, 4).to(plain.image.device)
    rows, columns = (torch.arange(length, device=boxes.device) for length in size)
    scores = []
    with plain.running():
        for y0, x0, y1, x1 in (some.T[:, :, None] for some in boxes.split(PLAIN_BATCH)):
            under = ((rows >= y0) & (rows < y1))[:, None, :, None] & ((columns >= x0) & (columns < x1))[:, None, None]
            scores.append(plain(torch.where(under, 0.0, plain.image))[:, TARGET])
    return torch.cat(scores)


def captum_side(occlusion: Occlusion, name: str) -> tuple:
    """Captum's call, how many answers it gives, and a check of both sides' outputs."""
    captum = captum_occlusion(name)

    def check(ours, theirs):
        if occlusion.precision == "exact" or not on_gpu():  # a CPU's Captum computes in float32
            exact = occlude(occlusion, stride=occlusion.captum_stride, precision="exact")
            # Of the score: what it falls by is a difference of numbers that are nearly equal.
            error = (exact.heatmap()[0] - theirs[0, 0]).abs().max() / exact.clean[0]
            assert error <= MAX_ERROR, f"relative error {error:.1e}"

    return captum, positions(occlusion.box, occlusion.captum_stride) + 1, check  # and the picture without a box


def plain_side(occlusion: Occlusion, name: str) -> tuple:
    """The same of plain forwards."""
    plain = plain_of(occlusion)

    def check(ours, theirs):
        error = MAX_SCORE_ERROR.get(occlusion.precision, MAX_ERROR)
        assert ((ours.scores.flatten() - theirs).abs() <= 2 * error * theirs.abs()).all()

    return lambda: plain_scores(occlusion, plain), positions(occlusion.box, occlusion.stride), check


SIDES = {"captum": captum_side, "pytorch": plain_side}
OCCLUSION_CASES = [
    pytest.param(name, against, row, id="-".join((name, row) if against == "captum" else (name, "plain", row)))
    for against in (SIDES if on_gpu() else ("captum",))
    for name in OCCLUSIONS
    for row in (against, "zfcore")
]


@pytest.mark.parametrize(("name", "against", "row"), OCCLUSION_CASES)
def test_occlusion_map(name, against, row, groups, benchmark):
    """Every position of zfcore's grid, the clean forward included; where Captum's has fewer, they cost it as much each."""
    occlusion = OCCLUSIONS[name]
    other, answers, check_other = SIDES[against](occlusion, name)

    def check(outputs):
        check_other(outputs["zfcore"], outputs[against])
        check_scores(occlusion, outputs["zfcore"].scores)

    groups.row(
        benchmark,
        f"occlusion_map {name}{'' if against == 'captum' else '-plain'} nchw",
        row,
        {against: other, "zfcore": lambda: occlude(occlusion)},
        check,
        (lambda: counted_work(occlusion)) if on_gpu() else None,
        against=against,
        seconds=SECONDS,
        least=occlusion.rounds,
        items={against: answers, "zfcore": positions(occlusion.box, occlusion.stride)},
        wall=True,
    )


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=quiet) for name in DEEP])
def test_deconv_project_of_deep_networks(name, row, groups, benchmark):
    network, layer, units = DEEP[name]
    group = f"deconv_project {name.replace(' ', '-')} nchw"
    beside_captum(groups, benchmark, group, row, deep_subject(network), layer, units)
