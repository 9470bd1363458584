"""The engine on another device than the CPU: no tensor of it is left behind, and nothing waits for the device.

Needs no GPU: the tensors hold no values.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from waiting import NothingWaits, OneDevice

from zfcore import reference
from zfcore.engine import sweep as engine
from zfcore.engine.adaptive import Everything
from zfcore.engine.grid import Grid
from zfcore.engine.measuring import Answers, FeatureTotals, Measured
from zfcore.network import read_network
from zfcore.occlusion import _Changes
from zfcore.ops.conv_delta import DeltaFilters


class Branches(nn.Module):
    """Every operation that the engine takes on patches, and one that it does not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, 2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.lrn = nn.LocalResponseNorm(5)
        self.left = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.right = nn.Conv2d(8, 8, 1)
        self.full = nn.Linear(24 * 4, 10)

    def forward(self, x):
        x = self.lrn(torch.relu(self.norm(self.conv(nn.functional.pad(x, (1, 2, 0, 1))))))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        left, right = self.norm(self.left(x)), torch.sigmoid(self.right(x)) * 0.5
        left = torch.cat(left.split(4, 1), 1) * nn.functional.softmax(x.mean((2, 3)), 1)[:, :, None, None]
        x = torch.cat((left + right, nn.functional.relu6(right), torch.relu(left)), 1)
        x = nn.functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        return self.full(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.fixture
def shapes_only(monkeypatch):
    """The ops give memory without values; whatever mixes devices is refused by torch."""

    def filters(weight, scale, shape, groups, precision):
        assert scale is None or scale.device == weight.device
        return DeltaFilters(weight.reshape(shape), groups, scale, None, True)

    def give(delta, *arguments):
        out, places = arguments[-1], next(a for a in arguments if isinstance(a, tuple) and hasattr(a, "out_origin"))
        maps = [a for a in arguments[:-1] if isinstance(a, torch.Tensor)]
        assert {t.device for t in (delta, *maps, out, *places[:3])} == {delta.device}
        return out

    monkeypatch.setattr(engine, "delta_filters", filters)
    for name in ("conv_boxes", "conv_delta", "pool_delta", "lrn_delta", "relu_delta", "pointwise_delta"):
        monkeypatch.setattr(engine, name, give)
    monkeypatch.setattr(engine, "paste_boxes", reference.paste_boxes)


@pytest.mark.parametrize("changes", [0, 3, 1000])
@pytest.mark.parametrize("layer", [None, "left"])
def test_all_of_the_engine_is_on_one_device(shapes_only, layer, changes):
    model = Branches().eval().to("meta")
    network = read_network(model, (3, 40, 44))
    feature = None if layer is None else network.calls[model.left][-1]
    images = torch.empty(2, 3, 40, 44, device="meta")
    with OneDevice(), torch.no_grad():
        y, x = (((0, 8), (8, 16), (32, 40)), ((0, 8), (30, 38)))
        sweep = engine.Sweep(network, feature, y, x, torch.float32, 4, images.device, changes=changes)
        maps, _ = sweep.up(images)
        seen = 0
        every = torch.arange(12, device="meta")
        waits = contextlib.ExitStack()
        for index, output, change in sweep.run(images, torch.zeros_like(images), maps, every):
            assert {t.device.type for t in (index, output)} == {"meta"}
            assert feature is None or change.device.type == "meta"
            seen += len(index)
            waits.enter_context(NothingWaits())  # after the first batch, which brings what is kept
        waits.close()
    assert seen == 12
    if changes < 1000:
        assert len(sweep.steps) == changes
        return
    assert {step.run.__name__ for step in sweep.steps} >= {
        "change_product", "change_max_pool", "change_avg_pool", "change_pad", "change_add", "change_cat", "change_any",
        "change_pointwise", "change_channels", "change_factors",
    }  # fmt: skip


class Plain(nn.Sequential):
    """A picture that one convolution reads, so that its changes are never laid out."""

    def __init__(self):
        convolutions = nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 8, 3)
        super().__init__(*convolutions, nn.Flatten(), nn.Linear(8 * 36, 10))


@pytest.mark.parametrize("layer", [None, "0", "3"])
@pytest.mark.parametrize("score", ["probability", "logit", lambda output: output[:, 3]], ids=["probability", "logit", "called"])
def test_nothing_waits_for_the_device_between_batches(shapes_only, layer, score):
    """Of all that `occlusion_map` does for a batch of positions: the engine, and what is measured of its outputs."""
    model = Plain().eval().to("meta")
    network = read_network(model, (3, 40, 40))
    images = torch.empty(2, 3, 40, 40, device="meta")
    totals = None
    if layer is not None:
        totals = FeatureTotals(model, (layer, None), images)
    grid = Grid.over((40, 40), (8, 8), (8, 8))
    sweep = engine.Sweep(network, totals and totals.stage(network), grid.y, grid.x, torch.float32, 7, images.device, changes=1000)
    assert [step.run.__name__ for step in sweep.steps].count("change_boxes") == 1
    answers = Answers(score, None, images)
    answers.checked = True  # one look at the clean outputs, which these tensors do not have
    changes, measured = _Changes(sweep, images, torch.zeros_like(images), len(grid), answers, totals), Measured(2, len(grid))
    seen, waits = 0, contextlib.ExitStack()
    with torch.no_grad():
        for group in changes.groups():
            for owners, parts in changes.clean(group):
                measured.put("clean", owners, parts)
            for index in Everything(grid).rounds(group, measured):
                for own, parts in changes.measure(index):
                    measured.put("occluded", own, parts)
                    waits.enter_context(NothingWaits())
                    seen += len(own)
        waits.close()
    assert seen == 2 * len(grid) and len(changes.blurred) > 2


def test_what_would_wait_is_refused():
    x = torch.zeros(3)
    for read in (lambda: x.tolist(), lambda: x[x > 0], lambda: bool(x.any()), lambda: torch.tensor([1]), lambda: x[[1]]):
        with pytest.raises(AssertionError), NothingWaits():
            read()


def test_sweeps_where_kernels_run_the_tensors():
    image = torch.zeros(1)
    assert engine.sweeps(image) and engine.sweeps(image.double())
    assert not engine.sweeps(image.half()) and not engine.sweeps(image.to("meta"))
