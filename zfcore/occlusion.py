"""Occlusion sensitivity: how a box moved over the picture changes what a network answers.

The arguments are checked here; `zfcore.engine` does the work, on what a box changes of each map, or by plain forwards
for networks that cannot be read.

Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2 and figure 7.
"""

import math
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zfcore.call import (
    check_surroundings,
    checked_images,
    contained,
    default_device,
    eagerly,
    layer_inside,
    placement,
    running,
    unwrapped,
)
from zfcore.engine.adaptive import Everything, WhereItMoves
from zfcore.engine.forwards import Forwards
from zfcore.engine.grid import Grid
from zfcore.engine.measuring import Answers, FeatureTotals, Measured, Parts, last_operation
from zfcore.engine.sweep import Sweep, sweeps
from zfcore.errors import ArgumentError, DtypeError, ShapeError, UnsupportedOperation
from zfcore.kinds import plain, without_values
from zfcore.network import arithmetic, evaluating, exact_arithmetic, kept, observing, read_network
from zfcore.ops.conv_delta import PRECISIONS, pays
from zfcore.progress import Bar, bar_of

__all__ = ["Occlusion", "occlusion_map"]

SCORES = ("probability", "logit")
MODES = ("exact", "adaptive")
LARGEST = 2**63 - 1  # that torch takes as a size


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
    measured:         [N, Gy, Gx] bool, the positions that were measured and not interpolated; None with mode="exact".
    error:            [N] float64, how far interpolated scores were off at most, where that was looked at; NaN where
                      nothing was interpolated; None with mode="exact".
    path:             "engine", or "forwards" where plain forwards measured all.
    reason:           why plain forwards did, else "".
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
    measured: Tensor | None = None
    error: Tensor | None = None
    path: str = "engine"
    reason: str = ""

    def heatmap(self) -> Tensor:
        """The mean drop of the score over the boxes that cover each pixel.

            heat[n, y, x] = mean over {b : b covers (y, x)} of clean[n] - scores[n, b]

        Returns: [N, H, W], the dtype of `scores`. Positive where hiding the pixel cost the target its
        score. Every box counts with weight one at each pixel it covers, a clipped box too, which equals
        `captum.attr.Occlusion`. A pixel that no box covers (stride greater than box) is NaN, and so is
        one under a box whose score is not finite.

        Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
        """
        with contained():
            return self._spread(self.clean[:, None, None] - self.scores)

    def activation_heatmap(self) -> Tensor:
        """The mean drop of the feature map's total activation, as `heatmap` has it for the score.

        Returns: [N, H, W]. Raises ArgumentError when the map was made without `feature`.
        """
        if self.activation is None:
            raise ArgumentError("activation_heatmap: no feature was measured; pass feature=(layer, unit)")
        with contained():
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
    mode: str = "exact",
    tolerance: float = 0.05,
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
    precision:  "exact" (the parameters' own dtype, fp32 for most; autocast and TF32 are off for the call), or what the
                factors of convolutions and matrix products may be rounded to where that is faster: "tf32" (11 bits, on a
                GPU's tensor cores) or "bf16" (8 bits). Sums are fp32.
    mode:       "exact": every position is measured. "adaptive", which is approximate: positions half a box apart,
                and all positions of every cell of that coarse grid at whose corners an answer differs; the rest is
                interpolated, and `error` says how far off that was at a sample of it.
    tolerance:  of the range of an image's answers, what the corners of a cell may differ by with mode="adaptive".
    batch_size: positions worked at at once; None chooses by the size of their maps.
    strict:     raise UnsupportedOperation where otherwise plain batched forwards give the same answer: for a network
                that zfcore.network cannot read, a dtype or device without kernels, weights that are not finite. Not
                where forwards are as fast: `reason` says so then.
    progress:   draw a bar that counts box positions done.

    Returns: `Occlusion`, on the model's device; floats in at least fp32.
    Raises: ArgumentError, ShapeError, DtypeError, DeviceError, UnitNotFound (a class or unit outside the
    network's), LayerNotFound, UnsupportedOperation.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2 and figure 7.
    """
    with contained(), ExitStack() as stack:
        # Tensors made under the caller's inference mode could not be written to outside of it, nor count their
        # versions, which shows what a network writes to its input.
        stack.enter_context(torch.inference_mode(False))
        check_surroundings()
        whole, model = model, unwrapped(model)
        images = checked_images(images)
        device, dtype = placement(model, images)
        images = images.to(device, dtype).detach()
        if not (callable(score) or score in SCORES):
            raise ArgumentError(f"score: {score!r}; expected one of {SCORES} or a callable")
        if precision not in PRECISIONS:
            raise ArgumentError(f"precision: {precision!r}; expected one of {PRECISIONS}")
        if precision != "exact" and images.dtype == torch.float64:
            raise ArgumentError(f"precision: {precision!r} with float64 parameters; expected float32 or narrower ones")
        if mode not in MODES:
            raise ArgumentError(f"mode: {mode!r}; expected one of {MODES}")
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
            raise DtypeError(f"tolerance: {tolerance!r}; expected a number")
        if not 0 <= tolerance <= 1:
            raise ArgumentError(f"tolerance: {tolerance}; expected a share between 0 and 1")
        if batch_size is not None:
            batch_size = min(_whole("batch_size", batch_size), LARGEST)
        box, stride = _pair("box", box), _pair("stride", stride)
        grid = Grid.over(images.shape[-2:], box, stride)
        fill = _as_picture(fill, images)
        answers = Answers(score, targets, images, lambda: last_operation(model, images[:1]))
        if isinstance(feature, tuple | list) and len(feature) == 2:
            feature = (layer_inside(feature[0], whole, model), feature[1])
        totals = None if feature is None else FeatureTotals(model, feature, images)

        count = len(images)
        measured = Measured(count, len(grid))
        chosen = Everything(grid)
        if mode == "adaptive":
            half = tuple(max(1, round(b / 2 / s)) for b, s in zip(box, stride, strict=True))
            chosen = WhereItMoves(grid, half, tolerance, count, device)
        stack.enter_context(torch.no_grad())
        stack.enter_context(default_device(images))
        stack.enter_context(eagerly())
        stack.enter_context(evaluating(model))
        known = mode == "exact"  # the bar counts on all positions from the start
        total = count * len(grid) if known else 0
        bar = stack.enter_context(bar_of(progress, total=total, unit="box", desc="occlusion"))
        sweep, reason = _sweep(model, images, grid, totals, batch_size, strict, precision)
        # What is left for forwards: images, and positions of others.
        left, again = torch.arange(count, device=device), torch.empty(0, dtype=torch.int64, device=device)
        if sweep is not None:
            changes = _Changes(sweep, images, fill, len(grid), answers, totals)
            with exact_arithmetic(device):
                _measure(changes, chosen, measured, bar, known)
            left, again = changes.left()
        if len(left) or len(again) or not count:
            stack.enter_context(arithmetic(device, precision))
            held = stack.enter_context(kept(model))
            if totals is not None:
                stack.enter_context(observing(totals.module, totals.see))
            if sweep is not None and known and (done := len(left) * len(grid) + len(again)):
                bar.update(-done)
            forwards = Forwards(model, images, fill, grid, left, batch_size, answers, totals, held)
            _measure(forwards, chosen, measured, bar, known)
            _put(forwards, again, measured, bar, known)

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
            measured=chosen.measured,
            error=chosen.error,
            path="engine" if sweep is not None else "forwards",
            reason=reason,
        )


def _measure(
    runner: "_Changes | Forwards", chosen: Everything | WhereItMoves, measured: Measured, bar: Bar, known: bool
) -> None:
    """The runner's images and positions into `measured`, those that were chosen.

    known: the bar counts on them already.
    """
    for group in runner.groups():
        for owners, parts in runner.clean(group):
            measured.put("clean", owners, parts)
        for index in chosen.rounds(group, measured):
            if not len(index) and measured.occluded[0] is None:
                measured.put("occluded", index, [None if p is None else p[:0] for p in measured.clean])
            _put(runner, index, measured, bar, known)


def _put(runner: "_Changes | Forwards", index: Tensor, measured: Measured, bar: Bar, known: bool) -> None:
    """The runner's positions [k], image * Gy * Gx + position, into `measured`."""
    bar.total += 0 if known else len(index)
    for own, parts in runner.measure(index):
        measured.put("occluded", own, parts)
        if not bar.disable and own.is_cuda:
            torch.cuda.current_stream(own.device).synchronize()  # a queued forward is not a done one
        bar.update(len(own))


def _sweep(
    model: nn.Module,
    images: Tensor,
    grid: Grid,
    totals: FeatureTotals | None,
    batch_size: int | None,
    strict: bool,
    precision: str,
) -> tuple[Sweep | None, str]:
    """The engine for this network and grid; or None where plain forwards are to be run, and why."""
    device = images.device
    try:
        network = read_network(model, tuple(images.shape[1:]), None, images[:1])
        feature = None if totals is None else totals.stage(network)
        jump = next((stage for stage in network.stages if "jumps" in stage.options), None)
        if jump is not None:
            raise UnsupportedOperation(
                f"{jump.name!r} goes by {jump.options['jumps']}, which the rounding of a change may tip over"
            )
        if not sweeps(images):
            raise UnsupportedOperation(f"the engine has no kernels for {images.dtype} on {device.type}")
        precision = precision if pays(precision, device) else "exact"
        sweep = Sweep(network, feature, grid.y, grid.x, images.dtype, batch_size, device, precision)
        if not sweep.finite:
            raise UnsupportedOperation("weights of the network are not finite")
    except (UnsupportedOperation, ShapeError) as error:
        if strict:
            raise
        if isinstance(error, ShapeError):
            _check_that_it_runs(model, images, error)
        warnings.warn(f"zfcore: plain forwards run this network: {error}", stacklevel=3)
        return None, str(error)
    return (sweep, "") if sweep.refusal is None else (None, sweep.refusal)


def _check_that_it_runs(model: nn.Module, images: Tensor, error: ShapeError) -> None:
    """Raises what the reader says of the images' shape, unless the network takes them."""
    image = images[:1] if len(images) else images.new_zeros((1, *images.shape[1:]))
    try:
        with kept(model) as held, held.watching():
            model(image.clone())
    except Exception as failure:  # of the network's own code
        raise error from failure


# How many times larger than a position's output the clean one may be: what they differ by is then as large, and what is
# left of it loses as many digits.
LARGER = 8

class _Changes:
    """Measures positions with the engine, as `Forwards` does with forwards."""

    def __init__(
        self,
        sweep: Sweep,
        images: Tensor,
        fill: Tensor,
        positions: int,
        answers: Answers,
        totals: FeatureTotals | None,
    ):
        self.sweep, self.images, self.fill, self.positions = sweep, images, fill, positions
        self.answers, self.totals = answers, totals
        # What an infinity differs by from another is no number, and what values that are rounded by more than one differ by
        # says nothing of functions that saturate: images with any are left for forwards. How often one was
        # seen, by image, and of the positions measured which have differences too coarse for them: looked at when all is
        # done, so that nothing waits for a GPU until then.
        self.infinite = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self.blurred: list[tuple[Tensor, Tensor]] = []

    def left(self) -> tuple[Tensor, Tensor]:
        """The images, and the positions of others, that forwards have to measure."""
        again = torch.empty(0, dtype=torch.int64, device=self.images.device)
        if self.blurred:
            places, coarse = map(torch.cat, zip(*self.blurred, strict=True))
            again = places[coarse]
        return self.infinite.nonzero().flatten(), again[self.infinite[again // self.positions] == 0]

    def groups(self) -> Iterator[Tensor]:
        for self.first, end in self.sweep.image_batches(len(self.images)):
            yield torch.arange(self.first, end, device=self.images.device)

    def clean(self, group: Tensor) -> Iterator[tuple[Tensor, Parts]]:
        self.group, sweep = group, self.sweep
        with running(sweep.network.model):
            self.maps, largest = sweep.up(self.images[group])
        # A fill that is larger than the picture brings changes as much larger; an infinite one is seen in what it changes.
        times = torch.linalg.vector_norm(self.fill[group], math.inf, (1, 2, 3)) / largest[0].clamp(min=1)
        reached = largest.amax(0) * torch.where(times < math.inf, times.clamp(min=1), 1)
        self.infinite[group] += ~(reached <= 1 / torch.finfo(reached.dtype).eps)
        output = self.maps[sweep.output].reshape(len(group), *sweep.output.shape)
        self.largest = output.flatten(1).abs().amax(1)
        returned = sweep.network.returned(output.clone(memory_format=torch.contiguous_format))
        scores, labels = self.answers.read(returned, group, True)
        self.total = None
        if self.totals is not None:
            feature = self.maps[sweep.feature].reshape(len(group), *sweep.feature.shape)
            self.total = self.totals.sum(feature, group, True)
        yield group, [scores, labels, self.total]

    def measure(self, index: Tensor) -> Iterator[tuple[Tensor, Parts]]:
        if not len(index):
            return
        first = self.first
        images, fill = self.images[self.group], self.fill[self.group]
        for own, output, feature in self.sweep.run(images, fill, self.maps, index - first * self.positions):
            image, place = own // self.positions, own + first * self.positions
            owners = first + image
            values = output.flatten(1)
            finite = values.isfinite().all(1)
            self.blurred.append((place, values.abs().amax(1) * LARGER < self.largest[image]))
            scores, labels = self.answers.read(self.sweep.network.returned(output), owners, False)
            total = None
            if self.totals is not None:
                total = self.total[image] + self.totals.sum(feature, owners, False)
                finite &= total.isfinite()
            self.infinite.index_add_(0, owners, (~finite).long())
            yield place, [scores, labels, total]


def _covers(starts: Tensor, ends: Tensor, length: int) -> Tensor:
    """[G, length] float64: one where the interval of an axis holds the pixel."""
    pixel = torch.arange(length, device=starts.device)
    return ((starts[:, None] <= pixel) & (pixel < ends[:, None])).double()


def _as_picture(fill: object, images: Tensor) -> Tensor:
    """`fill` as a picture for each image: [N, C, H, W], a view without copies of its own."""
    try:
        # Where the images are, whatever the caller's default device; a tensor stays where it is for now.
        value = fill if isinstance(fill, Tensor) else torch.as_tensor(fill, device=images.device)
        if value.is_floating_point() and not hasattr(fill, "dtype"):
            # Python's own numbers, all of their digits.
            value = torch.as_tensor(fill, dtype=torch.float64, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtypeError(f"fill: {fill!r}; expected a number or a tensor") from error
    if what := without_values(value):
        raise DtypeError(f"fill: {what}; expected a number or a dense tensor")
    value = plain(value)
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
