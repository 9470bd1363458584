"""Each product of ZFNet on what a box changes, beside the same in dense PyTorch, with its roofline.

The changes are the network's own: a box of 32 pixels, moved by 8, on a picture of noise; weights are the initial ones.
PyTorch gets what lies under the windows cut already, zero where nothing changed, and multiplies all of it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from stages import Work
from zfcore.engine.grid import Grid
from zfcore.engine.sweep import Sweep
from zfcore.models import ZFNet
from zfcore.network import read_network
from zfcore.ops.conv_delta import ConvChange, DeltaFilters, Places, conv_delta
from zfcore.reference.deconv_step import cut
from zfcore.reference.relu_delta import rectified

BOX, STRIDE, POSITIONS = 32, 8, 120
PRODUCTS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")
MAX_ERROR = 1e-5  # relative to the largest magnitude
ROWS = ("pytorch", "zfcore")
GROUPS = [f"conv_delta {name} nchw" for name in PRODUCTS]


class Product(NamedTuple):
    """What conv_delta is given: see there. out: memory for its result."""

    delta: torch.Tensor
    filters: DeltaFilters
    step: ConvChange
    places: Places
    clean: torch.Tensor
    out: torch.Tensor


@functools.cache
@torch.no_grad()
def products() -> dict[str, Product]:
    torch.manual_seed(0)
    model, image, fill = ZFNet().eval(), torch.rand(1, 3, 224, 224) * 255 - 128, torch.zeros(1, 3, 224, 224)
    grid = Grid.over((224, 224), (BOX, BOX), (STRIDE, STRIDE))
    sweep = Sweep(read_network(model, (3, 224, 224)), None, grid.y, grid.x, torch.float32, POSITIONS)
    found: dict[str, Product] = {}

    def noted(run):
        def change(self, step, batch):
            result = run(self, step, batch)
            source = step.sources[0]
            delta = sweep.painted(image, fill, batch) if source is sweep.picture else batch.changes[source].clone()
            places = self.places(step, batch)
            clean = batch.maps[step.before] if step.before else None
            product = Product(delta, step.filters, step.convolution, places, clean, torch.empty_like(result))
            found[step.result.name.replace("relu", "conv" if result.size(2) > 1 else "fc")] = product
            return result

        return change

    for step in sweep.steps:
        if step.filters is not None:
            step.run = noted(step.run)
    maps = sweep.up(image)
    middle = torch.arange(len(grid)).view(grid.rows, grid.columns)[7:17, 6:18].reshape(-1)
    for _ in sweep.run(image, fill, maps, middle):
        return found
    raise AssertionError("no position was worked at")


def under(product: Product) -> torch.Tensor:
    """What lies under the windows of the results."""
    window, places = product.step.window, product.places
    corner = places.out_origin * torch.tensor(window[1]) - torch.tensor(window[2]) - places.origin
    size = [(n - 1) * s + d * (k - 1) + 1 for n, k, s, d in zip(places.size, window[0], window[1], window[3])]
    return cut(product.delta, torch.arange(len(product.delta)), corner, size)


def work(name: str) -> Work:
    product = products()[name]
    kernel, stride, padding, dilation = product.step.window
    pairs = []  # by pixel of an axis: how many taps reach an output
    for axis, length in enumerate(product.step.map):
        at = torch.arange(length)[:, None] + padding[axis] - torch.arange(kernel[axis]) * dilation[axis]
        reached = (at >= 0) & (at % stride[axis] == 0) & (at // stride[axis] < product.step.above[axis])
        pairs.append(reached.sum(1))
    reach = (pairs[0][:, None] * pairs[1])[None, None].float()
    size = tuple(product.delta.shape[2:])
    own = cut(reach, torch.zeros_like(product.places.image), product.places.origin, size)
    changed = int(((product.delta != 0).float() * own).double().sum())
    outputs = len(product.filters.weight)
    moved = product.delta.nbytes + 2 * product.out.nbytes + product.filters.weight.nbytes
    dense = product.out.numel() * product.filters.weight[0].numel()
    return Work(moved, 2 * changed * outputs, 2 * dense)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_conv_delta(name, row, groups, benchmark):
    product = products()[name]
    seen = under(product)
    image, origin, size = product.places.image, product.places.out_origin, product.places.size

    def dense():
        if seen.shape[2:] == product.filters.weight.shape[2:]:  # a full layer
            change = F.linear(seen.flatten(1), product.filters.weight.flatten(1))[:, :, None, None]
        else:
            change = F.conv2d(seen, product.filters.weight, None, product.step.window[1])
        return rectified(cut(product.clean, image, origin, size), change, product.step.rectifier)

    def check(outputs):
        ours, theirs = outputs["zfcore"], outputs["pytorch"]
        assert (ours - theirs).abs().max() <= MAX_ERROR * theirs.abs().max()

    rows = {"pytorch": dense, "zfcore": lambda: conv_delta(*product)}
    groups.row(benchmark, f"conv_delta {name} nchw", row, rows, check, lambda: work(name))
