"""Each product of ZFNet on what a box changes, and functions of each value, beside the same in dense PyTorch, with its
roofline.

The changes are the network's own: a box of 32 pixels, moved by 8 (on a GPU by 4), on a picture of noise; weights are the
initial ones. PyTorch gets what lies under the windows cut already, zero where nothing changed, and multiplies all of it. On
a GPU in each precision, and what counts as work is all that lies inside a patch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import calls
import pytest
import torch
import torch.nn.functional as F
from device import arithmetic, device, on_gpu
from stages import Work
from zfcore.models import ZFNet
from zfcore.occlusion import PRECISIONS
from zfcore.ops.conv_delta import ConvChange, DeltaFilters, Places, conv_delta
from zfcore.ops.pointwise_delta import pointwise_delta
from zfcore.reference.deconv_step import cut
from zfcore.reference.pointwise_delta import FUNCTIONS
from zfcore.reference.relu_delta import rectified

BOX = 32
STRIDE, PART = (4, (32, 32)) if on_gpu() else (8, (10, 12))  # PART: of the grid, rows and columns
PRODUCTS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")
# By precision, relative to the largest magnitude; a GPU's other side transforms its inputs.
MAX_ERROR = {"exact": 1e-4 if on_gpu() else 1e-5, "tf32": 5e-3, "bf16": 3e-2}
ROWS = ("pytorch", "zfcore")
CASES = [(name, precision) for precision in (PRECISIONS if on_gpu() else ("exact",)) for name in PRODUCTS]


def group_of(name: str, precision: str) -> str:
    return f"conv_delta {name}{'' if precision == 'exact' else f'-{precision}'} nchw"


# Of squeeze-and-excitation, EfficientNet, MobileNet, ConvNeXt.
POINTWISE = ("sigmoid", "silu", "hardswish", "gelu")
PATCHES = (1024 if on_gpu() else 256, 96, 24, 24)  # of maps of 112 x 112


def pointwise_group(name: str) -> str:
    return f"pointwise_delta {name} channels_last"


GROUPS = [*(group_of(*case) for case in CASES), *map(pointwise_group, POINTWISE)]


class Product(NamedTuple):
    """What conv_delta is given: see there. out: memory for its result."""

    delta: torch.Tensor
    filters: DeltaFilters
    step: ConvChange
    places: Places
    clean: torch.Tensor
    out: torch.Tensor


@functools.cache
def products(precision: str) -> dict[str, Product]:
    torch.manual_seed(0)
    model, image = ZFNet().eval().to(device()), torch.rand(1, 3, 224, 224).to(device()) * 255 - 128
    rows, columns = PART
    found = calls.ready(model, image, box=BOX, stride=STRIDE, precision=precision, batch_size=rows * columns)
    every = calls.products(found, calls.middle(found, rows, columns))
    return {name: Product(*call.arguments) for name, call in every.items()}


def under(product: Product) -> torch.Tensor:
    """What lies under the windows of the results."""
    window, places = product.step.window, product.places
    stride, padding = (torch.tensor(pair, device=places.origin.device) for pair in window[1:3])
    corner = places.out_origin * stride - padding - places.origin
    size = [(n - 1) * s + d * (k - 1) + 1 for n, k, s, d in zip(places.size, window[0], window[1], window[3])]
    return cut(product.delta, torch.arange(len(product.delta), device=corner.device), corner, size)


def work(product: Product, precision: str) -> Work:
    kernel, stride, padding, dilation = product.step.window
    pairs = []  # by pixel of an axis: how many taps reach an output
    for axis, length in enumerate(product.step.map):
        at = torch.arange(length)[:, None] + padding[axis] - torch.arange(kernel[axis]) * dilation[axis]
        reached = (at >= 0) & (at % stride[axis] == 0) & (at // stride[axis] < product.step.above[axis])
        pairs.append(reached.sum(1))
    reach = (pairs[0][:, None] * pairs[1])[None, None].float().to(product.delta.device)
    size = tuple(product.delta.shape[2:])
    own = cut(reach, torch.zeros_like(product.places.image), product.places.origin, size)
    counted = torch.ones_like(product.delta) if on_gpu() else (product.delta != 0).float()
    changed = int((counted * own).double().sum())
    outputs = len(product.filters.weight)
    moved = product.delta.nbytes + 2 * product.out.nbytes + product.filters.weight.nbytes
    dense = product.out.numel() * product.filters.weight[0].numel()
    return Work(moved, 2 * changed * outputs, 2 * dense, "float32" if precision == "exact" else precision)


def rows_of(product: Product, precision: str) -> dict:
    seen = under(product)
    image, origin, size = product.places.image, product.places.out_origin, product.places.size

    def dense():
        with arithmetic(precision):
            if seen.shape[2:] == product.filters.weight.shape[2:]:  # a full layer
                change = F.linear(seen.flatten(1), product.filters.weight.flatten(1))[:, :, None, None]
            else:
                change = F.conv2d(seen, product.filters.weight, None, product.step.window[1])
        return rectified(cut(product.clean, image, origin, size), change, product.step.rectifier)

    return {"pytorch": dense, "zfcore": lambda: conv_delta(*product)}


def check(outputs: dict, precision: str) -> None:
    ours, theirs = outputs["zfcore"], outputs["pytorch"]
    assert (ours - theirs).abs().max() <= MAX_ERROR[precision] * theirs.abs().max()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    ("name", "precision"), [pytest.param(*case, id="-".join(case).removesuffix("-exact")) for case in CASES]
)
def test_conv_delta(name, precision, row, groups, benchmark):
    product = products(precision)[name]
    groups.row(
        benchmark,
        group_of(name, precision),
        row,
        rows_of(product, precision),
        lambda outputs: check(outputs, precision),
        lambda: work(product, precision),
    )


@functools.cache
def patches() -> tuple[torch.Tensor, torch.Tensor, Places, torch.Tensor]:
    """Changes anywhere in one picture's map, the map, where they lie, and memory for the result."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, size, _ = PATCHES
    clean = torch.randn((1, channels, 112, 112), generator=generator)
    change = torch.randn(PATCHES, generator=generator)
    origin = torch.randint(0, 112 - size + 1, (batch, 2), generator=generator).to(device())
    clean, change = (x.to(device()).contiguous(memory_format=torch.channels_last) for x in (clean, change))
    places = Places(torch.zeros(batch, dtype=torch.int64, device=device()), origin, origin, (size, size))
    return change, clean, places, torch.empty_like(change)


def pointwise_rows(name: str) -> dict:
    change, clean, places, out = patches()

    def dense():
        x = cut(clean, places.image, places.origin, places.size)
        before = FUNCTIONS[name](x, 0.0, 0.0)
        return FUNCTIONS[name](x.add_(change), 0.0, 0.0).sub_(before)

    return {"pytorch": dense, "zfcore": lambda: pointwise_delta(change, clean, (name, 0.0, 0.0), places, out)}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_delta(name, row, groups, benchmark):
    change, clean, _, out = patches()
    groups.row(
        benchmark,
        pointwise_group(name),
        row,
        pointwise_rows(name),
        lambda outputs: check(outputs, "exact"),
        lambda: Work(change.nbytes + clean.nbytes + out.nbytes),
    )
