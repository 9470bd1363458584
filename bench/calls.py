"""What the engines ask of their ops for one batch of positions, or of projections, so that it can be asked again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
import zfcore
import zfcore.engine.sweep as engine
from torch import Tensor, nn
from zfcore.engine import patches
from zfcore.engine.sweep import Sweep
from zfcore.ops.conv_delta import conv_delta
from zfcore.ops.deconv_step import deconv_step


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


def _first_batch(found: Ready, index: Tensor, around: Callable) -> None:
    """Runs the positions `index` [k], one batch; around(step, run, batch) gives each step's result."""

    def changed(step, run):
        return lambda sweep, step, batch: around(step, lambda: run(sweep, step, batch), batch)

    with contextlib.ExitStack() as stack, torch.no_grad():
        for step in found.sweep.steps:
            stack.enter_context(mock.patch.object(step, "run", changed(step, step.run)))
        next(found.sweep.run(found.images, found.fill, found.maps, index))


@contextlib.contextmanager
def _recording(calls: list[Call], working: list[str]) -> Iterator[None]:
    """Notes every call of an op, with a first argument and memory for its result of its own. working: the layer."""

    def recorded(op):
        def call(first, *arguments):
            kept = first.clone(memory_format=torch.preserve_format)
            result = op(first, *arguments)
            own = tuple(torch.empty_like(x) if x is result else x for x in arguments)
            calls.append(Call(op, working[-1], (kept, *own)))
            return result

        return call

    with contextlib.ExitStack() as stack:
        for name, value in list(vars(engine).items()):
            if getattr(value, "__module__", "") == f"zfcore.ops.{name}":  # an op's file bears its name
                stack.enter_context(mock.patch.object(engine, name, recorded(value)))
        yield


def of_batch(found: Ready, index: Tensor) -> list[Call]:
    """The calls of ops for the positions `index` [k], one batch."""
    calls: list[Call] = []
    working = ["picture"]

    def around(step, run, batch):
        working.append(name_of(step))
        return run()

    with _recording(calls, working):
        _first_batch(found, index, around)
    return calls


def products(found: Ready, index: Tensor) -> dict[str, Call]:
    """By layer, the calls of ``conv_delta`` that do what each product of the batch does."""
    calls: dict[str, Call] = {}

    def around(step, run, batch):
        result = run()
        if step.filters is not None:
            sweep, source = found.sweep, step.sources[0]
            delta = sweep.painted(found.images, found.fill, batch) if source is sweep.picture else batch.changes[source]
            delta = delta.clone(memory_format=torch.preserve_format)
            clean = batch.maps[step.before] if step.before else None
            arguments = (delta, step.filters, step.convolution, sweep.places(step, batch), clean)
            calls[name_of(step)] = Call(conv_delta, name_of(step), (*arguments, torch.empty_like(result)))
        return result

    _first_batch(found, index, around)
    return calls


def middle(found: Ready, rows: int, columns: int) -> Tensor:
    """The positions [k] of a rows x columns part in the middle of the first image's grid."""
    height, width = map(len, found.sweep.boxes)
    top, left = (height - rows) // 2, (width - columns) // 2
    every = torch.arange(height * width, device=found.images.device).view(height, width)
    return every[top : top + rows, left : left + columns].reshape(-1)


def of_projections(model: nn.Module, images: Tensor, layer: str, units: int) -> list[Call]:
    """The calls of ``deconv_step`` that the first batch of projections of so many units asks for, cropped."""
    calls: list[Call] = []

    def recorded(signal, weight, step, *arguments):
        kept = signal.clone(memory_format=torch.preserve_format)
        deconv_step(signal, weight, step, *arguments)
        name = f"{layer}: {weight.size(0)} to {weight.size(1)} from {' x '.join(map(str, signal.shape[2:]))}"
        calls.append(Call(deconv_step, name, (kept, weight, step, *arguments[:-1], torch.empty_like(arguments[-1]))))

    with mock.patch.object(patches, "deconv_step", recorded):
        next(zfcore.iter_projections(model, images, layer, range(units), crop=True))
    return calls
