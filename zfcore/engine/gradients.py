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
        (slope,) = torch.autograd.grad(value, z, torch.ones_like(value), allow_unused=True)
    return value.detach(), torch.zeros_like(z) if slope is None else slope


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


def vjp(run: Callable[..., Tensor], inputs: list[Tensor], signal: Tensor) -> list[Tensor]:
    """The plain gradient of an operation, `inputs` being what it read for each seed."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(run(*inputs), inputs, signal, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
