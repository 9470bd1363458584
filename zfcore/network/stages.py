"""What a network is made of once it is read: stages, each one operation with its parameters and its inputs."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfcore.network.geometry import Field, Window
from zfcore.ops import max_pool2d_with_switches

# Kinds whose way down works on a patch; of the others it needs the whole map.
PATCH_KINDS = frozenset({"conv", "relu", "max_pool", "avg_pool", "batch_norm", "lrn", "identity", "add", "cat", "scale"})


@dataclass(eq=False)
class Stage:
    """One operation of a network.

    kind:    "input", "conv", "relu", "max_pool", "avg_pool", "batch_norm", "lrn", "identity", "add", "cat", "scale", or
             "map" for an operation that needs whole maps on the way down (pooling to a size, flatten, linear, mul, ...).
    name:    the module's dotted name, with "@i" when it is called several times; for a functional call the graph's name.
    inputs:  the stages it reads.
    run:     its forward, from the inputs' values.
    shape:   of its output without the batch axis.
    window:  the sliding window of conv and pools, else None.
    field:   what a position of its output sees of the picture, or None where that is everything.
    """

    index: int
    kind: str
    name: str
    inputs: list[Stage]
    run: Callable[..., Tensor] = None
    shape: tuple[int, ...] = ()
    window: Window | None = None
    field: Field | None = None
    options: dict = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        inputs = ", ".join(stage.name for stage in self.inputs)
        return f"Stage({self.index}: {self.kind} {self.name!r} <- [{inputs}], shape={self.shape}, field={self.field})"


@dataclass(frozen=True)
class Rectifier:
    """A member of the ReLU family: its forward, and where its input lets a gradient pass unchanged.

    ``slope`` is what the gradient and the signal on its way down are scaled by where they are negative; 0 for ReLU.
    """

    forward: Callable[[Tensor], Tensor]
    upper: float = float("inf")
    slope: float = 0.0

    def derivative(self, z: Tensor) -> Tensor:
        """1 where z passes, ``slope`` where it is negative or zero, 0 above ``upper``."""
        inside = (z > 0) & (z < self.upper) if self.upper != float("inf") else z > 0
        one = torch.ones((), dtype=z.dtype, device=z.device)
        low = one * self.slope
        return torch.where(inside, one, torch.where(z <= 0, low, one * 0) if self.slope else one * 0)

    def rectify(self, g: Tensor) -> Tensor:
        """What comes down, rectified: negative values times ``slope``; NaN stays NaN."""
        return F.leaky_relu(g, self.slope) if self.slope else F.relu(g)


def switches_of(x: Tensor, window: Window, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    return max_pool2d_with_switches(x, window.kernel, window.stride, window.padding, window.dilation, ceil_mode)


def batch_norm_scale(norm: nn.Module | dict) -> Tensor:
    """gamma / sqrt(running variance + eps), a channel: what batch normalisation in eval mode multiplies by."""
    get = norm.get if isinstance(norm, dict) else lambda name: getattr(norm, name)
    scale = torch.rsqrt(get("running_var") + get("eps"))
    return scale if get("weight") is None else scale * get("weight")
