"""Models that would be read wrongly by a reader that takes more for granted than it sees."""

from __future__ import annotations

import functools
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zfcore.errors import UnsupportedOperation
from zfcore.network import read_network

SHAPE = (3, 8, 8)


class Net(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, self.conv(x))


def computed(network, images):
    return network.returned(network.forward(images, lambda stage, inputs: stage.run(*inputs)))


def same(model, counts=(1, 2, 7)):
    """What is read computes what the model does."""
    network = read_network(model.eval(), SHAPE)
    with torch.no_grad():
        for count in counts:
            images = torch.randn(count, *SHAPE)
            got, wanted = computed(network, images), model(images)
            torch.testing.assert_close(got, wanted)
    return network


def refused(model, match, **options):
    with pytest.raises(UnsupportedOperation, match=match):
        read_network(model.eval(), SHAPE, **options)


# ---- The number of images ----------------------------------------------------------------------------------


@functools.lru_cache
def _remembered(count):
    return 2.0 if count == 1 else 1.0


@torch.jit.script
def _scripted(x: torch.Tensor):
    if x.size(0) == 1:
        return x * 2
    return x


COUNTED = {
    "two": lambda m, x: x * 2 if x.shape[0] == 2 else x,
    "two by len": lambda m, x: x * 2 if len(x) == 2 else x,
    "more than eight": lambda m, x: x * 2 if x.shape[0] > 8 else x,
    "more than can be tried": lambda m, x: x * 2 if x.shape[0] > 1000 else x,
    "odd": lambda m, x: x * 2 if x.shape[0] % 2 else x,
    "three at most": lambda m, x: x * min(x.shape[0], 3),
    "eights": lambda m, x: x * (1 + x.shape[0] // 8),
    "half": lambda m, x: x * int(x.shape[0] * 0.5),
    "bits": lambda m, x: x * x.shape[0].bit_length(),
    "in common with four": lambda m, x: x * math.gcd(x.shape[0], 4),
    "in a table": lambda m, x: x * {1: 2.0}.get(x.shape[0], 1.0),
    "its shape in a table": lambda m, x: x * {(1, 4, 8, 8): 2.0}.get(x.shape, 1.0),
    "remembered": lambda m, x: x * _remembered(x.shape[0]),
    "to numpy": lambda m, x: x * float(np.prod(x.shape)),
    "of ones": lambda m, x: x / torch.ones_like(x[:, :1]).sum(),
    "of strides": lambda m, x: x * x.transpose(0, 1).contiguous().stride(0),
    "torch.cond": lambda m, x: torch.cond(x.shape[0] > 2, lambda v: v * 2, lambda v: v * 3, (x,)),
    "in a script": lambda m, x: _scripted(x),
    "beside a map": lambda m, x: {"map": x, "images": x.shape[0]},
    "beside a map, by len": lambda m, x: {"map": x, "images": len(x)},
    "a constant beside a map": lambda m, x: (x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_number_of_images_in_any_form_is_seen(name):
    refused(Net(COUNTED[name]), "depends on the number of images")


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.view(x.shape[0], -1),
        lambda m, x: x * 2 if isinstance(x.shape, torch.Size) else x,
        lambda m, x: x * 2 if x.shape[0] > 0 and x.shape == (x * 1).shape else x,
        lambda m, x: (x, torch.ones(2)),
    ],
)
def test_the_number_of_images_may_be_used(function):
    same(Net(function))


# ---- Expressions -------------------------------------------------------------------------------------------


def test_maps_with_the_images_second_are_read_in_time_that_their_number_gives():
    def branching(m, x):
        y = x.permute(1, 0, 2, 3)
        for _ in range(40):  # 2 ** 40 ways through
            y = (y + y.sigmoid()) / 2
        return y.permute(1, 0, 2, 3)

    start = time.perf_counter()
    same(Net(branching))
    assert time.perf_counter() - start < 20


def test_maps_with_the_images_second_may_be_thousands():
    def deep(m, x):
        y = x.permute(1, 0, 2, 3)
        for _ in range(1500):
            y = y.sigmoid()
        return y.permute(1, 0, 2, 3)

    same(Net(deep))
