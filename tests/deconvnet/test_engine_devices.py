"""The engine on another device than the CPU: no tensor of it is left behind, and nothing waits for the device.

Needs no GPU: the tensors hold no values.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from waiting import NothingWaits, OneDevice

from zfcore import deconvnet, iter_projections
from zfcore.engine import patches as engine


class Branches(nn.Module):
    """Every operation that the engine undoes on patches, but those whose undoing is the plain gradient."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, 2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.right = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(24, 6, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(nn.functional.pad(x, (1, 2, 0, 1)))))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        left, right = self.norm(self.left(x)), torch.relu(self.right(x))
        x = torch.cat((left + right, right, torch.relu(left)), 1)
        return self.last(nn.functional.avg_pool2d(x, 2))


@pytest.fixture
def shapes_only(monkeypatch):
    """The ops give memory without values."""
    steps = []

    def step(signal, weight, step, image, origin, switches, passes, scale, frame, out):
        given = (signal, weight, image, origin, switches, passes, scale, out, *(() if frame is None else frame[:1]))
        assert {t.device for t in given if t is not None} == {signal.device}
        steps.append(step)

    monkeypatch.setattr(engine, "deconv_step", step)
    monkeypatch.setattr(deconvnet, "exact_arithmetic", lambda device: contextlib.nullcontext())  # meta has none
    monkeypatch.setattr(deconvnet, "unwrapped", lambda model: model)  # which would refuse it, as it would its images
    monkeypatch.setattr(deconvnet, "checked_images", lambda images: images)
    return steps


@pytest.mark.filterwarnings("ignore:zfcore.*runs on the reference")
@pytest.mark.parametrize("options", [{}, {"crop": True}, {"rule": "guided", "overlap": "last"}, {"positions": "all"}], ids=str)
def test_nothing_waits_for_the_device_on_the_way_down(shapes_only, options):
    model = Branches().eval().to("meta")
    images = torch.empty(2, 3, 40, 44, device="meta")
    seen, waits = 0, contextlib.ExitStack()
    with OneDevice():
        for batch in iter_projections(model, images, "last", [0, 5, 3], batch_size=2, **options):
            assert {value.device.type for value in (batch.pixels, batch.boxes, batch.positions)} == {"meta"}
            seen += len(batch.pixels)
            waits.enter_context(NothingWaits())  # after the first batch, which reads the network and goes up
        waits.close()
    assert seen == 6 and len(shapes_only) >= 3
