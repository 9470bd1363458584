"""Occlusion sensitivity: how a box moved over the picture changes what a network answers.

Every box position of every image is one row of a batch, so positions of several images share a forward.
One scratch buffer holds the batch for the whole call: a row gets its image once, and from one position
to the next only the pixels under the old and the new box are written.
"""

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from zfcore.engine.sweep import Sweep, sweeps
from zfcore.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    LayerNotFound,
    ShapeError,
    UnitNotFound,
    UnsupportedOperation,
)
from zfcore.network import (
    Network,
    Stage,
    evaluating,
    exact_arithmetic,
    observing,
    read_network,
    resolve_layer,
)

__all__ = ["Occlusion", "occlusion_map"]

SCRATCH_BYTES = 256 * 2**20  # what batch_size=None lets one batch's pixels and feature maps take
SCORES = ("probability", "logit")
PRECISIONS = ("exact", "bf16")


@dataclass(frozen=True, eq=False, repr=False)
class Occlusion:
    """What `occlusion_map` measured: N images, a grid of Gy x Gx box positions.

    scores:           [N, Gy, Gx] float, the target's score with the box at each position.
    labels:           [N, Gy, Gx] int64, the most probable class there; None when a callable `score` reads
                      an output that is not (N, classes).
    activation:       [N, Gy, Gx] float, the sum over the feature map of `feature`; None without one.
    clean:            [N] float, the score with no box.
    boxes:            [Gy, Gx, 4] int64: y0, x0, y1, x1 in pixels, y1 and x1 one past the last; clipped to
                      the image.
    clean_labels:     [N] int64, the most probable class with no box; None where `labels` is.
    targets:          [N] int64, the class each score is of; None where `labels` is and none were given.
    clean_activation: [N] float, the activation with no box; None without a feature.
    units:            [N] int64, the unit of the feature's layer that was summed; None without a feature.
    image_size:       (H, W) in pixels.
    """

    scores: Tensor
    labels: Tensor | None
    activation: Tensor | None
    clean: Tensor
    boxes: Tensor
    clean_labels: Tensor | None
    targets: Tensor | None
    clean_activation: Tensor | None
    units: Tensor | None
    image_size: tuple[int, int]

    def heatmap(self) -> Tensor:
        """The mean drop of the score over the boxes that cover each pixel.

            heat[n, y, x] = mean over {b : b covers (y, x)} of clean[n] - scores[n, b]

        Returns: [N, H, W], the dtype of `scores`. Positive where hiding the pixel cost the target its
        score. Every box counts with weight one at each pixel it covers, a clipped box too, which equals
        `captum.attr.Occlusion`. A pixel that no box covers (stride greater than box) is NaN, and so is
        one under a box whose score is not finite.

        Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
        """
        return self._spread(self.clean[:, None, None] - self.scores)

    def activation_heatmap(self) -> Tensor:
        """The mean drop of the feature map's total activation, as `heatmap` has it for the score.

        Returns: [N, H, W]. Raises ArgumentError when the map was made without `feature`.
        """
        if self.activation is None:
            raise ArgumentError("activation_heatmap: no feature was measured; pass feature=(layer, unit)")
        return self._spread(self.clean_activation[:, None, None] - self.activation)

    def _spread(self, drop: Tensor) -> Tensor:
        """[N, Gy, Gx] one value a box -> [N, H, W] its mean over the boxes that cover a pixel."""
        height, width = self.image_size
        rows = _covers(self.boxes[:, 0, 0], self.boxes[:, 0, 2], height)  # [Gy, H]
        columns = _covers(self.boxes[0, :, 1], self.boxes[0, :, 3], width)  # [Gx, W]
        # A box is a product of two intervals, so the sum over boxes is two small matrix products. NaN and
        # infinity are kept out of them: zero times NaN would spread over the whole image.
        finite = drop.isfinite()
        total = rows.T @ torch.where(finite, drop, 0).double() @ columns  # [N, H, W]
        lost = rows.T @ (~finite).double() @ columns
        count = rows.sum(0)[:, None] * columns.sum(0)[None, :]
        mean = torch.where((count > 0) & (lost == 0), total / count.clamp(min=1), math.nan)
        return mean.to(drop.dtype)

    def __repr__(self) -> str:
        images, gy, gx = self.scores.shape
        height, width = self.image_size
        feature = "" if self.activation is None else ", activation"
        return (
            f"Occlusion({images} image{'' if images == 1 else 's'} of {height} x {width}, "
            f"grid {gy} x {gx}{feature}, {self.scores.dtype}, {self.scores.device})"
        )


def occlusion_map(
    model: nn.Module,
    images: Tensor,
    targets: "int | Tensor | list[int] | None" = None,
    *,
    box: "int | tuple[int, int]" = 32,
    stride: "int | tuple[int, int]" = 8,
    fill: "float | Tensor | list[float]" = 0.0,
    score: "str | Callable[[object], Tensor]" = "probability",
    feature: "tuple[str | nn.Module, int | Tensor | list[int] | None] | None" = None,
    precision: str = "exact",
    batch_size: int | None = None,
    strict: bool = False,
    progress: bool = False,
) -> Occlusion:
    """Score the images with a box of `fill` at every position of a grid.

        scores[n, i, j] = score of model(images[n] with box (i, j) painted over)[targets[n]]

    The grid has ceil((size - box) / stride) + 1 starts on an axis, at multiples of the stride; the last
    box is clipped at the image's edge. A box that is as long as the image or longer has one position and
    covers that axis whole.

    model:      an nn.Module, in eval mode for the call and restored after, whatever happens.
    images:     [N, C, H, W] or [C, H, W] (then N = 1), as the network takes them, that is normalised; any
                float dtype, layout and device, brought to the model's dtype and device.
    targets:    class indices [N], one int for all images, or None for each image's own top class.
    box:        the box's side in pixels, an int or (height, width). `stride`: the same, in pixels.
    fill:       what the box shows: a number, a colour [C], or a picture [C, H, W] or [N, C, H, W].
    score:      "probability", the softmax of the network's output (N, classes), which must be logits;
                "logit", the output itself; or a callable from the network's output (whatever it is) for
                some rows to their scores (rows,), for which `targets` play no part. Rows of several
                images and positions stand in one batch.
    feature:    (layer, unit): also sum that unit's map at every position, in the same pass. The layer is
                a dotted name ("features.10", or "relu@0" for the first call of a module called several
                times) or a module; the unit is an int, one int for each image, or None for each
                image's own strongest map on the clean image.
    precision:  "exact" (the parameters' own dtype, fp32 for most; autocast and TF32 are off for the call) or
                "bf16" (convolutions and matrix products read bf16 and accumulate in fp32).
    batch_size: positions in one forward; None chooses so that pixels and feature maps take about 256 MB.
    strict:     raise UnsupportedOperation for a network that zfcore.network cannot read, where otherwise
                plain batched forwards give the same answer.
    progress:   draw a bar that counts box positions done.

    Returns: `Occlusion`, on the model's device; floats in at least fp32.
    Raises: ArgumentError, ShapeError, DtypeError, DeviceError, UnitNotFound (a class or unit outside the
    network's), LayerNotFound, UnsupportedOperation.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2 and figure 7.
    """
    images = _as_batch(model, images)
    if not (callable(score) or score in SCORES):
        raise ArgumentError(f"score: {score!r}; expected one of {SCORES} or a callable")
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision: {precision!r}; expected one of {PRECISIONS}")
    if precision == "bf16" and images.dtype == torch.float64:
        raise ArgumentError("precision: 'bf16' with float64 parameters; expected float32 or narrower ones")
    if batch_size is not None:
        batch_size = _whole("batch_size", batch_size)
    grid = _Grid.over(images.shape[-2:], _pair("box", box), _pair("stride", stride))
    fill = _as_picture(fill, images)
    answers = _Answers(score, targets, images)
    totals = None if feature is None else _FeatureTotals(model, feature, images)

    count, device = len(images), images.device
    measured = _Measured(count, len(grid), device)
    with ExitStack() as stack:
        # Tensors made under the caller's inference mode would not count their versions, which shows what a
        # network writes to its input.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        bar = stack.enter_context(tqdm(total=count * len(grid), unit="box", desc="occlusion", disable=not progress))
        sweep = _sweep(model, images, grid, totals, batch_size, strict)
        left = torch.arange(count, device=device)
        if sweep is not None:
            with exact_arithmetic(device):
                left = _by_changes(sweep, images, fill, grid, answers, totals, measured, bar)
        if len(left) or not count:
            stack.enter_context(
                torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else exact_arithmetic(device)
            )
            if totals is not None:
                stack.enter_context(observing(totals.module, totals.see))
            _by_forwards(model, images, fill, grid, left, batch_size, answers, totals, measured, bar)

    scores, labels, activation = measured.occluded
    clean_scores, clean_labels, clean_activation = measured.clean
    shape = (count, grid.rows, grid.columns)
    return Occlusion(
        scores=scores.view(shape),
        labels=None if labels is None else labels.view(shape),
        activation=None if activation is None else activation.view(shape),
        clean=clean_scores,
        boxes=grid.boxes().to(device),
        clean_labels=clean_labels,
        targets=answers.targets,
        clean_activation=clean_activation,
        units=None if totals is None else totals.units,
        image_size=grid.size,
    )


@dataclass(frozen=True)
class _Grid:
    """The box positions of one image: per axis the first pixel and the one past the last."""

    size: tuple[int, int]
    y: tuple[tuple[int, int], ...]
    x: tuple[tuple[int, int], ...]

    @classmethod
    def over(cls, size: tuple[int, int], box: tuple[int, int], stride: tuple[int, int]) -> "_Grid":
        axes = []
        for length, side, step in zip(size, box, stride, strict=True):
            count = -(-max(length - side, 0) // step) + 1  # ceil((length - side) / step) + 1
            starts = [min(i * step, length) for i in range(count)]
            axes.append(tuple((start, min(start + side, length)) for start in starts))
        return cls(tuple(size), *axes)

    @property
    def rows(self) -> int:
        return len(self.y)

    @property
    def columns(self) -> int:
        return len(self.x)

    def __len__(self) -> int:
        return self.rows * self.columns

    def __getitem__(self, position: int) -> tuple[slice, slice]:
        row, column = divmod(position, self.columns)
        return slice(*self.y[row]), slice(*self.x[column])

    def boxes(self) -> Tensor:
        y = torch.tensor(self.y)[:, None].expand(-1, self.columns, -1)  # [Gy, Gx, 2]
        x = torch.tensor(self.x)[None].expand(self.rows, -1, -1)
        return torch.stack([y[..., 0], x[..., 0], y[..., 1], x[..., 1]], dim=-1)


class _Measured:
    """The scores, labels and activations so far: clean [N], and occluded [N * G]; a None among them is not measured."""

    def __init__(self, count: int, positions: int, device: torch.device):
        self.sizes = {"clean": count, "occluded": count * positions}
        self.device = device
        self.clean: list[Tensor | None] = [None, None, None]
        self.occluded: list[Tensor | None] = [None, None, None]

    def put(self, name: str, index: Tensor, parts: list[Tensor | None]) -> None:
        whole = getattr(self, name)
        for i, part in enumerate(parts):
            if part is None:
                continue
            if whole[i] is None:
                whole[i] = part.new_empty(self.sizes[name])
            whole[i][index] = part


def _sweep(
    model: nn.Module,
    images: Tensor,
    grid: _Grid,
    totals: "_FeatureTotals | None",
    batch_size: int | None,
    strict: bool,
) -> Sweep | None:
    """The engine for this network and grid, or None where plain forwards are to be run."""
    try:
        network = read_network(model, tuple(images.shape[1:]))
        feature = None if totals is None else totals.stage(network)
        if len(network.layer.shape) not in (1, 3):
            raise UnsupportedOperation(f"the network returns {network.layer.shape} an image")
    except (UnsupportedOperation, ShapeError) as error:
        if strict:
            raise
        warnings.warn(f"zfcore: plain forwards run this network: {error}", stacklevel=4)
        return None
    if not sweeps(images) or not len(grid):
        return None
    sweep = Sweep(network, feature, grid.y, grid.x, images.dtype, batch_size, images.device)
    return sweep if sweep.finite and sweep.macs < sweep.plain_macs else None


def _by_changes(
    sweep: Sweep,
    images: Tensor,
    fill: Tensor,
    grid: _Grid,
    answers: "_Answers",
    totals: "_FeatureTotals | None",
    measured: _Measured,
    bar: tqdm,
) -> Tensor:
    """Measures all positions with the engine. Returns the images [k] whose maps were not finite, to be done again:
    what an infinity differs by from another is no number.
    """
    finite = torch.ones(len(images), dtype=torch.bool, device=images.device)
    for begin, end in sweep.image_batches(len(images)):
        own = slice(begin, end)
        maps = sweep.up(images[own])
        for each in (images[own], *maps.values()):
            finite[own] &= each.flatten(1).isfinite().all(1)
        output = maps[sweep.output].reshape(end - begin, *sweep.output.shape)
        owners = torch.arange(begin, end, device=images.device)
        scores, labels = answers.read(output, owners, True)
        clean = None if totals is None else totals.sum(maps[sweep.feature], owners, True)
        measured.put("clean", owners, [scores, labels, clean])
        for index, output, feature, image in sweep.run(images[own], fill[own], maps):
            owners = begin + image
            scores, labels = answers.read(output, owners, False)
            total = None
            if totals is not None:
                total = clean[image] + totals.sum(feature, owners, False)
            finite[owners[~output.flatten(1).isfinite().all(1)]] = False
            if total is not None:
                finite[owners[~total.isfinite()]] = False
            measured.put("occluded", begin * len(grid) + index, [scores, labels, total])
            bar.update(len(index))
    bar.update(-int((~finite).sum()) * len(grid))
    return (~finite).nonzero().flatten()


def _by_forwards(
    model: nn.Module,
    images: Tensor,
    fill: Tensor,
    grid: _Grid,
    chosen: Tensor,
    batch_size: int | None,
    answers: "_Answers",
    totals: "_FeatureTotals | None",
    measured: _Measured,
    bar: tqdm,
) -> None:
    """Measures the chosen images [k] by a forward for each position."""

    def look(rows: Tensor, owners: Tensor, clean: bool) -> list[Tensor | None]:
        """One forward: the rows' scores, labels and activation; owners [rows] are their image indices."""
        if totals is not None:
            totals.expect(owners, clean)
        output = model(rows)
        scores, labels = answers.read(output, owners, clean)
        return [scores, labels, None if totals is None else totals.take()]

    device = images.device
    images, fill = images[chosen], fill[chosen]  # copies, since a network may write to its input
    with _LargestResult() as largest:
        measured.put("clean", chosen[:1], look(images[:1].clone(), chosen[:1], True))
    if batch_size is None:
        batch_size = largest.batch_size(images)
    for start in range(1, len(images), batch_size):
        some = slice(start, start + batch_size)
        measured.put("clean", chosen[some], look(images[some].clone(), chosen[some], True))
    positions = torch.arange(len(grid), device=device)
    every = (chosen[:, None] * len(grid) + positions).reshape(-1)
    if not len(every):
        measured.put("occluded", every, measured.clean)
    done = 0
    for rows in _occluded_batches(images, fill, grid, batch_size):
        index = every[done : done + len(rows)]
        measured.put("occluded", index, look(rows, index // len(grid), False))
        done += len(rows)
        if not bar.disable and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # a queued forward is not a done one
        bar.update(len(rows))


def _occluded_batches(
    images: Tensor, fill: Tensor, grid: _Grid, batch_size: int
) -> Iterator[Tensor]:
    """Every image with every box, in order: rows [B, C, H, W] of one reused buffer.

    fill: [N, C, H, W] (expanded, so it costs nothing where it is one colour).
    """
    total = len(images) * len(grid)
    if not total:
        return
    scratch = torch.empty_like(
        images[:1].expand(min(batch_size, total), -1, -1, -1), memory_format=_format(images)
    )
    holds = [(-1, 0)] * len(scratch)  # the image and position that each row of the buffer shows
    for start in range(0, total, batch_size):
        used = min(batch_size, total - start)
        for row in range(used):
            image, position = divmod(start + row, len(grid))
            shown, covered = holds[row]
            if shown == image:
                y, x = grid[covered]
                scratch[row, :, y, x] = images[image, :, y, x]
            else:
                scratch[row] = images[image]
            y, x = grid[position]
            scratch[row, :, y, x] = fill[image, :, y, x]
            holds[row] = (image, position)
        version = scratch._version
        yield scratch[:used]
        if scratch._version != version:  # the network wrote to its input, as an in-place first layer does
            holds = [(-1, 0)] * len(scratch)


class _Answers:
    """Reads scores and labels from what the network returns.

    targets: [N] int64; where none were given, filled with each image's own top class by the clean pass.
    """

    def __init__(self, score: str | Callable[[object], Tensor], targets: object, images: Tensor):
        self.score = score
        self.chosen = targets is None
        self.targets = None if targets is None else _indices("targets", targets, images)
        self.count, self.device = len(images), images.device

    def read(self, output: object, owners: Tensor, clean: bool) -> tuple[Tensor, Tensor | None]:
        rows = len(owners)
        table = isinstance(output, Tensor) and output.dim() == 2 and len(output) == rows
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
                f"returned {_described(output)} for {rows} images; pass a callable that turns it into "
                f"({rows},) scores"
            )
        logits = output.to(torch.promote_types(output.dtype, torch.float32))
        if clean:
            self._check(logits, output.dtype)
        labels = logits.argmax(1)
        self._choose(labels, owners, clean)
        values = logits.softmax(1) if self.score == "probability" else logits
        return values.gather(1, self.targets[owners][:, None])[:, 0], labels

    def _choose(self, labels: Tensor, owners: Tensor, clean: bool) -> None:
        if self.chosen and clean:
            if self.targets is None:
                self.targets = torch.zeros(self.count, dtype=torch.int64, device=self.device)
            self.targets[owners] = labels

    def _check(self, logits: Tensor, dtype: torch.dtype) -> None:
        classes = logits.shape[1]
        if self.score == "probability" and classes == 1:
            raise ArgumentError(
                "score: 'probability' of a network with one output, whose softmax is always 1; expected "
                "'logit', or a callable such as lambda out: out[:, 0].sigmoid()"
            )
        if self.score == "probability" and len(logits) and _is_distribution(logits, dtype):
            raise ArgumentError(
                "score: 'probability' takes the softmax of logits, and the network's outputs are "
                "probabilities already (none negative, their sum 1); expected score='logit', which takes "
                "them as they are"
            )
        if not self.chosen and self.count and int(self.targets.max()) >= classes:
            raise UnitNotFound(f"targets: class {int(self.targets.max())}; expected 0 to {classes - 1}")

    def _called(self, output: object, rows: int) -> Tensor:
        scores = self.score(output)
        if not isinstance(scores, Tensor) or scores.shape != (rows,):
            raise ShapeError(
                f"score: the callable returned {_described(scores)} for {rows} images; "
                f"expected a tensor ({rows},)"
            )
        # A copy: a view would keep the whole output alive, or show the next batch's.
        return scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True)


class _FeatureTotals:
    """Sums one unit's map of a layer in every forward, as `see` is shown the layer's outputs.

    units: [N] int64; where the unit is None, filled with each image's strongest map by the clean pass.
    """

    def __init__(self, model: nn.Module, feature: object, images: Tensor):
        if not (isinstance(feature, (tuple, list)) and len(feature) == 2):
            raise ArgumentError(f"feature: {feature!r}; expected a pair (layer, unit)")
        layer, unit = feature
        name, self.call = resolve_layer(model, layer)
        self.module = model.get_submodule(name)
        self.layer = repr(name if self.call is None else f"{name}@{self.call}")
        self.chosen = unit is None
        if unit is None:
            self.units = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        else:
            self.units = _indices("feature's unit", unit, images)

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
        if not (isinstance(output, Tensor) and output.dim() >= 2 and len(output) == rows):
            raise ShapeError(
                f"feature: layer {self.layer} returned {_described(output)} for {rows} images; "
                "expected a tensor (images, units, ...)"
            )
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


class _LargestResult(TorchFunctionMode):
    """Notes the largest tensor that any operation returns, while entered, in this thread only."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.nbytes)
        return result

    def batch_size(self, images: Tensor) -> int:
        """How many rows fit the scratch: a row is its pixels and an operation's input and output."""
        return max(1, SCRATCH_BYTES // (images[:1].nbytes + 2 * self.bytes or 1))


def _covers(starts: Tensor, ends: Tensor, length: int) -> Tensor:
    """[G, length] float64: one where the interval of an axis holds the pixel."""
    pixel = torch.arange(length, device=starts.device)
    return ((starts[:, None] <= pixel) & (pixel < ends[:, None])).double()


def _is_distribution(outputs: Tensor, dtype: torch.dtype) -> bool:
    tolerance = min(64 * torch.finfo(dtype).eps, 1e-2)
    return bool((outputs >= 0).all() & ((outputs.sum(1) - 1).abs() <= tolerance).all())


def _format(images: Tensor) -> torch.memory_format:
    dense = images.is_contiguous()
    last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not dense else torch.contiguous_format


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)[:8]}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _as_batch(model: nn.Module, images: Tensor) -> Tensor:
    """The images as [N, C, H, W], on the model's device and in its dtype."""
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model: a {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(images, Tensor):
        raise DtypeError(f"images: a {type(images).__name__}; expected a tensor (N, C, H, W) or (C, H, W)")
    if not images.is_floating_point():
        raise DtypeError(f"images: {images.dtype}; expected a floating point dtype")
    if images.dim() not in (3, 4) or 0 in images.shape[-3:]:
        raise ShapeError(
            f"images: shape {tuple(images.shape)}; expected (N, C, H, W) or (C, H, W), C, H, W >= 1"
        )
    if images.is_meta:
        raise DeviceError("images: on the meta device, which holds no pixels; expected a device that does")
    # Where the model computes: most have parameters, some only buffers, a few neither.
    own = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), images)
    images = images.to(own.device, own.dtype)
    images = images.detach()
    return images if images.dim() == 4 else images[None]


def _as_picture(fill: object, images: Tensor) -> Tensor:
    """`fill` as a picture for each image: [N, C, H, W], a view without copies of its own."""
    try:
        value = torch.as_tensor(fill)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtypeError(f"fill: {fill!r}; expected a number or a tensor") from error
    if value.dtype == torch.bool or value.is_complex():
        raise DtypeError(f"fill: {value.dtype}; expected numbers")
    channels = images.shape[1]
    value = value.detach().to(device=images.device, dtype=images.dtype)
    if value.dim() == 1 and len(value) == channels:
        value = value[:, None, None]
    elif value.dim() and value.shape not in (images.shape, images.shape[1:]):
        raise ShapeError(
            f"fill: shape {tuple(value.shape)}; expected a number, ({channels},), {tuple(images.shape[1:])} "
            f"or {tuple(images.shape)}"
        )
    return value.expand(images.shape)


def _indices(name: str, value: object, images: Tensor) -> Tensor:
    """Class or unit indices as int64 [N] on the images' device; one int is every image's."""
    count = len(images)
    try:
        index = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtypeError(f"{name}: {value!r}; expected an int or {count} ints") from error
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


def _whole(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise DtypeError(f"{name}: {value!r}; expected a whole number of at least 1") from None
    if number < 1:
        raise ArgumentError(f"{name}: {number}; expected a whole number of at least 1")
    return number


def _pair(name: str, value: object) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ArgumentError(f"{name}: {value!r}; expected a whole number or a pair (height, width)")
        return _whole(name, value[0]), _whole(name, value[1])
    side = _whole(name, value)
    return side, side
