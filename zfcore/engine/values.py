"""Whole maps: the upper stages of a network as plain operations on a batch, faster than its own forward.

Above some stage of a network a box has changed all there is, or nearly, and a change is no less than a map. From there
on the maps themselves travel, `clean + change` formed once: nothing is gathered, added up and subtracted, no clean map is
read. Batch normalisation and constants are folded into the convolution before them, functions of each value are done
with it or in place, maps lie channels last, and the batch is small enough to stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zfcore.network import Stage, scale_of

LAST = torch.channels_last

# What oneDNN does with a convolution, by its names: not rectifiers, with which it turns NaN into numbers. And what torch
# does in place.
WITH_PRODUCT = {
    "silu": ("swish", ""),
    "sigmoid": ("sigmoid", ""),
    "tanh": ("tanh", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
    "exp": torch.exp_,
    "square": torch.square_,
    "abs": torch.abs_,
    "sqrt": torch.sqrt_,
    "silu": lambda x: F.silu(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "hardsigmoid": lambda x: F.hardsigmoid(x, inplace=True),
    "mish": lambda x: F.mish(x, inplace=True),
}


@dataclass
class _Operation:
    """run: from the sources' values to the result's. last: the sources that nothing reads after it."""

    result: Stage
    sources: list[Stage]
    run: Callable[..., Tensor]
    last: tuple[Stage, ...] = ()


class Values:
    """The upper stages of a network, ready to run on batches.

    stages: in order, with all that reads one of them. feature: a stage whose values are asked for, or None.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        readers: dict[Stage, list[Stage]],
        feature: Stage | None,
        output: Stage,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.stages = set(stages)
        self.readers = {stage: [r for r in own if r in self.stages] for stage, own in readers.items()}
        self.wanted = self.stages & {feature, output}
        self.dtype, self.device = dtype, device
        self.packs = device.type == "cpu" and dtype == torch.float32 and _packs_filters()
        # Whether maps lie channels last, which the CPU's products of doubles are slow on.
        self.last = dtype != torch.float64 or device.type != "cpu"
        # Whose value is no other's memory, so that it may be written over.
        self.owned = {source for stage in stages for source in stage.inputs if source not in self.stages}
        self.entering = list(self.owned)
        self.operations: list[_Operation] = []
        done: set[Stage] = set()
        for stage in stages:
            if stage not in done:
                done |= self.plan(stage)
        seen: set[Stage] = set()
        for operation in reversed(self.operations):
            operation.last = tuple(s for s in dict.fromkeys(operation.sources) if s not in seen)
            seen |= set(operation.sources)

    def only(self, stage: Stage) -> Stage | None:
        """The one reader of a stage that nobody else asks for."""
        readers = self.readers[stage]
        return readers[0] if len(readers) == 1 and stage not in self.wanted else None

    def writable(self, source: Stage) -> bool:
        return source in self.owned and self.only(source) is not None

    def plan(self, stage: Stage) -> set[Stage]:
        """Plans a stage, and what is done with it; gives all that is done then."""
        if stage.kind == "conv":
            return self.plan_convolution(stage)
        run, owned = self.plain(stage)
        self.operations.append(_Operation(stage, list(stage.inputs), run))
        if owned:
            self.owned.add(stage)
        return {stage}

    def plan_convolution(self, stage: Stage) -> set[Stage]:
        scale, shift, last = None, None, stage
        done = [stage]
        while (reader := self.only(last)) is not None and (affine := self.affine(reader)) is not None:
            own, offset = affine
            scale = own if scale is None else scale * own
            shift = offset if shift is None else shift * own + offset
            last = reader
            done.append(reader)
        rectifier = self.only(last)
        name = None if rectifier is None else _done_with_product(rectifier) if self.packs else None
        if name is not None:
            last = rectifier
            done.append(rectifier)
        self.operations.append(_Operation(last, list(stage.inputs), self.convolution(stage, scale, shift, name)))
        self.owned.add(last)
        return set(done)

    def affine(self, stage: Stage) -> tuple[Tensor, Tensor] | None:
        """What a stage multiplies each channel by and adds to it, [C] each, where it does that and no more."""
        if stage.kind not in ("batch_norm", "scale", "identity") or len(stage.shape) != 3:
            return None
        channels, made = stage.shape[0], {"dtype": self.dtype, "device": self.device}
        if stage.kind == "identity":
            scale = torch.ones(channels, **made)
        else:
            scale = torch.as_tensor(scale_of(stage), **made).reshape(-1).expand(channels)
        if stage.kind == "batch_norm":
            return scale, stage.run(torch.zeros(1, channels, 1, 1, **made)).flatten()
        shift = stage.run(torch.zeros(1, *stage.shape, **made))[0].flatten(1)  # a constant is added, or none
        one = shift[:, 0]
        return (scale, one) if torch.equal(shift, one[:, None].expand_as(shift)) else None

    def convolution(
        self, stage: Stage, scale: Tensor | None, shift: Tensor | None, name: tuple[str, str] | None
    ) -> Callable[[Tensor], Tensor]:
        options, (kernel, stride, before, dilation) = stage.options, stage.window
        weight, bias, groups = options["weight"]().detach(), options["bias"](), options["groups"]
        bias = None if bias is None else bias.detach()
        if scale is not None:
            weight = weight * scale[:, None, None, None]
            bias = shift if bias is None else bias * scale + shift
        padding, sides = list(before), None
        if not options.get("even_padding", True):
            sizes = zip(stage.shape[1:], stage.inputs[0].shape[1:], kernel, stride, before, dilation, strict=True)
            after = [(out - 1) * s + d * (k - 1) + 1 - n - p for out, n, k, s, p, d in sizes]
            sides, padding = (before[1], after[1], before[0], after[0]), [0, 0]
        geometry = (padding, list(stride), list(dilation), groups)
        if self.packs:
            shape = [1, *stage.inputs[0].shape]
            product = _packed(weight, bias, geometry, shape, *(name or ()))
        else:
            weight = weight.contiguous(memory_format=LAST) if self.last else weight

            def product(x: Tensor) -> Tensor:
                return F.conv2d(x, weight, bias, geometry[1], geometry[0], geometry[2], groups)

        def run(x: Tensor) -> Tensor:
            x = x if sides is None else F.pad(x, sides)
            return product(x.contiguous(memory_format=LAST) if self.last else x)

        return run

    def plain(self, stage: Stage) -> tuple[Callable[..., Tensor], bool]:
        """How any other stage runs, and whether its result is memory of its own."""
        options, run, window = stage.options, stage.run, stage.window
        first = stage.inputs[0]
        if stage.kind == "relu":
            rectifier = options["rectifier"]
            if not self.writable(first):
                return run, True
            if rectifier.slope and rectifier.upper == float("inf"):
                return lambda x: F.leaky_relu_(x, rectifier.slope), True
            if rectifier.upper != float("inf") and not rectifier.slope:
                return lambda x: F.hardtanh_(x, 0.0, rectifier.upper), True
            return (run if rectifier.slope else F.relu_), True
        if stage.kind == "pointwise":
            name, a, b = options["native"] or ("", 0.0, 0.0)
            in_place = name in IN_PLACE and a == b == 0 and self.writable(first)
            return (IN_PLACE[name] if in_place else options["function"]), True
        if stage.kind == "max_pool":
            ceil = options["ceil_mode"]
            return lambda x: F.max_pool2d(x, window.kernel, window.stride, window.padding, window.dilation, ceil), True
        if stage.kind in ("add", "product") and len(stage.inputs) == 2:
            return self.combined(stage), True
        if stage.kind == "channels":
            return self.picked(stage)
        if stage.kind == "cat":
            return lambda *maps: torch.cat(maps, 1), True
        if stage.kind in ("avg_pool", "batch_norm", "scale", "pad") or options.get("mean"):
            return run, stage.kind != "pad"
        if "matrix" in options and len(stage.shape) > 1 and self.packs:
            return self.rows(stage), True
        if stage.kind == "identity" or "matrix" in options:
            return run, "matrix" in options
        if "statistics" in options:
            # Of maps with their channels last torch sums squares in one pass, which loses digits a mean away from zero.
            return lambda *maps: run(*(x.contiguous() for x in maps)), False
        return run, False

    def rows(self, stage: Stage) -> Callable[[Tensor], Tensor]:
        """A full layer of many rows, as a convolution of one pixel with packed filters: two to four times as fast."""
        weight, bias, count = stage.options["matrix"]().detach(), stage.options["bias"](), math.prod(stage.shape[:-1])
        filters = weight[:, :, None, None].contiguous(memory_format=LAST)
        product = _packed(filters, bias, ([0, 0], [1, 1], [1, 1], 1), [1, weight.shape[1], count, 1])

        def run(x: Tensor) -> Tensor:
            pixels = x.reshape(len(x), count, 1, x.shape[-1]).permute(0, 3, 1, 2)
            return product(pixels).permute(0, 2, 3, 1).reshape(len(x), *stage.shape)

        return run

    def combined(self, stage: Stage) -> Callable[[Tensor, Tensor], Tensor]:
        """A sum or product into the memory of an operand that is as large and read no more."""
        one, two = stage.inputs
        add = stage.kind == "add"
        if one is not two and self.writable(one) and one.shape == stage.shape:
            return (lambda a, b: a.add_(b)) if add else (lambda a, b: a.mul_(b))
        if one is not two and self.writable(two) and two.shape == stage.shape:
            return (lambda a, b: b.add_(a)) if add else (lambda a, b: b.mul_(a))
        return stage.run

    def picked(self, stage: Stage) -> tuple[Callable[[Tensor], Tensor], bool]:
        index = stage.options["index"]
        start, count = int(index[0]), len(index)
        if torch.equal(index, torch.arange(start, start + count)):
            return lambda x: x.narrow(1, start, count), False
        index = index.to(self.device)
        return lambda x: x[:, index], True

    def run(self, values: dict[Stage, Tensor]) -> dict[Stage, Tensor]:
        """From the values of `entering`, [B, *shape], which may be written over: the output's and the feature's."""
        asked: dict[Stage, Tensor] = {}
        for operation in self.operations:
            value = operation.run(*(values[source] for source in operation.sources))
            values[operation.result] = value
            if operation.result in self.wanted:
                asked[operation.result] = value
            for source in operation.last:
                del values[source]
        return asked


def _done_with_product(stage: Stage) -> tuple[str, str] | None:
    native = stage.options["native"] if stage.kind == "pointwise" else None
    return None if native is None else WITH_PRODUCT.get(native[0])


def _packed(
    weight: Tensor, bias: Tensor | None, geometry: tuple, shape: list[int], function: str = "none", algorithm: str = ""
) -> Callable[[Tensor], Tensor]:
    """A convolution with filters packed for oneDNN, and a function of each value done with it.

    geometry: padding, stride, dilation, groups. shape: of what it reads, of one image.
    """
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *geometry, shape)
    return lambda x: torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, function, [], algorithm)


def _packs_filters() -> bool:
    """Whether this torch packs a convolution's filters for oneDNN, as its own compiler does."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )
