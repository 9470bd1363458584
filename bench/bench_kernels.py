"""The kernels of occlusion that move bytes, beside their definitions in plain PyTorch, with their share of a copy's speed.

What they are given is the engine's own: boxes of 32 pixels moved by 4 over a picture of noise, on ZFNet with contrast
normalisation, whose second rectifier is asked for, so that no product does it on the side. On a GPU only (conftest.py): on
a CPU these passes are a small part of an occlusion map.
"""

from __future__ import annotations

import functools

import calls
import pytest
import torch
from device import device
from stages import Work
from torch import Tensor
from zfcore import use_backend
from zfcore.models import ZFNet
from zfcore.ops.paste_boxes import paste_boxes
from zfcore.reference._params import Places

BOX, STRIDE, PART = 32, 4, (32, 32)
MAX_ERROR = 1e-5  # relative to the largest magnitude
ROWS = ("reference", "zfcore")
KERNELS = ("pool_delta pool1", "lrn_delta norm1", "relu_delta relu2", "pool_delta pool2", "lrn_delta norm2")
PASTED = "paste_boxes picture"
GROUPS = [f"{kernel} channels_last" for kernel in (PASTED, *KERNELS)]


@functools.cache
def kernels(box: int = BOX, stride: int = STRIDE, part: tuple[int, int] = PART) -> dict[str, calls.Call]:
    """The engine's calls by op and layer."""
    torch.manual_seed(0)
    model = ZFNet(contrast_norm=True).eval().to(device())
    image = torch.rand(1, 3, 224, 224).to(device()) * 255 - 128
    options = {"box": box, "stride": stride, "batch_size": part[0] * part[1], "feature": ("conv2", 0)}
    found = calls.ready(model, image, **options)
    every = calls.of_batch(found, calls.middle(found, *part))
    named = {f"{call.op.__name__} {call.name}": call for call in every}
    return {PASTED: pasted(image, box, part[0] * part[1] * 16), **named}


def pasted(image: Tensor, box: int, count: int) -> calls.Call:
    """Boxes anywhere in 16 pictures, each in a patch a little larger."""
    generator = torch.Generator().manual_seed(0)
    patch = box + 6
    origin = torch.randint(0, image.size(2) - patch, (count, 2), generator=generator).to(device())
    first = origin + 3
    which = torch.randint(0, 16, (count,), generator=generator).to(device())
    images = image.expand(16, -1, -1, -1).contiguous()
    places = Places(which, origin, origin, (patch, patch))
    return calls.Call(
        paste_boxes, "picture", (images, torch.zeros_like(images), torch.cat((first, first + box), 1), places)
    )


def work(call: calls.Call) -> Work:
    """Changes or pictures and clean maps once in, results once out."""
    result = call.op(*call.arguments)
    read = [x for x in call.arguments[:3] if isinstance(x, Tensor) and x.is_floating_point()]
    return Work(sum(x.nbytes for x in read) + result.nbytes)


def rows_of(call: calls.Call) -> dict:
    def reference():
        with use_backend("reference"):
            return call.op(*call.arguments).clone()  # which the other row writes over

    return {"reference": reference, "zfcore": lambda: call.op(*call.arguments)}


def check(outputs: dict[str, Tensor]) -> None:
    ours, theirs = outputs["zfcore"], outputs["reference"]
    assert (ours - theirs).abs().max() <= MAX_ERROR * theirs.abs().max()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", (PASTED, *KERNELS))
def test_kernel(name, row, groups, benchmark):
    call = kernels()[name]
    group = f"{name} channels_last"
    groups.row(benchmark, group, row, rows_of(call), check, lambda: work(call), against="reference")
