"""What the operations of occlusion cost, counted: by which its engine chooses how a network is run.

Three ways are compared, a position in the mean: the model's own forward; changes, on the patches that a box reaches; and
values, whole maps in the engine's own batches. The count is of multiply-adds, of values that are read or written, and of
calls, each with the time that one takes by its kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from zfcore.network import Stage
from zfcore.ops.conv_delta import is_depthwise

RECTIFIED = 0.6  # of the changes behind a rectifier, how many are not zero
VALUE_BYTES = {"cpu": 20 * 2**20, "cuda": 128 * 2**20}  # of the largest map of a batch of values
MOST_VALUES = {"cpu": 256, "cuda": 1024}  # and how many are in it at the most

# Nanoseconds on one core (AMD EPYC, AVX-512, 4 GHz, torch 2.13), medians over the layers of ten networks, each operation
# on its own; on two cores, and with AVX2, all grow or shrink alike but for some tens of percent. Only ratios matter.
# Of a multiply-add: of torch's convolutions as the engine of values calls them (packed filters, channels last); of those
# that a model calls (filters as they lie, by rows); and of conv_delta, which meets only what is not zero.
PRODUCTS = {
    "values": {"dense": 0.0080, "pointwise": 0.0090, "grouped": 0.020, "depthwise": 0.025, "full": 0.02},
    "model": {"dense": 0.0090, "pointwise": 0.0180, "grouped": 0.024, "depthwise": 0.035, "full": 0.02},
    "changes": {"dense": 0.0120, "pointwise": 0.0120, "grouped": 0.030, "depthwise": 0.060, "full": 0.012},
}
WEIGHT = 0.15  # of a filter's value, read anew by each batch
# Of a value of the result, or of the operand where that is larger.
VALUES = {
    "move": 0.07,  # an addition, a rectifier, a copy
    "normalise": 0.19,
    "cat": 0.12,
    "max_pool": 0.30,
    "avg_pool": 0.12,
    "pointwise": 0.35,
    "channels": 0.45,
    "lrn": 1.0,
    "map": 0.30,
}
CHANGED = {  # the same, of a change: with its clean map beside it
    "relu": 0.15,
    "max_pool": 0.60,
    "avg_pool": 0.60,
    "lrn": 2.5,
    "read": 0.05,  # by a product
    "move": 0.12,
    "cut": 0.45,  # moved to another rectangle
    "pointwise": 0.40,
    "function": 1.80,  # one that no kernel knows: the clean map cut, and the function of two patches
    "product": 1.20,
    "channels": 0.45,
    "any": 1.2,  # on whole maps: two of them gathered, added up and subtracted again
}
CALL = 6000.0  # of one torch operation, whatever is in it


class Cost(NamedTuple):
    """Nanoseconds: a position, and a batch."""

    position: float = 0.0
    batch: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.position + other.position, self.batch + other.batch)

    def of(self, size: int) -> float:
        """A position, in batches of `size`."""
        return self.position + self.batch / size


def count(stage: Stage) -> int:
    return math.prod(stage.shape)


def product_kind(shape: Sequence[int], groups: int) -> str:
    """shape: of the weight, [K, C / groups, kh, kw]."""
    if groups > 1:
        return "depthwise" if is_depthwise(tuple(shape), groups) else "grouped"
    return "pointwise" if math.prod(shape[2:]) == 1 else "dense"


def whole(stage: Stage, runner: str) -> Cost:
    """Of a stage on whole maps; runner: "values" or "model"."""
    rates, size = PRODUCTS[runner], count(stage)
    largest = max([size, *map(count, stage.inputs)])
    options = stage.options
    if stage.kind == "conv":
        shape, groups = options["weight"]().shape, options["groups"]
        macs, kind = size * math.prod(shape[1:]), product_kind(shape, groups)
        return Cost(macs * rates[kind] + (size + count(stage.inputs[0])) * 0.02, CALL + math.prod(shape) * WEIGHT)
    if "matrix" in options:
        weights = size * count(stage.inputs[0])
        return Cost(weights * rates["full"], CALL + weights * WEIGHT)
    if stage.kind == "identity":
        return Cost()
    kind = {"relu": "move", "batch_norm": "normalise", "add": "move", "scale": "move", "product": "move", "pad": "move"}
    name = "avg_pool" if options.get("mean") else "move" if options.get("flat") else kind.get(stage.kind, stage.kind)
    return Cost(largest * VALUES[name], CALL)


def folded(stage: Stage) -> Cost:
    """The same in the engine of values, of what is done with the product that it follows."""
    return Cost(count(stage) * VALUES["pointwise"]) if stage.kind == "pointwise" else Cost()


def formed(stage: Stage) -> Cost:
    """A value made of the clean map and a change."""
    return Cost(count(stage) * 0.12, CALL)


def product_of_changes(
    pairs: float, shape: Sequence[int], groups: int, density: float, read: int, written: int, rectified: bool
) -> Cost:
    """Of a convolution of changes: pairs of a pixel and a tap, the filters' shape, and the sizes of the patches."""
    macs = pairs * shape[0] * shape[1]
    moved = read * CHANGED["read"] + written * (CHANGED["relu"] if rectified else CHANGED["read"])
    kind = product_kind(shape, groups)
    share = 1.0 if kind == "depthwise" else density
    return Cost(macs * share * PRODUCTS["changes"][kind] + moved, CALL + math.prod(shape) * WEIGHT)


def size_of_batch(largest: int, itemsize: int, device: str) -> int:
    """How many positions of maps stay in the cache, the largest of so many values."""
    room, most = VALUE_BYTES.get(device, VALUE_BYTES["cpu"]), MOST_VALUES.get(device, MOST_VALUES["cpu"])
    return max(1, min(most, room // max(largest * itemsize, 1)))
