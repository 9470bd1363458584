"""The engine of occlusion: exact incremental inference for all positions of a box.

A box changes a rectangle of the picture, and of every map above it a rectangle that grows until it is the map. The
clean maps are computed once an image; from there on only changes travel, for many positions at once: patches of what
a map differs by from the clean one. Linear operations take a change to a change; the others read the clean map, add
the change, and give what their result differs by. What did not change costs nothing, inside a patch too, where a
rectifier or a maximum let nothing through.

Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2. The reuse of clean maps: Nakandala et al., SIGMOD 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zfcore.engine.numbers import numbers
from zfcore.network import Network, Stage, Window, scale_of
from zfcore.ops._library import runs_on
from zfcore.ops.conv_boxes import conv_boxes
from zfcore.ops.conv_delta import ConvChange, DeltaFilters, conv_delta, delta_filters, is_depthwise
from zfcore.ops.lrn_delta import lrn_delta
from zfcore.ops.paste_boxes import paste_boxes
from zfcore.ops.pool_delta import pool_delta
from zfcore.ops.relu_delta import relu_delta
from zfcore.reference._params import Limits, Lrn, Places
from zfcore.reference.deconv_step import cut

Pair = tuple[int, int]

CLEAN_BYTES = 512 * 2**20  # of the clean maps of one batch of images
# Of a batch of positions, which share one reading of the filters: the bytes of their changes, and how many there are at
# the most. A GPU holds more, and each batch is some tens of launches, whatever is in it.
BATCHES = {"cpu": (160 * 2**20, 1024), "cuda": (2**30, 4096)}
LANES = 16  # outputs that conv_delta works out at once
ALIGNED = 4  # values: changes begin at multiples of 16 bytes, which move at once
TILE = (4, 6)  # positions that stand together in a batch, rows then columns: near ones change the same channels


def sweeps(images: Tensor) -> bool:
    """Whether the engine has kernels for these images' device and dtype, or was told to do without."""
    if images.dtype not in (torch.float32, torch.float64):
        return False
    return runs_on(images.device, ("cpu", "triton") if images.dtype == torch.float32 else ("cpu",))


class Rects(NamedTuple):
    """A rectangle of a map for each box: rows from y[i], columns from x[j] for box (i, j), all of one size."""

    y: tuple[int, ...]
    x: tuple[int, ...]
    size: Pair

    @classmethod
    def fitted(cls, y: list[Pair], x: list[Pair], shape: Pair) -> Rects:
        """Around spans [begin, end) of each axis, inside a map of `shape`."""
        starts, sizes = [], []
        for spans, length in zip((y, x), shape, strict=True):
            size = max(end - begin for begin, end in spans)
            starts.append(tuple(min(begin, length - size) for begin, _ in spans))
            sizes.append(size)
        return cls(*starts, tuple(sizes))

    def spans(self, axis: int) -> list[Pair]:
        return [(start, start + self.size[axis]) for start in self[axis]]

    def whole(self, shape: Pair) -> Rects:
        """The whole of a map of `shape` for each box."""
        return Rects((0,) * len(self.y), (0,) * len(self.x), tuple(shape))

    def reached(self, window: Window, shape: Pair) -> Rects:
        """The outputs, of a map of `shape`, whose window touches the rectangle."""
        axes = []
        for axis, length in enumerate(shape):
            k, s, p, d = (value[axis] for value in window)
            spans = []
            for start, end in self.spans(axis):
                begin = min(max(0, -((d * (k - 1) - p - start) // s)), length - 1)
                spans.append((begin, max(begin + 1, min(length, (end - 1 + p) // s + 1))))
            axes.append(spans)
        return Rects.fitted(*axes, shape)

    def pairs(self, window: Window, shape: Pair) -> float:
        """How many pairs of a pixel and a tap reach an output, in the mean over the boxes."""
        product = 1.0
        for axis, length in enumerate(shape):
            k, s, p, d = (value[axis] for value in window)
            count = 0
            for start, end in self.spans(axis):
                for base in range(p, p - k * d, -d):
                    first, last = max(0, -(-(start + base) // s)), min(length - 1, (end - 1 + base) // s)
                    count += max(0, last - first + 1)
            product *= count / len(self[axis])
        return product


@dataclass
class _Step:
    """One operation on changes, or several at once.

    result: the stage whose change it gives. sources: those whose changes it reads. run: the method of Sweep.
    clean: the stages whose clean maps it reads. macs: its multiply-adds a position, counted as if all inside a
    patch changed; plain: those of the whole map.
    """

    result: Stage
    sources: list[Stage]
    run: Callable[[Sweep, _Step, _Batch], Tensor]
    clean: tuple[Stage, ...] = ()
    macs: float = 0.0
    plain: float = 0.0
    before: Stage | None = None  # what the rectifier reads that is done with a convolution
    filters: DeltaFilters | None = None
    convolution: ConvChange | None = None
    factor: Tensor | None = None  # what a change is multiplied by


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

    def places(self, before: Rects, after: Rects) -> Places:
        return Places(self.image, self.origin(before), self.origin(after), after.size)


class Sweep:
    """A network made ready for one grid of boxes.

    network: read up to its output. feature: a stage of it whose changes are asked for, or None. y, x: the boxes' spans
    [begin, end) in pixels. dtype: float32 or float64. device: of the network and the images. precision: of the products,
    "exact", "tf32" or "bf16"; they sum in float32 at least.
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
    ):
        self.network, self.feature, self.dtype, self.device = network, feature, dtype, device
        self.picture, self.output = network.stages[0], network.layer
        self.boxes, self.precision = (y, x), precision
        self.readers = network.consumers()
        self.rects = {self.picture: Rects.fitted(list(y), list(x), self.picture.shape[1:])}
        self.steps: list[_Step] = []
        planned = {self.picture}
        for stage in network.stages:
            if stage not in planned:
                self.steps.append(self.plan(stage))
                planned |= {stage, *self.fused(stage)}
        self.in_place = any(step.run is Sweep.change_boxes for step in self.steps)  # the pictures' changes are not laid out
        self.kept = {self.output, *(source for step in self.steps for source in step.clean)}
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

    def fused(self, stage: Stage) -> list[Stage]:
        """What follows a product and is done with it: factors, and then perhaps a rectifier."""
        chain: list[Stage] = []
        last = stage
        while stage.kind == "conv" or "matrix" in stage.options:
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
        if stage.kind == "conv" or "matrix" in options:
            return self.plan_product(stage)
        source = stage.inputs[0]
        below = self.rects[source]
        run, clean, own, factor = Sweep.change_any, (*stage.inputs, stage), None, None
        if stage.kind == "relu":
            run, clean, own = Sweep.change_relu, (source,), below
        elif stage.kind == "lrn":
            run, clean, own = Sweep.change_lrn, (source, stage), below
        elif stage.kind in ("batch_norm", "scale"):
            run, clean, own, factor = Sweep.change_scale, (), below, self.factor(stage)
        elif stage.kind == "identity" or self.stays_patch(stage):
            run, clean, own = Sweep.change_nothing, (), below
        elif stage.kind == "max_pool":
            run, clean = Sweep.change_max_pool, (source, stage)
            own = below.reached(stage.window, stage.shape[1:])
        elif stage.kind == "avg_pool":
            run, clean, own = Sweep.change_avg_pool, (), below.reached(stage.window, stage.shape[1:])
        elif stage.kind == "pad":
            run, clean, own = Sweep.change_pad, (), below.reached(stage.window, stage.shape[1:])
        elif stage.kind in ("add", "cat"):
            run, clean = Sweep.change_add if stage.kind == "add" else Sweep.change_cat, ()
            spans = [[self.rects[s].spans(axis) for s in stage.inputs] for axis in (0, 1)]
            joined = [[(min(b for b, _ in at), max(e for _, e in at)) for at in zip(*axis)] for axis in spans]
            own = Rects.fitted(*joined, _size(stage))
        elif options.get("mean"):
            run, clean = Sweep.change_mean, ()
        self.rects[stage] = own or below.whole(_size(stage))
        return _Step(stage, list(stage.inputs), run, clean, factor=factor)

    def stays_patch(self, stage: Stage) -> bool:
        """Whether a map that is laid out in a row may stay a patch: full layers read it, as filters of its size."""
        return (
            bool(stage.options.get("flat"))
            and len(stage.inputs[0].shape) == 3
            and stage not in (self.output, self.feature)
            and all("matrix" in reader.options for reader in self.readers[stage])
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
        wide = -(-shape[0] // groups // LANES) * LANES * groups  # outputs, in whole blocks
        wide = shape[0] if is_depthwise(shape, groups) else wide
        alone = source is self.picture is not self.feature and len(self.readers[source]) == 1
        return _Step(
            result,
            [source],
            Sweep.change_boxes if stage.kind == "conv" and alone else Sweep.change_product,
            (before,) if before else (),
            macs=pairs * shape[1] * wide,
            plain=below.whole(map).pairs(window, above) * shape[1] * shape[0],
            before=before,
            filters=delta_filters(weight, scale, shape, groups, self.precision),
            convolution=ConvChange(window, groups, tuple(map), tuple(above), _limits(rectifier)),
        )

    @property
    def macs(self) -> float:
        """Counted multiply-adds of a position; `plain_macs`: of a whole forward."""
        return sum(step.macs for step in self.steps)

    @property
    def plain_macs(self) -> float:
        return sum(step.plain for step in self.steps)

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
        last[self.output] = len(self.steps)
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

    def up(self, images: Tensor) -> dict[Stage, Tensor]:
        """The clean maps that the steps read, the output and the feature's, channels last; what is no map as maps of one pixel."""
        kept: dict[Stage, Tensor] = {}

        def keep(stage: Stage, value: Tensor) -> Tensor:
            if stage in self.kept:
                shaped = value if value.dim() == 4 else value.reshape(len(value), -1, 1, 1)
                kept[stage] = shaped.contiguous(memory_format=torch.channels_last)
            return value

        keep(self.picture, images)
        self.network.forward(images, lambda stage, inputs: keep(stage, stage.run(*inputs)))
        return kept

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
            size = -(-len(index) // -(-len(index) // size))  # batches of near-equal sizes
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
            if covered is None:
                batch.changes[self.picture] = self.painted(images, fill, batch)
            feature = batch.changes[self.picture].clone() if self.feature is self.picture else None
            for step in self.steps:
                change = batch.changes[step.result] = step.run(self, step, batch)
                if step.result is self.feature:
                    feature = change.clone()
            output = self.changed(self.output, batch).contiguous()
            if feature is not None and len(self.feature.shape) != 3:
                feature = feature.reshape(len(own), *self.feature.shape)
            yield own, output.reshape(len(own), *self.output.shape), feature

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

    def change_mean(self, step: _Step, batch: _Batch) -> Tensor:
        source, out = step.sources[0], self.result(step, batch)
        return torch.sum(batch.changes[source], (2, 3), keepdim=True, out=out).div_(math.prod(source.shape[1:]))

    def changed(self, source: Stage, batch: _Batch) -> Tensor:
        """A stage's whole maps, with their changes."""
        whole = batch.maps[source][batch.image]
        return whole + cut(batch.changes[source], batch.each, -batch.origin(self.rects[source]), whole.shape[2:])

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
        out = self.result(step, batch)
        result = step.result.run(*inputs).reshape(out.shape)
        return torch.sub(result, batch.maps[step.result][batch.image], out=out)


def _tiled(rows: int, columns: int) -> Tensor:
    """The positions of a grid, tile after tile."""
    row, column = (axis.reshape(-1) for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    key = (row // TILE[0] * columns + column // TILE[1]) * math.prod(TILE) + row % TILE[0] * TILE[1] + column % TILE[1]
    return key.argsort()


def _size(stage: Stage) -> Pair:
    """Of its maps; what is no map travels as maps of one pixel."""
    return tuple(stage.shape[1:]) if len(stage.shape) == 3 else (1, 1)


def _limits(stage: Stage | None) -> Limits:
    if stage is None:
        return Limits()
    rectifier = stage.options["rectifier"]
    return Limits(rectifier.slope, rectifier.upper)
