"""The engine of occlusion: exact incremental inference for all positions of a box.

A box changes a rectangle of the picture, and of every map above it a rectangle that grows until it is the map. The
clean maps are computed once an image; from there on only changes travel, for many positions at once: patches of what
a map differs by from the clean one. Linear operations take a change to a change; the others read the clean map, add
the change, and give what their result differs by. What did not change costs nothing, inside a patch too, where a
rectifier or a maximum let nothing through. Where a change is no less than a map, the maps themselves travel from there
on (`zfcore.engine.values`); where that begins is a matter of what it costs (`zfcore.engine.costs`).

Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2. The reuse of clean maps: Nakandala et al., SIGMOD 2019.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zfcore.engine import costs
from zfcore.engine.costs import Cost
from zfcore.engine.numbers import numbers
from zfcore.engine.rects import Pair, Rects
from zfcore.engine.values import Values
from zfcore.network import Network, Stage, Window, arithmetic, scale_of
from zfcore.ops._library import runs_on
from zfcore.ops.conv_boxes import conv_boxes
from zfcore.ops.conv_delta import KEPT_BYTES, ConvChange, DeltaFilters, conv_delta, delta_filters
from zfcore.ops.lrn_delta import lrn_delta
from zfcore.ops.paste_boxes import paste_boxes
from zfcore.ops.pointwise_delta import pointwise_delta
from zfcore.ops.pool_delta import pool_delta
from zfcore.ops.relu_delta import relu_delta
from zfcore.reference._params import Limits, Lrn, Places
from zfcore.reference.deconv_step import cut

CLEAN_BYTES = 512 * 2**20  # of the clean maps of one batch of images
# Of a batch of positions, which share one reading of the filters: the bytes of their changes, and how many there are at
# the most. A GPU holds more, and each batch is some tens of launches, whatever is in it.
BATCHES = {"cpu": (160 * 2**20, 1024), "cuda": (2**30, 4096)}
ALIGNED = 4  # values: changes begin at multiples of 16 bytes, which move at once
CHANGES = 256  # how many it is counted with
SURELY = 0.95  # of what changes alone are counted to cost: for no less do values travel
MOVING = frozenset(("identity", "relu", "max_pool", "channels", "cat", "pad"))  # they give no value that is larger
TILE = (4, 6)  # positions that stand together in a batch, rows then columns: near ones change the same channels


def sweeps(images: Tensor) -> bool:
    """Whether the engine has kernels for these images' device and dtype, or was told to do without."""
    if images.dtype not in (torch.float32, torch.float64):
        return False
    return runs_on(images.device, ("cpu", "triton") if images.dtype == torch.float32 else ("cpu",))


@dataclass
class _Step:
    """One operation on changes, or several at once.

    result: the stage whose change it gives. sources: those whose changes it reads. run: the method of Sweep.
    clean: the stages whose clean maps it reads. stages: all that is done. macs: its multiply-adds a position, counted
    as if all inside a patch changed; plain: those of the whole map. cost: what it takes.
    """

    result: Stage
    sources: list[Stage]
    run: Callable[[Sweep, _Step, _Batch], Tensor]
    clean: tuple[Stage, ...] = ()
    stages: tuple[Stage, ...] = ()
    macs: float = 0.0
    plain: float = 0.0
    cost: Cost = Cost()
    before: Stage | None = None  # what the rectifier reads that is done with a convolution
    weight: tuple | None = None  # what its filters are made of, once it is known to run
    filters: DeltaFilters | None = None
    convolution: ConvChange | None = None
    factor: Tensor | slice | None = None  # what a change is multiplied by, or the channels picked


class _Batch:
    """Some positions: the image (within the image batch), the row and the column of the grid of each, [B]."""

    def __init__(self, image: Tensor, row: Tensor, column: Tensor, maps: dict[Stage, Tensor]):
        self.image, self.row, self.column, self.maps = image, row, column, maps
        self.each = torch.arange(len(image), device=image.device)
        self.changes: dict[Stage, Tensor] = {}
        self.origins: dict[Rects, Tensor] = {}
        self.boxes: Tensor | None = None  # [B, 4]: y0, x0, y1, x1 in pixels
        self.covered: Tensor | None = None  # [N, C, H, W]: what each picture changes by where it is covered

    def origin(self, rects: Rects) -> Tensor:
        """Where each position's rectangle begins, [B, 2]."""
        if rects not in self.origins:
            y, x = (numbers(axis, self.image.device) for axis in rects[:2])
            self.origins[rects] = torch.stack((y[self.row], x[self.column]), 1)
        return self.origins[rects]

    def part(self, begin: int, end: int) -> _Batch:
        """Some of the positions, with their changes."""
        some = _Batch(self.image[begin:end], self.row[begin:end], self.column[begin:end], self.maps)
        some.changes = {stage: change[begin:end] for stage, change in self.changes.items()}
        some.boxes = self.boxes[begin:end]
        return some

    def places(self, before: Rects, after: Rects) -> Places:
        return Places(self.image, self.origin(before), self.origin(after), after.size)


class Sweep:
    """A network made ready for one grid of boxes.

    network: read up to its output. feature: a stage of it whose changes are asked for, or None. y, x: the boxes' spans
    [begin, end) in pixels. dtype: float32 or float64. device: of the network and the images. precision: of the products,
    "exact", "tf32" or "bf16"; they sum in float32 at least. changes: how many steps are taken on changes, before values
    travel; None for what is counted to cost the least.
    """

    def __init__(
        self,
        network: Network,
        feature: Stage | None,
        y: tuple[Pair, ...],
        x: tuple[Pair, ...],
        dtype: torch.dtype,
        batch_size: int | None,
        device: torch.device = torch.device("cpu"),
        precision: str = "exact",
        changes: int | None = None,
    ):
        self.network, self.feature, self.dtype, self.device = network, feature, dtype, device
        self.picture, self.output = network.stages[0], network.layer
        self.boxes, self.precision = (y, x), precision
        self.readers = network.consumers()
        self.rects = {self.picture: Rects.fitted(list(y), list(x), self.picture.shape[1:])}
        self.density = {self.picture: 1.0}  # of a change, how much of it is counted not to be zero
        self.steps: list[_Step] = []
        planned = {self.picture}
        for stage in network.stages:
            if stage not in planned:
                self.steps.append(self.plan(stage))
                planned |= set(self.steps[-1].stages)
        self.cost, self.model_cost = self.divide(changes)
        self.in_place = any(step.run is Sweep.change_boxes for step in self.steps)  # the pictures' changes are not laid out
        self.kept = {self.output, *(source for step in self.steps for source in step.clean)}
        if self.values is not None:
            self.kept |= set(self.values.entering) - {self.picture}
        if feature is not None:
            self.kept.add(feature)
        self.rank = _tiled(len(y), len(x)).argsort().to(device)
        self.spans = tuple(torch.tensor(axis, device=device).reshape(-1, 2) for axis in self.boxes)
        self.offset, self.length = self.plan_memory()
        room, most = BATCHES.get(device.type, BATCHES["cpu"])
        self.chosen_size = batch_size
        self.batch_size = batch_size or max(1, min(most, room // (max(self.length, 1) * dtype.itemsize)))
        self.memory: Tensor | None = None  # of all changes of a batch, as long as the largest so far

    # -- the plan

    def divide(self, changes: int | None) -> tuple[float, float]:
        """Which steps are taken on changes, and what runs on values: of all ways to cut the steps in two, the least.

        Gives what a position is counted to cost, and what it costs the model's own forward; `macs` and `plain_macs` are
        their multiply-adds, with all inside a patch counted as changed.
        """
        steps, device, itemsize = self.steps, self.device.type, self.dtype.itemsize
        last = {source: at for at, step in enumerate(steps) for source in step.sources}
        made = {self.picture: -1} | {step.result: at for at, step in enumerate(steps)}
        positions = len(self.boxes[0]) * len(self.boxes[1])  # no batch is counted larger, however many images there are
        below = [0.0]
        for step in steps:
            below.append(below[-1] + step.cost.of(min(positions, CHANGES)))
        cuts: list[tuple[float, int, int]] = []  # what it costs, where it is, and the positions of a batch of values
        above, model, largest = Cost(), Cost(), 0
        for at in range(len(steps), -1, -1):
            if at < len(steps):
                above += self.on_values(steps[at])
                for stage in steps[at].stages:
                    model += costs.whole(stage, "model")
                    largest = max(largest, *map(costs.count, (stage, *stage.inputs)))
            crossing = [source for source, own in made.items() if own < at <= last.get(source, -1)]
            if at < len(steps) and any(map(self.stays_patch, crossing)):  # its value is a row, and its change a map's
                continue
            size = even(positions, costs.size_of_batch(largest, itemsize, device))
            entered = sum(map(costs.formed, crossing), Cost()) if at < len(steps) else Cost()
            cuts.append((below[at] + (above + entered).of(size), at, size))
        chosen = min(cuts)
        if changes is not None:
            chosen = next(cut for cut in cuts if cut[1] <= changes)
        elif chosen[0] > SURELY * cuts[0][0]:
            chosen = cuts[0]  # no values
        cost, at, self.value_size = chosen
        upper = {stage for step in steps[at:] for stage in step.stages}
        self.macs = sum(step.macs for step in steps[:at]) + sum(step.plain for step in steps[at:])
        self.plain_macs = sum(step.plain for step in steps)
        self.steps, self.values = steps[:at], None
        for step in self.steps:
            if step.weight is not None:
                step.filters = delta_filters(*step.weight, self.precision)
        if upper:
            stages = [stage for stage in self.network.stages if stage in upper]
            self.values = Values(stages, self.readers, self.feature, self.output, self.dtype, self.device)
        return cost, model.of(even(positions, costs.size_of_batch(largest, itemsize, device)))

    def on_values(self, step: _Step) -> Cost:
        """What the step's stages cost as whole maps."""
        first, *others = step.stages
        with_it = costs.folded if first.kind == "conv" else lambda stage: costs.whole(stage, "values")
        return sum(map(with_it, others), costs.whole(first, "values"))

    @property
    def refusal(self) -> str | None:
        """Why plain forwards are to be run instead, None where they cost more."""
        if self.cost >= self.model_cost:
            times = self.cost / self.model_cost
            return f"plain forwards cost less: by count, the engine takes {times:.2f} times as long"
        return None

    def fused(self, stage: Stage) -> list[Stage]:
        """What follows a product and is done with it: factors, and then perhaps a rectifier."""
        chain: list[Stage] = []
        last = stage
        while stage.kind == "conv" or is_full_layer(stage):
            readers = self.readers[last]
            if len(readers) != 1 or last in (self.feature, self.output):
                break
            if readers[0].kind not in ("batch_norm", "scale", "identity", "relu"):
                break
            last = readers[0]
            chain.append(last)
            if last.kind == "relu":
                break
        return chain

    def plan(self, stage: Stage) -> _Step:
        options = stage.options
        if stage.kind == "conv" or is_full_layer(stage):
            return self.plan_product(stage)
        source = stage.inputs[0]
        below = self.rects[source]
        dense = max(self.density[s] for s in stage.inputs)
        run, clean, own, factor, work = Sweep.change_any, (*stage.inputs, stage), None, None, "any"
        if stage.kind == "relu":
            run, clean, own, work = Sweep.change_relu, (source,), below, "relu"
            dense = min(dense, costs.RECTIFIED)
        elif stage.kind == "pointwise":
            run, clean, own, work, dense = Sweep.change_pointwise, (source,), below, "pointwise", 1.0
        elif stage.kind == "lrn":
            run, clean, own, work, dense = Sweep.change_lrn, (source, stage), below, "lrn", 1.0
        elif stage.kind in ("batch_norm", "scale"):
            run, clean, own, factor, work = Sweep.change_scale, (), below, self.factor(stage), "move"
        elif stage.kind == "channels":
            run, clean, own, factor, work = Sweep.change_channels, (), below, self.picked(stage), "channels"
        elif stage.kind == "identity" or self.stays_patch(stage):
            run, clean, own, work = Sweep.change_nothing, (), below, None
        elif stage.kind == "max_pool":
            run, clean, work = Sweep.change_max_pool, (source, stage), "max_pool"
            own = below.reached(stage.window, stage.shape[1:])
        elif stage.kind == "avg_pool":
            run, clean, work = Sweep.change_avg_pool, (), "avg_pool"
            own = below.reached(stage.window, stage.shape[1:])
        elif stage.kind == "pad":
            run, clean, own, work = Sweep.change_pad, (), below.reached(stage.window, stage.shape[1:]), "cut"
        elif stage.kind in ("add", "cat"):
            run, clean, work = Sweep.change_add if stage.kind == "add" else Sweep.change_cat, (), stage.kind
            own = self.joint(stage)
        elif stage.kind == "product" and _multiplies_by_place(stage):
            run, clean, work, dense = Sweep.change_factors, tuple(stage.inputs), "product", 1.0
            own = self.joint(stage) if len(set(map(_size, stage.inputs))) == 1 else None
        elif options.get("mean"):
            run, clean, work, dense = Sweep.change_mean, (), "move", 1.0
        self.rects[stage] = own or below.whole(_size(stage))
        self.density[stage] = 1.0 if run is Sweep.change_any else dense
        step = _Step(stage, list(stage.inputs), run, clean, (stage,), factor=factor)
        step.cost = self.worth(step, work)
        return step

    def joint(self, stage: Stage) -> Rects:
        """The rectangle that holds those of all operands, which are of one size."""
        spans = [[self.rects[s].spans(axis) for s in stage.inputs] for axis in (0, 1)]
        joined = [[(min(b for b, _ in at), max(e for _, e in at)) for at in zip(*axis)] for axis in spans]
        return Rects.fitted(*joined, _size(stage))

    def worth(self, step: _Step, work: str | None) -> Cost:
        """What a step that is no product costs."""
        if work is None:
            return Cost()
        out = self.patch(step.result)
        if work == "any":
            moved = sum(map(costs.count, step.clean)) * costs.CHANGED["any"]
            return costs.whole(step.result, "values") + Cost(moved, costs.CALL_CHANGE)
        rate = costs.CHANGED[work]
        if work == "pointwise" and step.result.options["native"] is None:
            rate = costs.CHANGED["function"]
        cost = max(out, *map(self.patch, step.sources)) * rate
        if step.result.kind in ("add", "cat", "product"):
            moved = [s for s in step.sources if self.rects[s] != self.rects[step.result]]
            cost += len(moved) * out * costs.CHANGED["cut"]
        return Cost(cost, costs.CALL_CHANGE)

    def patch(self, stage: Stage) -> int:
        """How many values its change has."""
        return math.prod(self.rects[stage].size) * self.channels(stage)

    def stays_patch(self, stage: Stage) -> bool:
        """Whether a map that is laid out in a row may stay a patch: full layers read it, as filters of its size."""
        return (
            bool(stage.options.get("flat"))
            and len(stage.inputs[0].shape) == 3
            and stage not in (self.output, self.feature)
            and all(map(is_full_layer, self.readers[stage]))
        )

    def plan_product(self, stage: Stage) -> _Step:
        """A convolution; or a full layer, which is a convolution with one output."""
        source, options = stage.inputs[0], stage.options
        if stage.kind == "conv":
            weight, window, groups, map, above = options["weight"](), stage.window, options["groups"], _size(source), _size(stage)
            shape = tuple(weight.shape)
        else:
            weight, groups, above = options["matrix"](), 1, (1, 1)
            patch = self.stays_patch(source)
            channels, *map = source.inputs[0].shape if patch else (*source.shape, 1, 1)
            window = Window(tuple(map), (1, 1), (0, 0), (1, 1))
            shape = (len(weight), channels, *map)
        chain = self.fused(stage)
        rectifier = chain[-1] if chain and chain[-1].kind == "relu" else None
        scale = None
        for factor in chain:
            if factor.kind in ("batch_norm", "scale"):
                own = self.factor(factor).reshape(-1).expand(shape[0])
                scale = own if scale is None else scale * own
        before = ([stage, *chain])[-2] if rectifier else None
        result = chain[-1] if chain else stage
        below = self.rects[source]
        self.rects[result] = self.rects[stage] = below.reached(window, above)
        pairs = below.pairs(window, above)
        self.density[result] = self.density[stage] = costs.RECTIFIED if rectifier else 1.0
        alone = source is self.picture is not self.feature and len(self.readers[source]) == 1
        return _Step(
            result,
            [source],
            Sweep.change_boxes if stage.kind == "conv" and alone else Sweep.change_product,
            (before,) if before else (),
            (stage, *chain),
            macs=pairs * shape[1] * shape[0],
            plain=below.whole(map).pairs(window, above) * shape[1] * shape[0],
            cost=costs.product_of_changes(
                pairs, shape, groups, self.density[source], self.patch(source), self.patch(result),
                sliced=weight.nbytes > KEPT_BYTES,
            ),  # fmt: skip
            before=before,
            weight=(weight, scale, shape, groups),
            convolution=ConvChange(window, groups, tuple(map), tuple(above), _limits(rectifier)),
        )

    @property
    def finite(self) -> bool:
        """Whether all filters are: a zero change times an infinite filter is no zero."""
        each = [torch.as_tensor(step.filters.finite) for step in self.steps if step.filters is not None]
        return not each or bool(torch.stack(each).all())  # waited for once

    def plan_memory(self) -> tuple[dict[Stage, int], int]:
        """Where the changes of a position lie in one piece of memory, in values, and how long it is.

        A change lives until its last reader has run; what does not live may be written over.
        """
        last = {step.result: at for at, step in enumerate(self.steps)}
        last |= {source: at for at, step in enumerate(self.steps) for source in step.sources}
        entering = () if self.values is None else self.values.entering
        last |= {stage: len(self.steps) for stage in (self.output, *entering)}
        for step in reversed(self.steps):
            if step.run is Sweep.change_nothing:  # its result is its source
                last[step.sources[0]] = max(last[step.sources[0]], last[step.result])
        offset: dict[Stage, int] = {}
        live: list[tuple[int, int, Stage]] = []  # begin, end and stage, in order
        length = 0
        for at, step in enumerate(self.steps):
            live = [block for block in live if last[block[2]] >= at]
            if step.run is Sweep.change_nothing:
                continue
            size, begin = math.prod(self.rects[step.result].size) * self.channels(step.result), 0
            for first, end, _ in live:
                if begin + size <= first:
                    break
                begin = end
            offset[step.result] = begin
            end = -(-(begin + size) // ALIGNED) * ALIGNED
            live = sorted([*live, (begin, end, step.result)], key=lambda block: block[0])
            length = max(length, end)
        return offset, length

    def picked(self, stage: Stage) -> Tensor | slice:
        index = stage.options["index"]
        neighbours = slice(int(index[0]), int(index[0]) + len(index))
        return neighbours if index.tolist() == list(range(neighbours.start, neighbours.stop)) else index.to(self.device)

    def channels(self, stage: Stage) -> int:
        """Of its change, [B, channels, h, w]: what is no map travels as maps of one pixel."""
        if self.stays_patch(stage):
            return stage.inputs[0].shape[0]
        return stage.shape[0] if len(stage.shape) == 3 else math.prod(stage.shape)

    # -- the way up

    def image_batches(self, count: int) -> Iterator[tuple[int, int]]:
        """Image batches [begin, end): as many as their clean maps leave room for, and not more than fill a batch."""
        size = sum(math.prod(stage.shape) for stage in self.kept) * self.dtype.itemsize
        step = max(1, min(CLEAN_BYTES // max(size, 1), -(-self.batch_size // len(self.rank))))
        for begin in range(0, count, step):
            yield begin, min(begin + step, count)

    def up(self, images: Tensor) -> tuple[dict[Stage, Tensor], Tensor]:
        """The clean maps that the steps read, the output and the feature's, channels last; what is no map as maps of one pixel.

        And the largest magnitudes of each image in its maps [maps, n], the picture first; NaN where there is one.
        """
        kept: dict[Stage, Tensor] = {}
        largest = []

        def keep(stage: Stage, value: Tensor) -> Tensor:
            if stage.kind not in MOVING:
                largest.append(torch.linalg.vector_norm(value, math.inf, dim=tuple(range(1, value.dim()))))
            if stage in self.kept:
                shaped = value if value.dim() == 4 else value.reshape(len(value), -1, 1, 1)
                kept[stage] = shaped.contiguous(memory_format=torch.channels_last)
            return value

        keep(self.picture, images)
        self.network.forward(images, lambda stage, inputs: keep(stage, stage.run(*inputs)))
        return kept, torch.stack(largest)

    def run(
        self, images: Tensor, fill: Tensor, maps: dict[Stage, Tensor], index: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Positions of the images, batch by batch, in an order of its own.

        images, fill: [n, C, H, W]. maps: of `up`. index: [k] int64, not empty, image * Gy * Gx + position. Yields parts of the
        index [B], the network's output for them, and the feature's changes [B, C, h, w].
        """
        per_image, columns = len(self.rank), len(self.boxes[1])
        size = min(self.batch_size, len(index))
        if self.chosen_size is None:
            size = even(len(index), size)
        if self.memory is None or len(self.memory) < size * self.length:
            self.memory = torch.empty(size * self.length, dtype=self.dtype, device=self.device)
        covered = None
        if self.in_place:
            covered = torch.sub(fill, images).contiguous(memory_format=torch.channels_last)
        order = (index // per_image * per_image + self.rank[index % per_image]).argsort()
        for own in index[order].split(size):
            position = own % per_image
            batch = _Batch(own // per_image, position // columns, position % columns, maps)
            (y0, y1), (x0, x1) = (spans[at].unbind(1) for spans, at in zip(self.spans, (batch.row, batch.column)))
            batch.boxes, batch.covered = torch.stack((y0, x0, y1, x1), 1), covered
            if covered is None and (self.steps or self.feature is self.picture):
                batch.changes[self.picture] = self.painted(images, fill, batch)
            feature = batch.changes[self.picture].clone() if self.feature is self.picture else None
            for step in self.steps:
                change = batch.changes[step.result] = step.run(self, step, batch)
                if step.result is self.feature:
                    feature = change.clone()
            if self.values is not None:
                yield from self.finish(images, fill, batch, own, feature)
                continue
            output = self.changed(self.output, batch).contiguous()
            if feature is not None and len(self.feature.shape) != 3:
                feature = feature.reshape(len(own), *self.feature.shape)
            yield own, output.reshape(len(own), *self.output.shape), feature

    def finish(
        self, images: Tensor, fill: Tensor, batch: _Batch, index: Tensor, feature: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """As `run`, from the changes of a batch on: the rest on values, a few positions at a time."""
        size = even(len(index), self.value_size)
        for begin in range(0, len(index), size):
            some = batch.part(begin, begin + size)
            values = {stage: self.value(stage, images, fill, some) for stage in self.values.entering}
            narrow = self.precision != "exact" and self.device.type != "cpu"  # packed filters are float32
            with arithmetic(self.device, self.precision) if narrow else contextlib.nullcontext():
                asked = self.values.run(values)
            own = None if feature is None else feature[begin : begin + size]
            if self.feature in asked:
                clean = batch.maps[self.feature].reshape(-1, *self.feature.shape)
                own = asked[self.feature] - clean[some.image]
            elif own is not None and len(self.feature.shape) != 3:
                own = own.reshape(len(own), *self.feature.shape)
            yield index[begin : begin + size], asked[self.output].to(self.dtype).contiguous(), own

    def painted(self, images: Tensor, fill: Tensor, batch: _Batch) -> Tensor:
        """What the boxes change the pictures by."""
        rects = self.rects[self.picture]
        origin = batch.origin(rects)
        return paste_boxes(images, fill, batch.boxes, Places(batch.image, origin, origin, rects.size))

    # -- the steps

    def pair(self, pair: Pair) -> Tensor:
        return numbers(tuple(pair), self.device)

    def factor(self, stage: Stage) -> Tensor:
        return torch.as_tensor(scale_of(stage), dtype=self.dtype, device=self.device)

    def result(self, step: _Step, batch: _Batch) -> Tensor:
        """Memory for the step's change, channels last, its contents undefined."""
        count, channels, size = len(batch.image), self.channels(step.result), self.rects[step.result].size
        begin = self.offset[step.result] * count
        own = self.memory[begin : begin + count * channels * math.prod(size)]
        return own.view(count, *size, channels).permute(0, 3, 1, 2)

    def places(self, step: _Step, batch: _Batch) -> Places:
        return batch.places(self.rects[step.sources[0]], self.rects[step.result])

    def change_product(self, step: _Step, batch: _Batch) -> Tensor:
        clean = batch.maps[step.before] if step.before else None
        change, out = batch.changes[step.sources[0]], self.result(step, batch)
        return conv_delta(change, step.filters, step.convolution, self.places(step, batch), clean, out)

    def change_boxes(self, step: _Step, batch: _Batch) -> Tensor:
        clean = batch.maps[step.before] if step.before else None
        patch, places, out = self.rects[self.picture].size, self.places(step, batch), self.result(step, batch)
        return conv_boxes(batch.covered, batch.boxes, patch, step.filters, step.convolution, places, clean, out)

    def change_relu(self, step: _Step, batch: _Batch) -> Tensor:
        source, out = step.sources[0], self.result(step, batch)
        return relu_delta(
            batch.changes[source], batch.maps[source], _limits(step.result), self.places(step, batch), out
        )

    def change_lrn(self, step: _Step, batch: _Batch) -> Tensor:
        source, out, lrn = step.sources[0], self.result(step, batch), Lrn(*step.result.options["lrn"])
        before, after = batch.maps[source], batch.maps[step.result]
        return lrn_delta(batch.changes[source], before, after, lrn, self.places(step, batch), out)

    def change_max_pool(self, step: _Step, batch: _Batch) -> Tensor:
        source, out = step.sources[0], self.result(step, batch)
        before, after = batch.maps[source], batch.maps[step.result]
        return pool_delta(
            batch.changes[source], before, after, step.result.window, self.places(step, batch), out
        )

    def change_scale(self, step: _Step, batch: _Batch) -> Tensor:
        return torch.mul(batch.changes[step.sources[0]], step.factor, out=self.result(step, batch))

    def change_nothing(self, step: _Step, batch: _Batch) -> Tensor:
        return batch.changes[step.sources[0]]

    def change_avg_pool(self, step: _Step, batch: _Batch) -> Tensor:
        window, share = step.result.window, step.result.options["share"]
        places = self.places(step, batch)
        corner = places.out_origin * self.pair(window.stride) - self.pair(window.padding)
        reach = [(n - 1) * s + k for n, s, k in zip(places.size, window.stride, window.kernel, strict=True)]
        under = cut(batch.changes[step.sources[0]], batch.each, corner - places.origin, reach)
        total = F.avg_pool2d(under, window.kernel, window.stride, divisor_override=1)
        if callable(share):
            counts = share(torch.zeros(1, dtype=self.dtype, device=self.device))
            share = cut(counts, torch.zeros_like(batch.image), places.out_origin, places.size)
        return torch.mul(total, share, out=self.result(step, batch))

    def change_pointwise(self, step: _Step, batch: _Batch) -> Tensor:
        source, out, function = step.sources[0], self.result(step, batch), step.result.options["function"]
        change, clean = batch.changes[source], batch.maps[source]
        if (native := step.result.options["native"]) is not None:
            return pointwise_delta(change, clean, native, self.places(step, batch), out)
        before = self.clean(source, self.rects[source], batch)
        return torch.sub(function(before + change), function(before), out=out)

    def change_channels(self, step: _Step, batch: _Batch) -> Tensor:
        change, out = batch.changes[step.sources[0]], self.result(step, batch)
        if isinstance(step.factor, slice):
            return out.copy_(change[:, step.factor])
        return torch.index_select(change, 1, step.factor, out=out)

    def change_factors(self, step: _Step, batch: _Batch) -> Tensor:
        """What a product of two maps changes by: a db + b da + da db."""
        rects = self.rects[step.result]
        (da, a), (db, b) = (self.operand(source, rects, step, batch) for source in step.sources)
        return torch.addcmul(a * db, da, b + db, out=self.result(step, batch))

    def operand(self, source: Stage, rects: Rects, step: _Step, batch: _Batch) -> tuple[Tensor, Tensor]:
        """A factor's change and clean value where the product lies; a gate's, which has one pixel, as they are."""
        if _size(source) != _size(step.result):
            return batch.changes[source], batch.maps[source][batch.image]
        return self.moved(source, step, batch), self.clean(source, rects, batch)

    def clean(self, source: Stage, rects: Rects, batch: _Batch) -> Tensor:
        """A stage's clean map in the rectangles."""
        return cut(batch.maps[source], batch.image, batch.origin(rects), rects.size)

    def change_mean(self, step: _Step, batch: _Batch) -> Tensor:
        source, out = step.sources[0], self.result(step, batch)
        return torch.sum(batch.changes[source], (2, 3), keepdim=True, out=out).div_(math.prod(source.shape[1:]))

    def changed(self, source: Stage, batch: _Batch) -> Tensor:
        """A stage's whole maps, with their changes: memory of their own."""
        change, rects, clean = batch.changes[source], self.rects[source], batch.maps[source]
        rows = clean.permute(0, 2, 3, 1)
        if rects.size == tuple(clean.shape[2:]):
            return rows.index_select(0, batch.image).permute(0, 3, 1, 2).add_(change)
        whole = rows.index_select(0, batch.image).permute(0, 3, 1, 2)
        origin = batch.origin(rects)
        if whole.device.type != "cpu":
            return whole.add_(cut(change, batch.each, -origin, whole.shape[2:]))
        height, width = rects.size
        for map, own, (y, x) in zip(whole, change, origin.tolist(), strict=True):
            map[:, y : y + height, x : x + width] += own
        return whole

    def value(self, stage: Stage, images: Tensor, fill: Tensor, batch: _Batch) -> Tensor:
        """A stage's whole maps, [B, *shape], as values take them."""
        if stage is not self.picture:
            return self.changed(stage, batch).reshape(len(batch.image), *stage.shape)
        # Painted, since a change of a pixel that is far larger than what hides it would leave no digits of that.
        y, x = (torch.arange(n, device=self.device) for n in images.shape[2:])
        y0, x0, y1, x1 = batch.boxes[:, :, None].unbind(1)
        rows, columns = (y0 <= y) & (y < y1), (x0 <= x) & (x < x1)
        covered = (rows[:, :, None] & columns[:, None, :])[:, None]
        painted = torch.where(covered, fill[batch.image], images[batch.image])
        return painted.contiguous(memory_format=torch.channels_last)

    def moved(self, source: Stage, step: _Step, batch: _Batch, by: Pair = (0, 0)) -> Tensor:
        """A source's change as a patch where the step's result lies, the map moved `by` rows and columns."""
        change, before, after = batch.changes[source], self.rects[source], self.rects[step.result]
        if before == after and by == (0, 0):
            return change
        start = batch.origin(after) - batch.origin(before) - self.pair(by)
        return cut(change, batch.each, start, after.size)

    def change_pad(self, step: _Step, batch: _Batch) -> Tensor:
        return self.moved(step.sources[0], step, batch, step.result.window.padding)

    def change_add(self, step: _Step, batch: _Batch) -> Tensor:
        parts = [self.moved(source, step, batch) for source in step.sources]
        return torch.add(*parts, out=self.result(step, batch))

    def change_cat(self, step: _Step, batch: _Batch) -> Tensor:
        parts = [self.moved(source, step, batch) for source in step.sources]
        return torch.cat(parts, 1, out=self.result(step, batch))

    def change_any(self, step: _Step, batch: _Batch) -> Tensor:
        """Any operation, on whole maps."""
        inputs = [self.changed(source, batch) for source in step.sources]
        inputs = [x.reshape(len(x), *source.shape) for x, source in zip(inputs, step.sources, strict=True)]
        if "statistics" in step.result.options:  # which torch takes to fewer digits with channels last
            inputs = [x.contiguous() for x in inputs]
        out = self.result(step, batch)
        result = step.result.run(*inputs).reshape(out.shape)
        return torch.sub(result, batch.maps[step.result][batch.image], out=out)


def even(count: int, most: int) -> int:
    """The size of as few parts of so many as hold `most` each at the most, near-equal ones."""
    return -(-count // -(-count // most))


def _tiled(rows: int, columns: int) -> Tensor:
    """The positions of a grid, tile after tile."""
    row, column = (axis.reshape(-1) for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    key = (row // TILE[0] * columns + column // TILE[1]) * math.prod(TILE) + row % TILE[0] * TILE[1] + column % TILE[1]
    return key.argsort()


def _size(stage: Stage) -> Pair:
    """Of its maps; what is no map travels as maps of one pixel."""
    return tuple(stage.shape[1:]) if len(stage.shape) == 3 else (1, 1)


def _multiplies_by_place(stage: Stage) -> bool:
    """Whether the factors of a product meet as their changes travel: two, each a map or a row of features, or alike."""
    shapes = [source.shape for source in stage.inputs]
    return len(shapes) == 2 and (shapes[0] == shapes[1] or all(len(shape) == 3 for shape in shapes))


def is_full_layer(stage: Stage) -> bool:
    """Whether it is a matrix times a row of features; one times each row of several is run on whole maps."""
    return "matrix" in stage.options and len(stage.shape) == 1


def _limits(stage: Stage | None) -> Limits:
    if stage is None:
        return Limits()
    rectifier = stage.options["rectifier"]
    return Limits(rectifier.slope, rectifier.upper)
