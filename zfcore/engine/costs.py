"""What the operations of occlusion cost, counted: by which its engine chooses how a network is run.

Three ways are compared, a position in the mean: the model's own forward; changes, on the patches that a box reaches;
and values, whole maps in the engine's own batches. The count is of multiply-adds, of values that are read or written,
and of calls, each with the time that one takes by its kind.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

from zfcore.network import Stage
from zfcore.ops.conv_delta import is_depthwise

LANES = 16  # outputs that conv_delta works out at once
RECTIFIED = 0.6  # of the changes behind a rectifier, how many are not zero
VALUE_BYTES = {"cpu": 20 * 2**20, "cuda": 128 * 2**20}  # of the largest map of a batch of values
MOST_VALUES = {"cpu": 256, "cuda": 1024}  # and how many are in it at the most

# Nanoseconds on one core (AMD EPYC, AVX-512, torch 2.13), fitted to the operations of twelve networks, each timed on its
# own with box 32 and stride 32: medians of their CPU time. Only ratios matter. They were not measured with AVX2 or on a
# GPU, which are counted by the same table.
# Of products: of a multiply-add, of a value read, and of one written. "values": torch's convolutions as the engine
# calls them, with packed filters and channels last; "model": as a model calls them; "changes": conv_delta, which meets only
# what is not zero, its rectifier included.
PRODUCTS = {
    "values": {
        "dense": (0.0076, 0.05, 0.05),
        "pointwise": (0.0085, 0.12, 0.12),
        "grouped": (0.026, 0.05, 0.05),
        "narrow": (0.030, 0.05, 0.05),
        "depthwise": (0.018, 0.13, 0.13),
    },
    "model": {
        "dense": (0.0095, 0.10, 0.10),
        "pointwise": (0.0190, 0.15, 0.15),
        "grouped": (0.025, 0.10, 0.10),
        "narrow": (0.025, 0.10, 0.10),
        "depthwise": (0.025, 0.20, 0.20),
    },
    "changes": {
        "dense": (0.0066, 0.38, 0.88),
        "pointwise": (0.0085, 0.15, 0.30),
        "grouped": (0.012, 0.60, 0.15),
        "narrow": (0.25, 0.00, 0.00),  # groups of fewer outputs than are worked out at once
        "depthwise": (0.033, 0.14, 0.13),
    },
}
WEIGHT = 0.15  # of a filter's value, read anew by each batch
SLICED = 10.0  # of one that is packed anew by each batch of changes, for its size
# Of a value of the result, or of the operands where they are larger.
VALUES = {
    "move": 0.09,  # an addition, a rectifier, a copy
    "normalise": 0.22,
    "cat": 0.20,
    "max_pool": 0.40,
    "avg_pool": 0.26,
    "pointwise": 0.25,
    "channels": 0.40,
    "lrn": 2.0,
    "map": 0.40,
    "relaid": 3.0,  # between channels last and rows, there and back
}
CHANGED = {  # the same, of a change: with its clean map beside it
    "move": 0.20,
    "add": 0.45,
    "cat": 0.30,
    "relu": 0.29,
    "max_pool": 0.80,
    "avg_pool": 1.40,
    "lrn": 2.5,
    "cut": 0.20,  # moved to another rectangle
    "pointwise": 0.40,
    "function": 3.50,  # one that no kernel knows: the clean map cut, and the function of two patches
    "product": 2.80,
    "channels": 0.80,
    "any": 1.2,  # on whole maps: they are gathered, added up and subtracted again
}
# Of one operation, whatever is in it: torch's, and those that call oneDNN or the kernels of changes.
CALL, CALL_PRODUCT, CALL_CHANGE = 8e3, 45e3, 30e3


NAMES = {name: name for name in ("cat", "max_pool", "avg_pool", "pointwise", "channels", "lrn")}
NAMES |= {name: "move" for name in ("relu", "add", "scale", "product", "pad")} | {"batch_norm": "normalise"}


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
        narrow = "narrow" if shape[0] // groups < LANES else "grouped"
        return "depthwise" if is_depthwise(tuple(shape), groups) else narrow
    return "pointwise" if math.prod(shape[2:]) == 1 else "dense"


def product(runner: str, kind: str, macs: float, read: float, written: float) -> float:
    return sum(map(operator.mul, PRODUCTS[runner][kind], (macs, read, written)))


def whole(stage: Stage, runner: str) -> Cost:
    """Of a stage on whole maps; runner: "values" or "model"."""
    options, size, read = stage.options, count(stage), max([0, *map(count, stage.inputs)])
    if stage.kind == "conv":
        shape = options["weight"]().shape
        kind, macs = product_kind(shape, options["groups"]), size * math.prod(shape[1:])
        return Cost(product(runner, kind, macs, read, size), CALL_PRODUCT + math.prod(shape) * WEIGHT)
    if "matrix" in options:
        outputs, features = options["matrix"]().shape
        weights = outputs * features
        return Cost(product(runner, "pointwise", size * features, read, size), CALL_PRODUCT + weights * WEIGHT)
    if stage.kind == "identity":
        return Cost()
    name = "avg_pool" if options.get("mean") else "move" if options.get("flat") else NAMES.get(stage.kind, "map")
    each = VALUES[name] + (VALUES["relaid"] if "statistics" in options and runner == "values" else 0.0)
    return Cost(max(read, size) * each, CALL)


def folded(stage: Stage) -> Cost:
    """The same in the engine of values, of what is done with the convolution that it follows, or on its result."""
    name = {"pointwise": "pointwise", "relu": "move"}.get(stage.kind)
    return Cost(count(stage) * VALUES[name]) if name else Cost()


def formed(stage: Stage) -> Cost:
    """A value made of the clean map and a change."""
    return Cost(count(stage) * VALUES["cat"], CALL)


def product_of_changes(
    pairs: float, shape: Sequence[int], groups: int, density: float, read: int, written: int, sliced: bool
) -> Cost:
    """Of a convolution of changes: pairs of a pixel and a tap, the filters' shape, and the sizes of the patches.

    sliced: whether the filters are packed anew by each batch.
    """
    kind, weights = product_kind(shape, groups), math.prod(shape)
    macs = pairs * shape[0] * shape[1] * (1.0 if kind == "depthwise" else density)
    return Cost(product("changes", kind, macs, read, written), CALL_CHANGE + weights * (SLICED if sliced else WEIGHT))


def size_of_batch(largest: int, itemsize: int, device: str) -> int:
    """How many positions of maps stay in the cache, the largest of so many values."""
    room, most = VALUE_BYTES.get(device, VALUE_BYTES["cpu"]), MOST_VALUES.get(device, MOST_VALUES["cpu"])
    return max(1, min(most, room // max(largest * itemsize, 1)))
