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

from zfcore.engine.patches import _Buffers
from zfcore.network import Network, Stage, Window
from zfcore.ops._library import runs_on
from zfcore.ops.conv_delta import ConvChange, DeltaFilters, conv_delta, delta_filters
from zfcore.ops.lrn_delta import lrn_delta
from zfcore.ops.paste_boxes import paste_boxes
from zfcore.ops.pool_delta import pool_delta
from zfcore.ops.relu_delta import relu_delta
from zfcore.reference._params import Limits, Lrn, Places
from zfcore.reference.deconv_step import cut

Pair = tuple[int, int]

CLEAN_BYTES = 512 * 2**20  # of the clean maps of one batch of images
CHANGE_BYTES = 256 * 2**20  # of the changes of one batch of positions
MOST_POSITIONS = 1024  # of a batch, which shares one reading of the filters
LANES = 16  # outputs that conv_delta works out at once
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

    result: the stage whose change it gives. sources: those whose changes it reads. run: the Sweep's method.
    clean: the stages whose clean maps it reads. macs: its multiply-adds a position, counted as if all inside a
    patch changed; plain: those of the whole map.
    """

    result: Stage
    sources: list[Stage]
    run: Callable[[_Step, _Batch], Tensor]
    clean: tuple[Stage, ...] = ()
    macs: float = 0.0
    plain: float = 0.0
    before: Stage | None = None  # what the rectifier reads that is done with a convolution
    filters: DeltaFilters | None = None
    convolution: ConvChange | None = None


class _Batch:
    """Some positions: the image (within the image batch), the row and the column of the grid of each, [B]."""

    def __init__(self, image: Tensor, row: Tensor, column: Tensor, maps: dict[Stage, Tensor], starts: dict):
        self.image, self.row, self.column, self.maps, self.starts = image, row, column, maps, starts
        self.each = torch.arange(len(image), device=image.device)
        self.changes: dict[Stage, Tensor] = {}

    def origin(self, rects: Rects) -> Tensor:
        """Where each position's rectangle begins, [B, 2]."""
        if rects not in self.starts:  # kept: on a GPU each would be a copy to wait for
            self.starts[rects] = tuple(torch.tensor(axis, device=self.image.device) for axis in rects[:2])
        y, x = self.starts[rects]
        return torch.stack((y[self.row], x[self.column]), 1)

    def places(self, before: Rects, after: Rects) -> Places:
        return Places(self.image, self.origin(before), self.origin(after), after.size)


class Sweep:
    """A network made ready for one grid of boxes.

    network: read up to its output. feature: a stage of it whose changes are asked for, or None. y, x: the boxes' spans
    [begin, end) in pixels. dtype: float32 or float64. device: of the network and the images.
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
    ):
        self.network, self.feature, self.dtype, self.device = network, feature, dtype, device
        self.picture, self.output = network.stages[0], network.layer
        self.boxes = y, x
        self.readers = network.consumers()
        self.buffers = _Buffers(dtype, device)
        self.rects = {self.picture: Rects.fitted(list(y), list(x), self.picture.shape[1:])}
        self.steps: list[_Step] = []
        planned = {self.picture}
        for stage in network.stages:
            if stage not in planned:
                self.steps.append(self.plan(stage))
                planned |= {stage, *self.fused(stage)}
        self.kept = {self.output, *(source for step in self.steps for source in step.clean)}
        if feature is not None:
            self.kept.add(feature)
        self.order = _tiled(len(y), len(x)).to(device)
        self.spans = tuple(torch.tensor(axis, device=device).reshape(-1, 2) for axis in self.boxes)
        self.starts: dict[Rects, tuple[Tensor, Tensor]] = {}
        self.batch_size = batch_size or max(1, min(MOST_POSITIONS, CHANGE_BYTES // self.change_bytes()))

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
        run, clean, own = self.change_any, (*stage.inputs, stage), None
        if stage.kind == "relu":
            run, clean, own = self.change_relu, (source,), below
        elif stage.kind == "lrn":
            run, clean, own = self.change_lrn, (source, stage), below
        elif stage.kind in ("batch_norm", "scale"):
            run, clean, own = self.change_scale, (), below
        elif stage.kind == "identity" or self.stays_patch(stage):
            run, clean, own = self.change_nothing, (), below
        elif stage.kind == "max_pool":
            run, clean = self.change_max_pool, (source, stage)
            own = below.reached(stage.window, stage.shape[1:])
        elif stage.kind == "avg_pool":
            run, clean, own = self.change_avg_pool, (), below.reached(stage.window, stage.shape[1:])
        elif stage.kind == "pad":
            run, clean, own = self.change_pad, (), below.reached(stage.window, stage.shape[1:])
        elif stage.kind in ("add", "cat"):
            run, clean = self.change_add if stage.kind == "add" else self.change_cat, ()
            spans = [[self.rects[s].spans(axis) for s in stage.inputs] for axis in (0, 1)]
            joined = [[(min(b for b, _ in at), max(e for _, e in at)) for at in zip(*axis)] for axis in spans]
            own = Rects.fitted(*joined, stage.shape[1:])
        elif options.get("mean"):
            run, clean = self.change_mean, ()
        self.rects[stage] = own or below.whole(stage.shape[1:] if len(stage.shape) == 3 else (1, 1))
        return _Step(stage, list(stage.inputs), run, clean)

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
            weight, window, groups, map, above = options["weight"](), stage.window, options["groups"], *_sizes(stage)
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
        self.rects[result] = self.rects[stage] = self.rects[source].reached(window, above)
        pairs = self.rects[source].pairs(window, above)
        wide = -(-shape[0] // groups // LANES) * LANES * groups  # outputs, in whole blocks
        return _Step(
            result,
            [source],
            self.change_product,
            (before,) if before else (),
            macs=pairs * shape[1] * wide,
            plain=math.prod(above) * math.prod(shape),
            before=before,
            filters=delta_filters(weight, scale, shape, groups),
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
        return all(step.filters is None or step.filters.finite for step in self.steps)

    def change_bytes(self) -> int:
        """What the changes of one position take, at most, while a step runs."""
        live, most = {self.picture}, 0
        for at, step in enumerate(self.steps):
            live.add(step.result)
            most = max(most, sum(math.prod(self.rects[s].size) * self.channels(s) for s in live))
            waiting = {s for later in self.steps[at + 1 :] for s in later.sources}
            live = {s for s in live if s in waiting or s is self.output}
        return most * self.dtype.itemsize

    def channels(self, stage: Stage) -> int:
        return stage.inputs[0].shape[0] if self.stays_patch(stage) else stage.shape[0]

    # -- the way up

    def image_batches(self, count: int) -> Iterator[tuple[int, int]]:
        """Image batches [begin, end): as many as their clean maps leave room for, and not more than fill a batch."""
        size = sum(math.prod(stage.shape) for stage in self.kept) * self.dtype.itemsize
        step = max(1, min(CLEAN_BYTES // max(size, 1), -(-self.batch_size // len(self.order))))
        for begin in range(0, count, step):
            yield begin, min(begin + step, count)

    def up(self, images: Tensor) -> dict[Stage, Tensor]:
        """The clean maps that the steps read, the output and the feature's, channels last; features as 1 x 1 maps."""
        values: dict[Stage, Tensor] = {}
        kept: dict[Stage, Tensor] = {}
        waiting = {stage: len(readers) for stage, readers in self.readers.items()}
        for stage in self.network.stages:
            inputs = [values[source] for source in stage.inputs]
            values[stage] = value = stage.run(*inputs) if inputs else images
            if stage in self.kept:
                shaped = value if value.dim() == 4 else value.reshape(*value.shape[:2], 1, 1)
                kept[stage] = shaped.contiguous(memory_format=torch.channels_last)
            for source in stage.inputs:
                waiting[source] -= 1
                if not waiting[source]:
                    del values[source]
        return kept

    def run(
        self, images: Tensor, fill: Tensor, maps: dict[Stage, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
        """All positions of the images, batch by batch.

        images, fill: [n, C, H, W]. maps: of `up`. Yields the positions' places among n * Gy * Gx [B], the network's
        output for them, the feature's changes [B, C, h, w] and the images that each is of [B].
        """
        per_image, columns = len(self.order), len(self.boxes[1])
        every = (torch.arange(len(images), device=self.device)[:, None] * per_image + self.order).reshape(-1)
        for index in every.split(self.batch_size):
            position = index % per_image
            batch = _Batch(index // per_image, position // columns, position % columns, maps, self.starts)
            batch.changes[self.picture] = self.painted(images, fill, batch)
            feature = batch.changes[self.picture].clone() if self.feature is self.picture else None
            for at, step in enumerate(self.steps):
                change = step.run(step, batch)
                batch.changes[step.result] = change
                if step.result is self.feature:
                    feature = change.clone()
                self.drop(batch, at)
            output = maps[self.output][batch.image] + batch.changes[self.output]
            yield index, output.reshape(len(index), *self.output.shape), feature, batch.image
            self.buffers.give_all_back()

    def drop(self, batch: _Batch, at: int) -> None:
        """Gives back the memory of the changes that no later step reads."""
        waiting = {s for later in self.steps[at + 1 :] for s in later.sources} | {self.output}
        alive = {id(change) for s, change in batch.changes.items() if s in waiting}
        for stage in [s for s in batch.changes if s not in waiting]:
            change = batch.changes.pop(stage)
            if change in self.buffers and id(change) not in alive:
                self.buffers.give_back(change)

    def painted(self, images: Tensor, fill: Tensor, batch: _Batch) -> Tensor:
        """What the boxes change the pictures by."""
        rects = self.rects[self.picture]
        origin = batch.origin(rects)
        (y0, y1), (x0, x1) = (spans[at].unbind(1) for spans, at in zip(self.spans, (batch.row, batch.column)))
        out = self.buffers.take(len(batch.image), images.size(1), *rects.size)
        places = Places(batch.image, origin, origin, rects.size)
        return paste_boxes(images, fill, torch.stack((y0, x0, y1, x1), 1), places, out)

    # -- the steps

    def pair(self, pair: Pair) -> Tensor:
        return torch.tensor(pair, device=self.device)

    def factor(self, stage: Stage) -> Tensor:
        """What batch normalisation, or a constant, multiplies by: [C, 1, 1], or one number."""
        if stage.kind == "batch_norm":
            return stage.options["scale"]()[:, None, None].to(self.dtype)
        return torch.as_tensor(stage.options["factor"], dtype=self.dtype, device=self.device)

    def memory(self, step: _Step, batch: _Batch) -> Tensor:
        return self.buffers.take(len(batch.image), self.channels(step.result), *self.rects[step.result].size)

    def places(self, step: _Step, batch: _Batch) -> Places:
        return batch.places(self.rects[step.sources[0]], self.rects[step.result])

    def change_product(self, step: _Step, batch: _Batch) -> Tensor:
        clean = batch.maps[step.before] if step.before else None
        change, out = batch.changes[step.sources[0]], self.memory(step, batch)
        return conv_delta(change, step.filters, step.convolution, self.places(step, batch), clean, out)

    def change_relu(self, step: _Step, batch: _Batch) -> Tensor:
        source, out = step.sources[0], self.memory(step, batch)
        return relu_delta(
            batch.changes[source], batch.maps[source], _limits(step.result), self.places(step, batch), out
        )

    def change_lrn(self, step: _Step, batch: _Batch) -> Tensor:
        source, out, lrn = step.sources[0], self.memory(step, batch), Lrn(*step.result.options["lrn"])
        before, after = batch.maps[source], batch.maps[step.result]
        return lrn_delta(batch.changes[source], before, after, lrn, self.places(step, batch), out)

    def change_max_pool(self, step: _Step, batch: _Batch) -> Tensor:
        source, out = step.sources[0], self.memory(step, batch)
        before, after = batch.maps[source], batch.maps[step.result]
        return pool_delta(
            batch.changes[source], before, after, step.result.window, self.places(step, batch), out
        )

    def change_scale(self, step: _Step, batch: _Batch) -> Tensor:
        factor = self.factor(step.result)
        return torch.mul(batch.changes[step.sources[0]], factor, out=self.memory(step, batch))

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
        return torch.mul(total, share, out=self.memory(step, batch))

    def change_mean(self, step: _Step, batch: _Batch) -> Tensor:
        source, out = step.sources[0], self.memory(step, batch)
        return torch.sum(batch.changes[source], (2, 3), keepdim=True, out=out).div_(math.prod(source.shape[1:]))

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
        return torch.add(*parts, out=self.memory(step, batch))

    def change_cat(self, step: _Step, batch: _Batch) -> Tensor:
        parts = [self.moved(source, step, batch) for source in step.sources]
        return torch.cat(parts, 1, out=self.memory(step, batch))

    def change_any(self, step: _Step, batch: _Batch) -> Tensor:
        """Any operation, on whole maps."""
        inputs = []
        for source in step.sources:
            change, rects = batch.changes[source], self.rects[source]
            whole = batch.maps[source][batch.image]
            whole += cut(change, batch.each, -batch.origin(rects), whole.shape[2:])
            inputs.append(whole.reshape(len(whole), *source.shape))
        out = self.memory(step, batch)
        result = step.result.run(*inputs).reshape(out.shape)
        return torch.sub(result, batch.maps[step.result][batch.image], out=out)


def _tiled(rows: int, columns: int) -> Tensor:
    """The positions of a grid, tile after tile."""
    row, column = (axis.reshape(-1) for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    key = (row // TILE[0] * columns + column // TILE[1]) * math.prod(TILE) + row % TILE[0] * TILE[1] + column % TILE[1]
    return key.argsort()


def _sizes(stage: Stage) -> tuple[Pair, Pair]:
    return tuple(stage.inputs[0].shape[1:]), tuple(stage.shape[1:])


def _limits(stage: Stage | None) -> Limits:
    if stage is None:
        return Limits()
    rectifier = stage.options["rectifier"]
    return Limits(rectifier.slope, rectifier.upper)
