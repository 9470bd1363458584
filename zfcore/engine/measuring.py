"""What an occlusion map measures: scores and labels of the network's output, and the total of a feature map."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from zfcore.call import observable, writable
from zfcore.engine.rules import as_nodes
from zfcore.errors import (
    ArgumentError,
    DtypeError,
    LayerNotFound,
    ShapeError,
    UnitNotFound,
    UnsupportedOperation,
)
from zfcore.kinds import plain, unusual, without_values
from zfcore.network import Network, Stage, fixed_batch, kept, resolve_layer

# By the names of autograd's nodes: operations whose results lie in 0..1; those that they may be spelled out with; and
# those that change no value.
_WITHIN_ONE = frozenset(("Sigmoid", "Hardsigmoid", "Softmax"))
_MAYBE_WITHIN_ONE = frozenset(
    ("Clamp", "Div", "Exp", "Hardtanh", "Maximum", "Minimum", "Mul", "Pow", "Reciprocal", "Sqrt")
)
_MOVING = frozenset(
    ("Alias", "AsStrided", "Clone", "Expand", "Permute", "Reshape", "ReshapeAlias", "Select", "Slice", "Squeeze", "T",
     "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View")
)  # fmt: skip
MANY = 16  # values that all lie in 0..1, and would by chance once in 2^16 if logits are as often negative


def last_operation(model: nn.Module, image: Tensor) -> torch.autograd.graph.Node | None:
    """The node of the last operation of a network that changes values, if autograd sees it. image: [1, C, H, W]."""
    model = writable(model)
    count = fixed_batch(model) or 1
    with kept(model) as held, held.watching(), torch.enable_grad(), as_nodes(True, []):
        output = model(image.expand(count, -1, -1, -1).clone().requires_grad_())
    node = output.grad_fn
    while node is not None and node.name().rstrip("0123456789").removesuffix("Backward") in _MOVING:
        node = node.next_functions[0][0]
    return node


Parts = list  # scores, labels and activation of some rows, each a tensor [rows] or None where it is not measured


class Measured:
    """What is measured so far: of the clean images [N], and of the occluded ones [N * Gy * Gx]; each like Parts."""

    def __init__(self, count: int, positions: int):
        self.sizes = {"clean": count, "occluded": count * positions}
        self.clean: Parts = [None, None, None]
        self.occluded: Parts = [None, None, None]

    def put(self, name: str, index: Tensor, parts: Parts) -> None:
        whole = getattr(self, name)
        for i, part in enumerate(parts):
            if part is None:
                continue
            if whole[i] is None:
                whole[i] = part.new_empty(self.sizes[name])
            whole[i][index] = part


class Answers:
    """Reads scores and labels from what the network returns.

    targets: [N] int64; where none were given, filled with each image's own top class by the clean pass.
    """

    def __init__(
        self,
        score: str | Callable[[object], Tensor],
        targets: object,
        images: Tensor,
        last: Callable[[], torch.autograd.graph.Node | None] = lambda: None,
    ):
        """last: finds the node of the network's last operation, as `last_operation` does."""
        self.score, self.last = score, last
        self.chosen = targets is None
        self.targets = None if targets is None else indices("targets", targets, images)
        self.count, self.device = len(images), images.device
        self.checked = False  # whether clean outputs that say what they are were looked at
        self.within = 0  # values of those so far that lie in 0..1

    def read(self, output: object, owners: Tensor, clean: bool) -> tuple[Tensor, Tensor | None]:
        rows = len(owners)
        what = unusual(output) if isinstance(output, Tensor) else ""
        output = plain(output) if isinstance(output, Tensor) and not what else output
        table = isinstance(output, Tensor) and not what and output.dim() == 2 and len(output) == rows
        if callable(self.score):
            scores = self._called(output, rows)
            if not (table and output.is_floating_point()):
                return scores, None
            labels = output.argmax(1)
            self._choose(labels, owners, clean)
            return scores, labels
        if not table or not output.is_floating_point():
            raise ArgumentError(
                f"score: {self.score!r} reads a floating point output (images, classes); the network "
                f"returned {what or described(output)} for {rows} images; pass a callable that turns it into "
                f"({rows},) scores"
            )
        logits = output.to(torch.promote_types(output.dtype, torch.float32))
        if clean and not self.checked:  # no more than it takes, since each time waits for a GPU
            self.checked = self._check(logits, output.dtype)
        labels = logits.argmax(1)
        self._choose(labels, owners, clean)
        values = logits.softmax(1) if self.score == "probability" else logits
        return values.gather(1, self.targets[owners][:, None])[:, 0], labels

    def _choose(self, labels: Tensor, owners: Tensor, clean: bool) -> None:
        if self.chosen and clean:
            if self.targets is None:
                self.targets = torch.zeros(self.count, dtype=torch.int64, device=self.device)
            self.targets[owners] = labels

    def _check(self, logits: Tensor, dtype: torch.dtype) -> bool:
        """Refuses outputs that are no logits; whether they say that they are some."""
        classes = logits.shape[1]
        if self.score == "probability" and classes == 1:
            raise ArgumentError(
                "score: 'probability' of a network with one output, whose softmax is always 1; expected "
                "'logit', or a callable such as lambda out: out[:, 0].sigmoid()"
            )
        if self.score == "probability" and len(logits) and is_distribution(logits, dtype):
            raise ArgumentError(
                "score: 'probability' takes the softmax of logits, and the network's outputs are "
                "probabilities already (none negative, their sum 1); expected score='logit', which takes "
                "them as they are"
            )
        if not self.chosen and self.count and int(self.targets.max()) >= classes:
            raise UnitNotFound(f"targets: class {int(self.targets.max())}; expected 0 to {classes - 1}")
        if not len(logits) or not logits.isfinite().all():
            return False
        if self.score != "probability" or not ((logits >= 0) & (logits <= 1)).all():
            return True
        likely = self._last_is_within()
        self.within += logits.numel()
        if likely or (likely is None and self.within >= MANY):
            raise ArgumentError(
                "score: 'probability' takes the softmax of logits, and the network's outputs all lie in 0..1, as a "
                "sigmoid's do; expected score='logit', which takes them as they are, or a callable that turns "
                "outputs into scores"
            )
        return likely is not None

    def _last_is_within(self) -> bool | None:
        """Whether the network's last operation cannot leave 0..1; None where that is not known.

        Values alone do not say so: the logits of a few classes may all lie in there. A sigmoid cannot leave 0..1; what
        one may be spelled out with might not either, and is believed to be one where values are many; anything else, a
        linear layer above all, can.
        """
        node = self.last()
        if node is None or isinstance(node, torch.autograd.function.BackwardCFunction):
            return None
        kind = node.name().rstrip("0123456789").removesuffix("Backward")
        return None if kind in _MAYBE_WITHIN_ONE else kind in _WITHIN_ONE

    def _called(self, output: object, rows: int) -> Tensor:
        scores = self.score(output)
        what = unusual(scores) if isinstance(scores, Tensor) else ""
        if what or not isinstance(scores, Tensor) or scores.shape != (rows,):
            raise (DtypeError if what else ShapeError)(
                f"score: the callable returned {what or described(scores)} for {rows} images; "
                f"expected a tensor ({rows},)"
            )
        scores = plain(scores)
        # A copy: a view would keep the whole output alive, or show the next batch's.
        return scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True)


class FeatureTotals:
    """Sums one unit's map of a layer in every forward, as `see` is shown the layer's outputs.

    units: [N] int64; where the unit is None, filled with each image's strongest map by the clean pass.
    """

    def __init__(self, model: nn.Module, feature: object, images: Tensor):
        if not (isinstance(feature, (tuple, list)) and len(feature) == 2):
            raise ArgumentError(f"feature: {feature!r}; expected a pair (layer, unit)")
        layer, unit = feature
        name, self.call = resolve_layer(model, layer)
        self.module = observable(model, name)
        self.layer = repr(name if self.call is None else f"{name}@{self.call}")
        self.chosen = unit is None
        if unit is None:
            self.units = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        else:
            self.units = indices("feature's unit", unit, images)

    def check(self, count: int) -> None:
        """That the units are among the layer's `count`."""
        if not self.chosen and len(self.units) and (highest := int(self.units.max())) >= count:
            raise UnitNotFound(f"feature: unit {highest} of layer {self.layer}; expected 0 to {count - 1}")

    def stage(self, network: Network) -> Stage:
        """The layer among the stages of a network that was read."""
        calls = network.calls.get(self.module, [])
        if self.call is not None and self.call >= len(calls):
            raise UnsupportedOperation(f"layer {self.layer} is not seen to run")
        found = calls[-1 if self.call is None else self.call] if calls else None
        if found not in network.stages:
            raise UnsupportedOperation(f"layer {self.layer} does not lead to the network's output")
        self.check(found.shape[0])
        return found

    def expect(self, owners: Tensor, clean: bool) -> None:
        self.owners, self.clean, self.calls, self.total = owners, clean, 0, None

    def take(self) -> Tensor:
        if self.total is None:
            raise LayerNotFound(
                f"feature: layer {self.layer} did not run in the forward; expected one that does"
            )
        return self.total

    def see(self, output: object) -> None:
        call, self.calls = self.calls, self.calls + 1
        if self.call is not None and call != self.call:
            return
        rows = len(self.owners)
        what = unusual(output) if isinstance(output, Tensor) else ""
        if what or not (isinstance(output, Tensor) and output.dim() >= 2 and len(output) == rows):
            raise (DtypeError if what else ShapeError)(
                f"feature: layer {self.layer} returned {what or described(output)} for {rows} images; "
                "expected a tensor (images, units, ...)"
            )
        output = plain(output)
        if self.clean and rows:
            self.check(output.shape[1])
        # Summed here and now: what follows in the forward may write over the map in place.
        self.total = self.sum(output, self.owners, self.clean)

    def sum(self, maps: Tensor, owners: Tensor, clean: bool) -> Tensor:
        """Each row's total of its image's unit [B]; maps: the layer's [B, units, ...], or what they differ by."""
        wide = torch.promote_types(maps.dtype, torch.float32)
        if self.chosen and clean:
            every = maps.reshape(*maps.shape[:2], math.prod(maps.shape[2:])).sum(2, dtype=wide)
            self.units[owners] = every.argmax(1)
        own = maps[torch.arange(len(maps), device=maps.device), self.units[owners]]  # [B, ...]
        return own.reshape(len(own), math.prod(own.shape[1:])).sum(1, dtype=wide)


def is_distribution(outputs: Tensor, dtype: torch.dtype) -> bool:
    tolerance = min(64 * torch.finfo(dtype).eps, 1e-2)
    return bool((outputs >= 0).all() & ((outputs.sum(1) - 1).abs() <= tolerance).all())


def described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)[:8]}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def indices(name: str, value: object, images: Tensor) -> Tensor:
    """Class or unit indices as int64 [N] on the images' device; one int is every image's."""
    count = len(images)
    try:
        index = value if isinstance(value, Tensor) else torch.as_tensor(value, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtypeError(f"{name}: {value!r}; expected an int or {count} ints") from error
    if what := without_values(index):
        raise DtypeError(f"{name}: {what}; expected an int or {count} ints")
    index = plain(index)
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise DtypeError(f"{name}: {value!r}; expected an int or {count} ints")
    if index.dim() > 1 or (index.dim() == 1 and len(index) != count):
        raise ShapeError(
            f"{name}: shape {tuple(index.shape)}; expected one int or ({count},), one for each image"
        )
    index = index.detach().to(device=images.device, dtype=torch.int64).expand(count).clone()
    if count and int(index.min()) < 0:
        raise UnitNotFound(f"{name}: {int(index.min())}; expected 0 or more")
    return index
