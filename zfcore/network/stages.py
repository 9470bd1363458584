"""What a network is made of once it is read: stages, each an operation with its parameters and inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from zfcore.network.geometry import Field, Window


@dataclass(eq=False)
class Stage:
    """One operation of a network.

    kind:    "input", "conv", "relu", "max_pool", "avg_pool", "pad", "batch_norm", "lrn", "identity", "add",
             "cat", "scale" (times a constant), "pointwise" (any other function of each value), "channels" (in
             another order or number), "product" (of two maps, or of a map and a gate), or "map" for an operation that
             needs whole maps on the way down: pooling to a size, linear layers, softmax, normalisation, interpolation.
    inputs:  the stages it reads.
    run:     its forward, from the inputs' values.
    shape:   of its output without the batch axis: (C, H, W), (F,), or any other of a "map".
    window:  the sliding window of conv, pools and pad, else None.
    options: what the engines need besides: of conv "weight" (a function that returns [K, C / groups, kh,
             kw]), "bias" (likewise, [K] or None), "groups" and "even_padding"; of relu "rectifier"; of
             max_pool "ceil_mode"; of avg_pool "share", what each pixel of a window counts (a number, or a
             function of a tensor that is like it: [1, 1, Oh, Ow]); of batch_norm "scale" (a function that
             returns [C]); of scale "factor" (a number, or [C, 1, 1]); of lrn "lrn" (size, alpha, beta, k); of
             pointwise "function", which autograd follows, and "native", its kernel's name and two parameters, or
             None; of channels "index", int64 [K]; of map "matrix" of a full layer, of one row of features or of
             several (a function that returns [K, F]), and its "bias" (likewise, [K] or None), "flat" where it lays the values of a map out in a row, "mean" where it takes the mean of each map, "statistics" where it normalises
             by those of an image's maps. Of any
             "jumps", the operation by which it gives another result, by far, where a value differs by its rounding.
    name:    the module's dotted name, with "@i" when it is called several times; for a function called
             outside such a module, "module:function".
    index:   its place in the network.
    field:   what a position of its output sees of the picture; None where that is everything, or not the same
             size everywhere.
    """

    kind: str
    inputs: list[Stage] = field(default_factory=list)
    run: Callable[..., Tensor] | None = None
    shape: tuple[int, ...] = ()
    window: Window | None = None
    options: dict = field(default_factory=dict)
    name: str = ""
    index: int = 0
    field: Field | None = None

    def __repr__(self) -> str:
        inputs = ", ".join(stage.name for stage in self.inputs)
        made = f"{self.index}: {self.kind} {self.name!r} <- [{inputs}]"
        return f"Stage({made}, shape={self.shape}, field={self.field})"


@dataclass(frozen=True)
class Rectifier:
    """A member of the ReLU family: its forward, and where its input lets a gradient pass unchanged.

    ``slope`` is what the gradient and the signal on its way down are scaled by where they are negative; 0 for
    ReLU. ``upper`` is where the forward saturates, as ReLU6 does at 6. ``idle``: its input is never negative, as inside
    torch's own ``lp_pool2d``, so that it has nothing to rectify and its way down is its gradient under every rule.
    """

    forward: Callable[[Tensor], Tensor]
    upper: float = math.inf
    slope: float = 0.0
    idle: bool = False

    @property
    def by_rule_alone(self) -> bool:
        """Whether all of its way down is the rule: a maximum with 0, and a mask."""
        return not self.slope and not self.idle

    def derivative(self, z: Tensor) -> Tensor:
        """1 where z passes, ``slope`` where it is negative or zero, 0 from ``upper`` on; NaN passes.

        Bytes for slope 0.
        """
        blocked = z <= 0
        if self.slope:
            return torch.where(blocked, self.slope, 1.0).to(z.dtype)
        return ~(blocked | (z >= self.upper)) if self.upper != math.inf else ~blocked

    def rectify(self, g: Tensor) -> Tensor:
        """What comes down, rectified: negative values times ``slope``; NaN stays NaN."""
        return F.leaky_relu(g, self.slope) if self.slope else F.relu(g)


def scale_of(stage: Stage) -> Tensor | float:
    """What batch normalisation, or a constant, multiplies by: [C, 1, 1], or one number."""
    return stage.options["scale"]()[:, None, None] if stage.kind == "batch_norm" else stage.options["factor"]
