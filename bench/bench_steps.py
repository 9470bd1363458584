"""Each step of the way down from conv5 of ZFNet on patches, beside the same in dense PyTorch, with its roofline.

The way from conv5's seeds goes by patches of 3, 5, 7 (pool2: 15), 33 (pool1: 67) and 139 pixels a side. PyTorch gets
patches that are cut already; half of what comes down is negative, as it is in a network. "full" is the case where
skipping zeros gains nothing, because there are none: it shows that no step needs a dense kernel beside the sparse one.
On a GPU the step down to the picture, whose kernel is in CUDA C++, has its Triton twin beside it, `zfcore-triton`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from device import device, on_gpu
from stages import Work
from twins import TWIN, on_triton
from zfcore.ops import max_pool2d_with_switches
from zfcore.ops.deconv_step import deconv_step
from zfcore.reference._params import StepParams
from zfcore.reference.deconv_step import cut

SEEDS = 1024 if on_gpu() else 64
MAX_ERROR = 1e-4 if on_gpu() else 1e-5  # relative to the largest magnitude; a GPU's other side transforms its inputs


class Step(NamedTuple):
    """A step down: maps and patch above, filters, and the maps below; pooled: by 3 x 3 windows of stride 2."""

    channels: int
    patch: int
    size: int
    pooled: bool
    out: int
    kernel: int
    stride: int
    padding: int
    below: int
    full: bool = False


STEPS = {
    "conv4": Step(384, 3, 13, False, 384, 3, 1, 1, 13),
    "conv3": Step(384, 5, 13, False, 256, 3, 1, 1, 13),
    "conv3-full": Step(384, 5, 13, False, 256, 3, 1, 1, 13, full=True),
    "conv2": Step(256, 7, 26, True, 96, 5, 2, 0, 55),
    "conv1": Step(96, 33, 110, True, 3, 7, 2, 1, 224),
}
PICTURE = "conv1"
GROUPS = [f"deconv_step {name} nchw" for name in STEPS]
CASES = [(name, row) for name in STEPS for row in ("pytorch", "zfcore", TWIN) if row != TWIN or (on_gpu() and name == PICTURE)]
POOL = ((3, 3), (2, 2), (1, 1), (1, 1))


class Tensors(NamedTuple):
    signal: torch.Tensor
    weight: torch.Tensor
    params: StepParams
    image: torch.Tensor
    origin: torch.Tensor
    switches: torch.Tensor | None
    own: torch.Tensor | None  # the switches of each patch


@functools.cache
def tensors(name: str) -> Tensors:
    """Patches that lie inside their maps, so that nothing is cut off."""
    step = STEPS[name]
    torch.manual_seed(0)
    signal = torch.randn(SEEDS, step.channels, step.patch, step.patch, device=device())
    signal = signal.abs() if step.full else signal
    signal = signal.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(step.channels, step.out, step.kernel, step.kernel, device=device())
    conv = ((step.kernel,) * 2, (step.stride,) * 2, (step.padding,) * 2, (1, 1))
    params = StepParams(
        POOL if step.pooled else None, conv, 1, (step.size,) * 2, (step.below,) * 2, False, True, "sum"
    )
    image = torch.zeros(SEEDS, dtype=torch.int64, device=device())
    origin = torch.full((SEEDS, 2), 3, device=device())
    switches = own = None
    if step.pooled:
        maps = torch.randn(1, step.channels, step.size, step.size, device=device())
        _, switches = max_pool2d_with_switches(maps, 3, 2, 1)
        switches = switches.contiguous(memory_format=torch.channels_last)
        own = cut(switches, image, origin, (step.patch,) * 2)
    return Tensors(signal, weight, params, image, origin, switches, own)


def unpooled(t: Tensors) -> torch.Tensor:
    if t.own is None:
        return t.signal
    side = 2 * (t.signal.size(2) - 1) + 3
    corner = torch.arange(t.signal.size(2), device=t.own.device) * 2
    place = (corner[:, None] + t.own // 3) * side + corner + t.own % 3
    flat = t.signal.new_zeros(*t.signal.shape[:2], side * side)
    return flat.scatter_add_(2, place.flatten(2), t.signal.flatten(2)).unflatten(2, (side, side))


def work(name: str) -> Work:
    t = tensors(name)
    u = unpooled(t)
    taps = t.weight[0].numel()
    below = deconv_step(*t[:6])
    moved = t.signal.nbytes + below.nbytes + t.weight.nbytes + (t.own.nbytes if t.own is not None else 0)
    return Work(moved, 2 * int((u > 0).sum()) * taps, 2 * u.numel() * taps)


@pytest.mark.parametrize(("name", "row"), CASES)
def test_step(name, row, groups, benchmark):
    t = tensors(name)

    def check(outputs):
        theirs = outputs["pytorch"]
        below, first = STEPS[name].below, int(t.origin[0, 0])
        if t.own is not None:
            first = 2 * first - 1
        first = first * STEPS[name].stride - STEPS[name].padding
        inside = torch.arange(first, first + theirs.size(2), device=theirs.device) < below
        theirs = theirs * inside * inside[:, None]
        for way in outputs.keys() - {"pytorch"}:
            assert (outputs[way] - theirs).abs().max() <= MAX_ERROR * theirs.abs().max(), way

    rows = {
        "pytorch": lambda: F.conv_transpose2d(F.relu(unpooled(t)), t.weight, None, t.params.conv[1]),
        "zfcore": lambda: deconv_step(*t[:6]),
    }
    if (name, TWIN) in CASES:
        rows[TWIN] = on_triton(rows["zfcore"])
    groups.row(benchmark, f"deconv_step {name} nchw", row, rows, check, lambda: work(name))
