"""The engine of the deconvnet: patches of the receptive field, whole maps where a patch would be one.

One clean forward per image batch, only to the layer asked for, keeps the switches of its pools. The way down
is then batched over seeds, a seed being one (image, unit, position). All seeds of a layer see fields of one
size, so the signal is carried as patches, one a seed, as long as a patch is smaller than its map, and as
whole maps from there on.

Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zfcore.engine.buffers import Buffers
from zfcore.engine.gradients import Gradient, derivative, is_linear, linear_down, reduced
from zfcore.engine.job import Job, scratch_bytes
from zfcore.engine.numbers import numbers
from zfcore.network import Field, Network, Stage, scale_of
from zfcore.ops import max_pool2d_with_switches, pool_gather2d, unpool2d
from zfcore.ops.deconv_step import deconv_step
from zfcore.reference._params import StepParams
from zfcore.reference.deconv_step import cut, inside

TOGETHER_BYTES = 8 * 2**20  # the signals of a stage, of as many seeds as go on from it together
FLAT = frozenset(("sign", "sgn", "floor", "ceil", "round", "trunc"))  # functions that no gradient passes
FORWARD_BYTES = 256 * 2**20  # likewise the maps of one batch of images on the way up


class _Seeds:
    """A batch of seeds: image (within the image batch), unit, position and value of each.

    runs: the images in turn, each with the seeds that it has, which are neighbours.
    """

    def __init__(self, image: Tensor, unit: Tensor, position: Tensor, value: Tensor, runs: list[tuple[int, slice]]):
        self.image, self.unit, self.position, self.value = image, unit, position, value
        self.runs = runs

    def __len__(self) -> int:
        return len(self.value)

    def part(self, rows: slice) -> _Seeds:
        own = ((i, max(run.start, rows.start), min(run.stop, rows.stop)) for i, run in self.runs)
        runs = [(i, slice(begin - rows.start, end - rows.start)) for i, begin, end in own if begin < end]
        return _Seeds(self.image[rows], self.unit[rows], self.position[rows], self.value[rows], runs)

    def origin(self, field: Field) -> Tensor:
        """Where each seed's patch begins, [B, 2], in the map that `field` is about."""
        device = self.position.device
        return self.position * numbers(field.jump, device) + numbers(field.offset, device)


@dataclass(frozen=True)
class _Chain:
    """Stages that one `deconv_step` undoes: a pool and a rectifier, where there are any, above a convolution.

    scales: what multiplies the signal between the rectifier and the convolution's filters.
    """

    conv: Stage
    pool: Stage | None
    relu: Stage | None
    scales: tuple[Stage, ...]

    def scale(self, signal: Tensor) -> Tensor | None:
        """[K], or None for one, where and in what the signal is."""
        if not self.scales:
            return None
        total = signal.new_ones(self.conv.shape[0])
        for stage in self.scales:
            scale = scale_of(stage)
            total = total * (scale.to(signal.dtype).flatten() if isinstance(scale, Tensor) else scale)
        return total


class Engine:
    """The way up once an image batch, and the way down for batches of seeds."""

    def __init__(self, job: Job, network: Network):
        self.job, self.network = job, network
        self.consumers = network.consumers()
        self.layer_shape = network.layer.shape
        self.layer_dtype = job.dtype
        self.buffers = Buffers(job.dtype, job.device)
        self.held: list[Tensor] = []  # signals of whole batches, some seeds of which are on their way down
        self.seen: dict[Stage, Field | None] = {}  # what a seed sees of each map; None: everything
        self.patch: dict[Stage, Field | None] = {}  # the patch that carries it; None: a whole map
        self.plan_fields()
        self.chains = {stage: self.chain(stage) for stage in network.stages}
        seen = self.seen[network.stages[0]]
        size = seen.size if job.crop and seen is not None else job.images.shape[-2:]
        self.picture_shape = (job.images.shape[1], *size)

    def plan_fields(self) -> None:
        layer = self.network.layer
        local = not isinstance(self.job.positions, str) or self.job.positions != "all"
        self.seen[layer] = self.patch[layer] = (
            Field() if layer.kind != "map" and len(layer.shape) == 3 and local else None
        )
        for stage in reversed(self.network.stages[:-1]):
            fields = [self.below(self.seen[reader], reader, stage) for reader in self.consumers[stage]]
            union = fields[0]
            for other in fields[1:]:
                union = union and other and union.union(other)
            self.seen[stage] = union
            carried = all(self.patch[r] is not None for r in self.consumers[stage])
            fits = union is not None and len(stage.shape) == 3
            small = fits and (union.size[0] < stage.shape[1] or union.size[1] < stage.shape[2])
            self.patch[stage] = union if carried and small and stage.kind != "map" else None

    def chain(self, stage: Stage) -> _Chain | None:
        """What can be undone at once from this stage down, or None."""
        pool = relu = None
        scales: list[Stage] = []
        top = stage
        while True:
            if stage is not top and len(self.consumers[stage]) > 1:
                return None  # what comes down here comes from elsewhere, too
            if stage.kind == "conv":
                # Depthwise filters have a kernel of their own, which reads no switches.
                return None if pool and _is_depthwise(stage) else _Chain(stage, pool, relu, tuple(scales))
            if stage.kind == "max_pool" and stage is top:
                pool = stage
            elif stage.kind == "relu" and not relu and not scales and stage.options["rectifier"].by_rule_alone:
                relu = stage
            elif stage.kind in ("batch_norm", "scale"):
                scales.append(stage)
            elif stage.kind not in ("identity", "lrn"):
                return None
            stage = stage.inputs[0]

    @staticmethod
    def below(field: Field | None, reader: Stage, source: Stage) -> Field | None:
        if field is None or reader.kind == "map" or _is_spread(source, reader):
            return None
        return field.through(reader.window) if reader.window is not None else field

    def rule_of(self, relu: Stage) -> str:
        """What a rectifier does to the signal; to one that has nothing to rectify the rules do not apply."""
        return "gradient" if relu.options["rectifier"].idle else self.job.rule

    # -- the way up

    def image_batches(self) -> Iterator[tuple[int, int]]:
        item = torch.finfo(self.job.dtype).bits // 8
        largest = max(torch.Size(stage.shape).numel() for stage in self.network.stages)
        step = max(1, min(64, FORWARD_BYTES // ((4 * largest + sum(map(_kept, self.network.stages))) * item)))
        for begin in range(0, len(self.job.images), step):
            yield begin, min(begin + step, len(self.job.images))

    def up(self, images: Tensor) -> tuple[Tensor, dict]:
        """The layer's activations, and for each stage what its way down needs."""
        kept: dict = {}

        def compute(stage: Stage, inputs: list[Tensor]) -> Tensor:
            if stage.kind == "max_pool":
                w = stage.window
                value, switches = max_pool2d_with_switches(
                    inputs[0], w.kernel, w.stride, w.padding, w.dilation, stage.options["ceil_mode"]
                )
                kept[stage] = self.keep_switches(stage, switches)
                return value
            if stage.kind == "pointwise":
                value, slope = derivative(stage.options["function"], inputs[0])
                kept[stage] = _channels_last(slope)
                return value
            if stage.kind == "product":
                kept[stage] = list(map(_channels_last, inputs))
            elif stage.kind == "map" and not is_linear(stage):
                kept[stage] = Gradient(stage.run, inputs)
            elif stage.kind == "relu" and self.rule_of(stage) != "deconvnet":
                kept[stage] = _channels_last(stage.options["rectifier"].derivative(inputs[0]))
            elif stage.kind == "avg_pool" and callable(stage.options["share"]):
                kept[stage] = stage.options["share"](inputs[0])
            return stage.run(*inputs)

        return self.network.forward(images, compute), kept

    def reads_picture(self) -> bool:
        """Whether the layer is a convolution of the images whose strongest positions are all that is asked for.

        Its maps need not be made then.
        """
        job, layer = self.job, self.network.layer
        if layer.kind != "conv" or layer.inputs[0].kind != "input" or layer.options["groups"] != 1:
            return False
        if not isinstance(job.positions, str) or job.positions != "max":
            return False
        read = (job.images, layer.options["weight"](), layer.options["bias"]())
        return all(x is None or _is_plain(x) for x in read)

    def keep_switches(self, stage: Stage, switches: Tensor) -> tuple[Tensor, Tensor | None]:
        """Switches, channels last; and with overlap="last", where no `deconv_step` sees to it, which windows
        keep their place to themselves.
        """
        winners = None
        if self.job.overlap == "last" and self.chains[stage] is None:
            w = stage.window
            ones = torch.ones((len(switches), *stage.inputs[0].shape), device=switches.device)
            winners = (
                pool_gather2d(ones, switches, w.kernel, w.stride, w.padding, w.dilation, overlap="last") > 0
            )
        return switches.contiguous(memory_format=torch.channels_last), winners

    # -- the way down

    def seeds_at_once(self) -> int:
        if self.job.batch_size is not None:
            return self.job.batch_size
        item = torch.finfo(self.job.dtype).bits // 8
        sizes, held = [], {self.network.layer}  # the stages whose signals are ever in memory
        for stage in reversed(self.network.stages):
            if stage not in held:
                continue
            chain = self.chains[stage]
            held.update(stage.inputs if chain is None else (chain.conv.inputs[0],))
            sizes.append(self.values(stage))
        sizes.append(torch.Size(self.picture_shape).numel())
        return max(1, min(4096, scratch_bytes(self.job.device) // (3 * max(sizes) * item)))

    def seeds_together(self, stage: Stage) -> int:
        """How many seeds go down from here together: filters serve many small maps, but large ones leave the cache."""
        if self.job.device.type != "cpu":
            return len(self.job.images) * len(self.job.units)
        item = torch.finfo(self.job.dtype).bits // 8
        chain = self.chains[stage]
        largest = max(self.values(s) for s in (stage, *(stage if chain is None else chain.conv).inputs))
        return max(1, TOGETHER_BYTES // (largest * item))

    def values(self, stage: Stage) -> int:
        """How many numbers a seed's signal at the stage is."""
        field = self.patch[stage]
        return stage.shape[0] * field.size[0] * field.size[1] if field else torch.Size(stage.shape).numel()

    def run(self, begin: int, end: int, pixels: Tensor | None) -> Iterator[dict[str, Tensor]]:
        job = self.job
        images = job.images[begin:end]
        if self.reads_picture():
            conv, kept = self.network.layer, {}
            weight, bias = conv.options["weight"](), conv.options["bias"]()
            positions, seeds, reported = job.locate_in_conv(images, weight, bias, conv.window)
        else:
            activations, kept = self.up(images)
            if activations.dim() == 2:
                activations = activations[:, :, None, None]
            positions, seeds, reported = job.locate(activations, begin)
        n, u = reported.shape
        image = torch.arange(n, device=job.device).repeat_interleave(u)
        unit = job.here(job.units).repeat(n)
        position, value = positions.reshape(-1, 2), seeds.reshape(-1)
        step = self.seeds_at_once()
        for first in range(0, n * u, step):
            part = slice(first, min(first + step, n * u))
            runs = [
                (i, slice(max(0, i * u - first), min((i + 1) * u, part.stop) - first))
                for i in range(first // u, (part.stop - 1) // u + 1)
            ]
            batch = _Seeds(image[part], unit[part], position[part], value[part], runs)
            maps = None
            if job.positions == "all":
                maps = job.seed_maps(activations[batch.image, batch.unit])
            if pixels is None:
                own = torch.empty((len(batch), *self.picture_shape), dtype=job.dtype, device=job.device)
            else:
                own = pixels[part]
            self.down(batch, kept, maps, own)
            yield {
                "pixels": own,
                "boxes": self.boxes(batch),
                "activations": reported.reshape(-1)[part].clone(),
                "positions": position[part],
                "images": batch.image + begin,
                "units": batch.unit,
            }

    def boxes(self, seeds: _Seeds) -> Tensor:
        field = self.seen[self.network.stages[0]]
        height, width = self.job.images.shape[-2:]
        if field is None:
            return numbers((0, 0, height, width), self.job.device).repeat(len(seeds), 1)
        start = seeds.origin(field)
        return torch.cat((start, start + numbers(field.size, start.device)), 1)

    def down(self, seeds: _Seeds, kept: dict, maps: Tensor | None, pixels: Tensor) -> None:
        """Fills pixels [B, C, H, W], or [B, C, h, w] with crop=True, of the seeds."""
        signals = {self.network.layer: self.start(seeds, maps)}
        self.carry(len(self.network.stages) - 1, signals, seeds, kept, pixels)
        self.buffers.give_all_back()

    def carry(self, top: int, signals: dict, seeds: _Seeds, kept: dict, pixels: Tensor) -> None:
        """The signals that wait at the stages up to `top` taken down into the pixels."""
        for index in range(top, 0, -1):
            stage = self.network.stages[index]
            if stage not in signals:
                continue
            together = self.seeds_together(stage)
            if together < len(seeds):
                self.held += signals.values()
                for first in range(0, len(seeds), together):
                    rows = slice(first, min(first + together, len(seeds)))
                    own = {stage: signal[rows] for stage, signal in signals.items()}
                    self.carry(index, own, seeds.part(rows), kept, pixels[rows])
                del self.held[len(self.held) - len(signals) :]
                while signals:
                    self.drop(signals.popitem()[1], signals)
                return
            signal = signals.pop(stage)
            self.undo(stage, signal, seeds, kept, signals, pixels)
            self.drop(signal, signals)
        self.finish(signals, seeds, pixels)

    def finish(self, signals: dict, seeds: _Seeds, pixels: Tensor) -> None:
        """What has come down to the picture, as whole pictures or as boxes."""
        picture = self.network.stages[0]
        waiting = signals.pop(picture)
        signal, field, seen = waiting, self.patch[picture], self.seen[picture]
        if signal is not pixels:
            if field is not None and not self.job.crop:
                signal = self.whole(picture, signal, field, seeds)
            elif field is None and self.job.crop and seen is not None:
                each = torch.arange(len(seeds), device=signal.device)
                signal = cut(signal, each, seeds.origin(seen), seen.size)
            pixels.copy_(signal)
        self.drop(waiting, signals)

    def start(self, seeds: _Seeds, maps: Tensor | None) -> Tensor:
        """The signal at the layer: each seed in an otherwise empty map, or a patch of one position."""
        stage, value = self.network.layer, seeds.value
        rows = torch.arange(len(seeds), device=value.device)
        if self.patch[stage] is not None:
            signal = value.new_zeros((len(seeds), stage.shape[0], 1, 1))
            signal[rows, seeds.unit, 0, 0] = value
            return signal
        # Features, whole maps, or what needs them below.
        signal = self.buffers.take((len(seeds), *stage.shape)).zero_()
        if maps is not None:
            signal[rows, seeds.unit] = maps if signal.dim() == 4 else maps[:, 0, 0]
        elif signal.dim() == 4:
            signal[rows, seeds.unit, seeds.position[:, 0], seeds.position[:, 1]] = value
        else:
            signal[rows, seeds.unit] = value
        return signal

    def clip(self, stage: Stage, signal: Tensor, seeds: _Seeds) -> Tensor:
        """Drops what a patch brought to places outside its map, which are no units of the layer."""
        field = self.patch[stage]
        origin, (height, width) = seeds.origin(field), stage.shape[-2:]
        if origin.device.type == "cpu":  # elsewhere the least and the largest would have to be waited for
            low, high = origin.amin(0).tolist(), origin.amax(0).tolist()
            h, w = field.size
            if low[0] >= 0 and low[1] >= 0 and high[0] + h <= height and high[1] + w <= width:
                return signal
        return signal.masked_fill(~inside(origin, field.size, (height, width)), 0)

    @staticmethod
    def whole(stage: Stage, signal: Tensor, field: Field, seeds: _Seeds) -> Tensor:
        """Patches of `field` put into whole maps of the stage."""
        each = torch.arange(len(seeds), device=signal.device)
        return cut(signal, each, -seeds.origin(field), stage.shape[-2:])

    @staticmethod
    def own(maps: Tensor, field: Field | None, seeds: _Seeds) -> Tensor:
        """Each seed's part of the maps of its image: its patch, or with no field the whole map."""
        if field is not None:
            return cut(maps, seeds.image, seeds.origin(field), field.size)
        if len(seeds.runs) == 1:  # of one image: nothing is copied
            return maps[seeds.runs[0][0]].expand(len(seeds), *maps.shape[1:])
        return maps[seeds.image]

    def send(
        self, target: Stage, signal: Tensor, field: Field | None, seeds: _Seeds, signals: dict, fresh: bool = False
    ) -> None:
        """Adds what came down on one way to the target's signal.

        field: the patch that `signal` is, or None. fresh: it is zero outside its map already.
        """
        own = self.patch[target]
        if field is not None and own is None:
            signal = self.whole(target, signal, field, seeds)
        elif field is not None:
            if field != own:  # another way down has a larger field: this patch lies inside the union
                before = [a - b for a, b in zip(field.offset, own.offset)]
                after = [n - b - m for n, b, m in zip(own.size, before, field.size)]
                signal = F.pad(signal, (before[1], after[1], before[0], after[0]))
            signal = signal if fresh else self.clip(target, signal, seeds)
        waiting = signals.pop(target, None)
        if waiting is not None:
            if self.owns(signal, (*signals.values(), waiting)):
                signal, waiting = waiting, signal
            total = torch.add(waiting, signal, out=self.memory(waiting, signals))
            signals[target] = total
            self.drop(waiting, signals)
            signal = total
        signals[target] = signal

    def owns(self, signal: Tensor, signals: dict | tuple) -> bool:
        """Whether the signal lies in the engine's own memory, and nothing that still waits lies there too."""
        others = signals.values() if isinstance(signals, dict) else signals
        return self.buffers.only(signal, (*others, *self.held))

    def drop(self, signal: Tensor, signals: dict) -> None:
        """Nobody reads this signal any more."""
        if self.owns(signal, signals):
            self.buffers.give_back(signal)

    def memory(self, signal: Tensor, signals: dict) -> Tensor:
        """Where what comes of a signal value by value is written: its own memory, if nothing else lies there."""
        return signal if self.owns(signal, signals) else self.buffers.take(tuple(signal.shape))

    def scaled(self, signal: Tensor, factor: Tensor | float, signals: dict) -> Tensor:
        """signal * factor, which broadcasts to it; a mask stops an infinity too."""
        if isinstance(factor, Tensor) and factor.dtype == torch.bool:
            return torch.where(factor, signal, signal.new_zeros(()), out=self.memory(signal, signals))
        return torch.mul(signal, factor, out=self.memory(signal, signals))

    def undo(
        self, stage: Stage, signal: Tensor, seeds: _Seeds, kept: dict, signals: dict, pixels: Tensor
    ) -> None:
        """One stage down, or several at once: from the signal at its output to those at its inputs."""
        field = self.patch[stage]
        chain = self.chains[stage]
        if chain is not None:
            self.step(stage, chain, signal, seeds, kept, signals, pixels)
            return
        if stage.kind == "map":
            self.undo_map(stage, signal, seeds, kept, signals)
            return
        if stage.kind == "product":
            self.undo_product(stage, signal, seeds, kept, signals)
            return
        if stage.kind in ("cat", "add"):
            signals[stage] = signal  # until all of them have it
            first = 0
            for source in stage.inputs:
                last = first + source.shape[0]
                self.send(source, signal[:, first:last] if stage.kind == "cat" else signal, field, seeds, signals)
                first = last
            del signals[stage]
            return
        source = stage.inputs[0]
        down = field and self.below(field, stage, source)
        if stage.kind == "max_pool":
            signal = self.unpool(stage, signal, seeds, kept)
        elif stage.kind == "relu":
            rule = self.rule_of(stage)
            if rule != "gradient":
                slope, signal = stage.options["rectifier"].slope, self.copied(signal, signals)
                signal = F.leaky_relu_(signal, slope) if slope else signal.relu_()
            if rule != "deconvnet":
                signal = self.scaled(signal, self.own(kept[stage], field, seeds), signals)
        elif stage.kind == "pointwise" and stage.options.get("jumps") in FLAT:
            signal = torch.zeros_like(signal)  # as autograd has it, also of what is no number
        elif stage.kind == "pointwise":
            signal = self.scaled(signal, self.own(kept[stage], field, seeds), signals)
        elif stage.kind == "channels":
            self.undo_channels(stage, signal, seeds, signals)
            return
        elif stage.kind == "avg_pool":
            share = kept.get(stage, stage.options["share"])
            if field and isinstance(share, Tensor):
                share = cut(share, torch.zeros_like(seeds.image), seeds.origin(field), field.size)
            signal = self.undo_mean(stage, self.scaled(signal, share, signals), down and down.size)
        elif stage.kind == "pad":
            signal = signal if field else _fit(signal, stage.window.padding, source.shape[1:])
        elif stage.kind in ("batch_norm", "scale"):
            scale = scale_of(stage)
            signal = self.scaled(signal, scale.to(signal.dtype) if isinstance(scale, Tensor) else scale, signals)
        self.send(source, signal, down, seeds, signals)

    def undo_mean(self, pool: Stage, signal: Tensor, patch: tuple[int, int] | None) -> Tensor:
        """Each value to every place of its window."""
        w, (windows_h, windows_w), size = pool.window, signal.shape[2:], patch or pool.inputs[0].shape[1:]
        reached = windows_h * w.kernel[0], windows_w * w.kernel[1]
        apart = w.kernel == w.stride and w.padding == (0, 0)
        if apart and reached[0] <= size[0] and reached[1] <= size[1]:
            below = self.buffers.take((*signal.shape[:2], *size))
            if reached != tuple(size):
                below.zero_()
            windows = below[:, :, : reached[0], : reached[1]].unflatten(3, (windows_w, w.kernel[1]))
            windows.unflatten(2, (windows_h, w.kernel[0])).copy_(signal[:, :, :, None, :, None])
            return below
        ones = signal.new_ones((pool.shape[0], 1, *w.kernel))
        full = F.conv_transpose2d(signal, ones, None, w.stride, 0, 0, pool.shape[0])
        return full if patch else _fit(full, w.padding, size)

    def undo_map(self, stage: Stage, signal: Tensor, seeds: _Seeds, kept: dict, signals: dict) -> None:
        if is_linear(stage):
            self.send(stage.inputs[0], linear_down(stage, signal), None, seeds, signals)
            return
        signals[stage] = signal  # until all of them have their own
        grads = kept[stage].down(signal, seeds.image, seeds.runs, self.buffers.take)
        for source, g in zip(stage.inputs, grads, strict=True):
            self.send(source, g, None, seeds, signals)
        del signals[stage]

    def undo_product(self, stage: Stage, signal: Tensor, seeds: _Seeds, kept: dict, signals: dict) -> None:
        """signal * b to a, and signal * a to b. What was broadcast gets the sum over where it was."""
        field = self.patch[stage]
        for i, source in enumerate(stage.inputs):
            other = kept[stage][1 - i]
            spread = other.shape[2:] != stage.shape[1:]  # a gate: its number is that of every patch
            factor = self.own(other, None if spread else field, seeds)
            if i == 0:
                signals[stage] = signal  # which the other one reads, too
            whole = self.scaled(signal, factor, signals)
            own = reduced(whole, source.shape)
            signals.pop(stage, None)
            self.send(source, own, field and self.below(field, stage, source), seeds, signals)
            self.drop(whole, signals)

    def undo_channels(self, stage: Stage, signal: Tensor, seeds: _Seeds, signals: dict) -> None:
        """Adds the signal to those channels of the input that the stage picked, zeros to the others."""
        source, field, index = stage.inputs[0], self.patch[stage], stage.options["index"]
        own = self.patch[source]
        waiting = signals.get(source)
        shape = (len(seeds), source.shape[0], *signal.shape[2:])
        if waiting is None or field != own:
            full = self.buffers.take(shape).zero_()
        elif self.owns(waiting, [other for stage, other in signals.items() if stage is not source] + [signal]):
            full = waiting
        else:
            full = self.buffers.take(shape).copy_(waiting)
            signals[source] = full
            self.drop(waiting, signals)
        count, first = len(index), int(index[0])
        if torch.equal(index, torch.arange(first, first + count)):
            full[:, first : first + count].add_(signal)
        else:
            full.index_add_(1, numbers(tuple(index.tolist()), signal.device), signal)
        if field == own:
            signals[source] = full
        else:
            self.send(source, full, field, seeds, signals)

    def copied(self, signal: Tensor, signals: dict) -> Tensor:
        """The signal in memory that may be written to."""
        own = self.memory(signal, signals)
        return own if own is signal else own.copy_(signal)

    def switches(self, pool: Stage, signal: Tensor, seeds: _Seeds, kept: dict) -> tuple[Tensor, Tensor]:
        """The signal and the switches of each seed.

        With overlap="last", what later windows overwrite is dropped from the signal.
        """
        field = self.patch[pool]
        switches, winners = kept[pool]
        if winners is not None:
            signal = signal.masked_fill(~self.own(winners, field, seeds), 0)
        return signal, self.own(switches, field, seeds)

    def unpool(self, pool: Stage, signal: Tensor, seeds: _Seeds, kept: dict) -> Tensor:
        field, w = self.patch[pool], pool.window
        signal, switches = self.switches(pool, signal, seeds, kept)
        if field is None:
            return unpool2d(
                signal, switches, w.kernel, w.stride, w.padding, w.dilation, pool.inputs[0].shape[1:]
            )
        # In a patch no window is clipped: the patch holds all that its windows can name.
        return unpool2d(signal, switches, w.kernel, w.stride, 0, w.dilation, field.through(w).size)

    def step(
        self,
        top: Stage,
        chain: _Chain,
        signal: Tensor,
        seeds: _Seeds,
        kept: dict,
        signals: dict,
        pixels: Tensor,
    ) -> None:
        """A chain down as one op, which never makes the unpooled map."""
        conv, source, field, rule = chain.conv, chain.conv.inputs[0], self.patch[top], self.job.rule
        picture = source.kind == "input" and source not in signals and len(self.consumers[source]) == 1
        own = self.patch[source]
        down = None
        if own is not None and not (picture and not self.job.crop):
            down = (field.through(chain.pool.window) if chain.pool else field).through(conv.window)
        params = StepParams(
            pool=chain.pool and chain.pool.window,
            conv=conv.window,
            groups=conv.options["groups"],
            map=tuple(conv.shape[1:]),
            below=tuple(source.shape[1:]),
            whole=down is None,
            rectify=chain.relu is not None and rule != "gradient",
            overlap=self.job.overlap,
        )
        frame = out = None
        if picture:  # straight into the pixels
            seen, out = self.seen[source], pixels
            if self.job.crop and down is None and seen is not None:
                frame = (seeds.origin(seen), seen.size)
        else:
            size = params.reach(tuple(signal.shape[2:]))[1]
            out = self.buffers.take((len(seeds), source.shape[0], *size))
        deconv_step(
            signal,
            conv.options["weight"](),
            params,
            seeds.image,
            seeds.origin(field) if field else torch.zeros_like(seeds.position),
            kept[chain.pool][0] if chain.pool else None,
            kept[chain.relu] if chain.relu and rule != "deconvnet" else None,
            chain.scale(signal),
            frame,
            out,
        )
        if picture:
            signals[source] = pixels
        else:
            self.send(source, out, down, seeds, signals, fresh=True)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds its values in float32, for a kernel of the CPU to read."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.is_neg()
    )


def _channels_last(maps: Tensor) -> Tensor:
    """As signals lie in memory."""
    return maps.contiguous(memory_format=torch.channels_last) if maps.dim() == 4 else maps


def _kept(stage: Stage) -> int:
    """How many numbers of an image its way down needs."""
    if stage.kind == "pointwise":
        return torch.Size(stage.shape).numel()
    if stage.kind == "product" or (stage.kind == "map" and not is_linear(stage)):
        return sum(torch.Size(source.shape).numel() for source in stage.inputs)
    return 0


def _is_spread(source: Stage, reader: Stage) -> bool:
    """Whether each value of `source` is multiplied with more than one place of a map: a gate."""
    return reader.kind == "product" and source.shape[1:] != reader.shape[1:]


def _is_depthwise(conv: Stage) -> bool:
    return conv.options["groups"] == conv.shape[0] == conv.inputs[0].shape[0] > 1


def _fit(full: Tensor, before: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cuts the padding off a transposed convolution, and adds the rows and columns that no window reached."""
    after = [n - (m - b) for n, m, b in zip(size, full.shape[-2:], before)]
    if not any(before) and not any(after):
        return full
    return F.pad(full, (-before[1], after[1], -before[0], after[0]))
