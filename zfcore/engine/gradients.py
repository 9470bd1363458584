"""The plain gradients that the way down of the deconvnet takes where an operation has no rule of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zfcore.network import Stage


def derivative(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """function(z), a function of each value, and its derivative there."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = function(z)
    return value.detach(), _grad(value, [z], torch.ones_like(value))[0]


def is_linear(stage: Stage) -> bool:
    """Whether a "map" stage's way down does not depend on the image, so that nothing of the way up is kept for it."""
    return any(stage.options.get(name) for name in ("matrix", "mean", "flat"))


def linear_down(stage: Stage, signal: Tensor) -> Tensor:
    """The transpose of a stage that `is_linear`, from the signal [B, *its shape] to that of its input."""
    shape = stage.inputs[0].shape
    if stage.options.get("matrix"):
        return signal @ stage.options["matrix"]()
    if stage.options.get("mean"):  # one number a map, which stays one number in memory
        share = signal.reshape(len(signal), shape[0], 1, 1) / (shape[1] * shape[2])
        return share.expand(-1, *shape)
    return signal.reshape(len(signal), *shape)


def reduced(signal: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The signal summed over what an operand of this shape was broadcast along."""
    wide = [axis for axis, size in enumerate(shape, 1) if size == 1 and signal.shape[axis] != 1]
    return signal.sum(wide, keepdim=True) if wide else signal


SMALL = 16384  # numbers: below, a backward of its own for each seed costs more than to run the operation again for all


class Gradient:
    """The plain gradient of an operation at what it read for a batch of images.

    It runs once more for an image, and keeps what a backward needs as long as the seeds are of that image: a backward a
    seed then reads one image's values, where a batch of seeds would first need a copy of them for each.
    """

    def __init__(self, run: Callable[..., Tensor], inputs: list[Tensor]):
        self.run, self.inputs = run, inputs
        # On a GPU every call is launches, whatever is in it.
        self.together = inputs[0].device.type != "cpu" or sum(x[0].numel() for x in inputs) < SMALL
        self.image, self.leaves, self.value = -1, [], None

    def down(
        self, signal: Tensor, image: Tensor, runs: list[tuple[int, slice]], take: Callable[[tuple[int, ...]], Tensor]
    ) -> list[Tensor]:
        """From the signal [B, *shape] to that of each input.

        image: [B], of each seed; runs: the same, as the rows of each image in turn. take: makes memory of a shape.
        """
        if self.together:
            return _vjp(self.run, [x[image] for x in self.inputs], signal)
        self.move_to(runs[0][0])
        if all(self.value.untyped_storage() is x.untyped_storage() for x in self.leaves):  # views of all are free
            return _vjp(self.run, [x.expand(len(signal), *x.shape[1:]) for x in self.leaves], signal)
        grads = [take((len(signal), *x.shape[1:])) for x in self.leaves]
        for one, rows in runs:
            self.move_to(one)
            for row in range(rows.start, rows.stop):
                for grad, g in zip(grads, _grad(self.value, self.leaves, signal[row : row + 1]), strict=True):
                    grad[row : row + 1] = g
        return grads

    def move_to(self, image: int) -> None:
        if image != self.image:
            with torch.enable_grad():
                self.leaves = [x[image : image + 1].detach().requires_grad_() for x in self.inputs]
                self.image, self.value = image, self.run(*self.leaves)


def _vjp(run: Callable[..., Tensor], inputs: list[Tensor], signal: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        return _grad(run(*inputs), inputs, signal)


def _grad(value: Tensor, inputs: list[Tensor], signal: Tensor) -> list[Tensor]:
    """Of inputs that the value does not depend on, zeros.

    The signal is laid out row by row: of one image, torch's instance normalisation takes one with its channels last for
    another, without a word.
    """
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    signal = signal.contiguous()
    grads = torch.autograd.grad(value, inputs, signal, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
