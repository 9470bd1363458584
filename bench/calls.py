"""What the engine of `occlusion_map` asks of its ops for one batch of positions, so that it can be asked again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
import zfcore.engine.sweep as engine
from torch import Tensor, nn
from zfcore.engine.sweep import Sweep

OPS = ("paste_boxes", "conv_boxes", "conv_delta", "depthwise_delta", "pool_delta", "lrn_delta", "relu_delta")


class Ready(NamedTuple):
    """The engine and what it is run on: images and fill [N, C, H, W], and the clean maps by stage."""

    sweep: Sweep
    images: Tensor
    fill: Tensor
    maps: dict


class Call(NamedTuple):
    """A call of an op: op(*arguments). name: the layer that it works on."""

    op: Callable
    name: str
    arguments: tuple


class _Stop(Exception):
    pass


def ready(model: nn.Module, images: Tensor, **options: object) -> Ready:
    """The engine as ``occlusion_map`` with these options makes it ready, up to its first batch."""
    import zfcore

    found = []

    def run(*arguments):
        found.append(Ready(*arguments[:4]))
        raise _Stop

    with mock.patch.object(Sweep, "run", run):
        try:
            zfcore.occlusion_map(model, images, 0, **options)
        except _Stop:
            return found[0]
    raise ValueError("the engine does not run this network: it cannot be read, or nothing is gained by it")


def name_of(step: object) -> str:
    """A layer's own name where its rectifier is done with it: the engine names what comes out."""
    size = step.convolution.above if step.convolution is not None else None
    return step.result.name.replace("relu", "relu" if size is None else "conv" if size != (1, 1) else "fc")


@torch.no_grad()
def of_batch(found: Ready, index: Tensor) -> list[Call]:
    """The calls for the positions `index` [k], one batch, with changes and memory for results of their own."""
    calls: list[Call] = []
    working = ["picture"]

    def recorded(op):
        def call(delta, *arguments):
            kept = delta.clone(memory_format=torch.preserve_format)
            result = op(delta, *arguments)
            own = tuple(torch.empty_like(x) if x is result else x for x in arguments)
            calls.append(Call(op, working[0], (kept, *own)))
            return result

        return call

    def named(step, run):
        def change(sweep, step, batch):
            working[0] = name_of(step)
            return run(sweep, step, batch)

        return change

    patches = [mock.patch.object(engine, op, recorded(getattr(engine, op))) for op in OPS if hasattr(engine, op)]
    patches += [mock.patch.object(step, "run", named(step, step.run)) for step in found.sweep.steps]
    for patch in patches:
        patch.start()
    try:
        for _ in found.sweep.run(found.images, found.fill, found.maps, index):
            return calls
    finally:
        for patch in patches:
            patch.stop()
    raise AssertionError("no position was worked at")


def middle(found: Ready, rows: int, columns: int) -> Tensor:
    """The positions [k] of a rows x columns part in the middle of the first image's grid."""
    height, width = map(len, found.sweep.boxes)
    top, left = (height - rows) // 2, (width - columns) // 2
    every = torch.arange(height * width, device=found.images.device).view(height, width)
    return every[top : top + rows, left : left + columns].reshape(-1)
