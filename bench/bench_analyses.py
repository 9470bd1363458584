"""The two analyses beside Captum's, on ZFNet at 224 x 224 pixels, once both give the same numbers.

Captum runs a twin of the network with torch's own pools, as its users have it; weights are the initial ones.
"""

from __future__ import annotations

import copy
import functools
from typing import NamedTuple

import pytest
import torch
import zfcore
from torch import nn
from zfcore.models import ZFNet

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
UNITS = (3, 17, 42, 90)
IMAGES = 2
BOX, STRIDE = 64, 40  # pixels: a grid of 5 x 5
ROUNDS = 3
SECONDS = 1.0
MAX_ERROR = 1e-5  # relative to the largest magnitude
ROWS = ("captum", "zfcore")
OCCLUSION_GROUP = "occlusion_map zfnet nchw"
GROUPS = [*(f"deconv_project {layer} nchw" for layer in LAYERS), OCCLUSION_GROUP]


class Subject(NamedTuple):
    """model, and twin: the same weights, torch's pools; images: [N, 3, 224, 224]."""

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
    return Subject(model, twin, torch.rand(IMAGES, 3, 224, 224) * 255 - 128)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= MAX_ERROR, f"relative error {error:.1e}"


def cut(pixels: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """pixels: [C, H, W]. The part inside a box y0, x0, y1, x1, zeros where it reaches past the edge."""
    y0, x0, y1, x1 = box.tolist()
    height, width = pixels.shape[1:]
    return nn.functional.pad(pixels, (-x0, x1 - width, -y0, y1 - height))


# Captum says at every call that it will turn gradients on and that it sets hooks.
@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("layer", LAYERS)
def test_deconv_project(layer, row, groups, benchmark):
    attr = pytest.importorskip("captum.attr", reason="Captum is the other side of this comparison")
    model, twin, images = subject()
    deconvolution = attr.NeuronDeconvolution(twin, getattr(twin, layer))

    def project():
        return zfcore.deconv_project(model, images, layer, units=UNITS, seed="one", crop=True)

    positions = project().positions  # [N, U, 2]

    def attribute():
        return torch.stack(
            [
                deconvolution.attribute(
                    images,
                    lambda maps, unit=unit, at=positions[:, index]: maps[
                        torch.arange(len(maps)), unit, at[:, 0], at[:, 1]
                    ],
                ).detach()
                for index, unit in enumerate(UNITS)
            ],
            dim=1,
        )  # [N, U, 3, 224, 224]

    def check(outputs):
        projection = outputs["zfcore"]
        for n in range(IMAGES):
            for u in range(len(UNITS)):
                close(projection.pixels[n, u], cut(outputs["captum"][n, u], projection.boxes[n, u]))

    rows = {"captum": attribute, "zfcore": project}
    groups.row(
        benchmark,
        f"deconv_project {layer} nchw",
        row,
        rows,
        check,
        against="captum",
        seconds=SECONDS,
        least=ROUNDS,
    )


@pytest.mark.parametrize("row", ROWS)
def test_occlusion_map(row, groups, benchmark):
    attr = pytest.importorskip("captum.attr", reason="Captum is the other side of this comparison")
    model, twin, images = subject()
    image, target = images[:1], 7
    occlusion = attr.Occlusion(lambda x: twin(x).softmax(1))

    def attribute():
        with torch.inference_mode():
            return occlusion.attribute(
                image,
                sliding_window_shapes=(3, BOX, BOX),
                strides=(3, STRIDE, STRIDE),
                target=target,
                perturbations_per_eval=25,
            )

    def occlude():
        return zfcore.occlusion_map(model, image, torch.tensor([target]), box=BOX, stride=STRIDE)

    def check(outputs):
        close(outputs["zfcore"].heatmap()[0], outputs["captum"][0, 0])

    rows = {"captum": attribute, "zfcore": occlude}
    groups.row(benchmark, OCCLUSION_GROUP, row, rows, check, against="captum", seconds=SECONDS, least=ROUNDS)
