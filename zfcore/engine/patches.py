"""The engine of the deconvnet: patches of the receptive field, whole maps where a patch would be one.

One clean forward per image batch, only to the layer asked for, keeps the switches of its pools. The way down
is then batched over seeds, a seed being one (image, unit, position). All seeds of a layer see fields of one
size, so the signal is carried as patches, one a seed, as long as a patch is smaller than its map, and as
whole maps from there on.

Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zfcore.engine.job import Job, scratch_bytes, times
from zfcore.engine.numbers import numbers
from zfcore.network import Field, Network, Stage, scale_of
from zfcore.ops import max_pool2d_with_switches, pool_gather2d, unpool2d
from zfcore.ops.deconv_step import deconv_step
from zfcore.reference._params import StepParams
from zfcore.reference.deconv_step import cut, inside

FORWARD_BYTES = 256 * 2**20  # likewise the maps of one batch of images on the way up


class _Seeds:
    """A batch of seeds: image (within the image batch), unit, position and value of each."""

    def __init__(self, image: Tensor, unit: Tensor, position: Tensor, value: Tensor):
        self.image, self.unit, self.position, self.value = image, unit, position, value

    def __len__(self) -> int:
        return len(self.value)

    def origin(self, field: Field) -> Tensor:
        """Where each seed's patch begins, [B, 2], in the map that `field` is about."""
        device = self.position.device
        return self.position * numbers(field.jump, device) + numbers(field.offset, device)


class _Buffers:
    """Memory for the steps' results, used again from step to step and from batch to batch.

    Fresh memory is slow: the system clears each page of it when it is first written.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.spare: list[Tensor] = []
        self.used: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of a result: it, and its memory

    def take(self, b: int, c: int, h: int, w: int) -> Tensor:
        """[B, C, h, w], channels last, its contents undefined."""
        count = b * c * h * w
        fitting = [i for i, memory in enumerate(self.spare) if count <= len(memory) <= 2 * count]
        if fitting:
            memory = self.spare.pop(min(fitting, key=lambda i: len(self.spare[i])))
        else:
            memory = torch.empty(count, dtype=self.dtype, device=self.device)
        result = memory[:count].view(b, h, w, c).permute(0, 3, 1, 2)
        self.used[id(result)] = result, memory
        return result

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether it is one of the results, itself and not a part of it."""
        return id(tensor) in self.used

    def give_back(self, result: Tensor) -> None:
        """Nothing reads this result any more."""
        self.spare.append(self.used.pop(id(result))[1])

    def give_all_back(self) -> None:
        self.spare += [memory for _, memory in self.used.values()]
        self.used.clear()


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
        self.buffers = _Buffers(job.dtype, job.device)
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
            fields = [self.below(self.seen[reader], reader) for reader in self.consumers[stage]]
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
                return _Chain(stage, pool, relu, tuple(scales))
            if stage.kind == "max_pool" and stage is top:
                pool = stage
            elif stage.kind == "relu" and not relu and not scales and not stage.options["rectifier"].slope:
                relu = stage
            elif stage.kind in ("batch_norm", "scale"):
                scales.append(stage)
            elif stage.kind not in ("identity", "lrn"):
                return None
            stage = stage.inputs[0]

    @staticmethod
    def below(field: Field | None, reader: Stage) -> Field | None:
        if field is None or reader.kind == "map":
            return None
        return field.through(reader.window) if reader.window is not None else field

    # -- the way up

    def image_batches(self) -> Iterator[tuple[int, int]]:
        item = torch.finfo(self.job.dtype).bits // 8
        largest = max(torch.Size(stage.shape).numel() for stage in self.network.stages)
        step = max(1, min(64, FORWARD_BYTES // (4 * largest * item)))
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
            if stage.kind == "map":
                kept[stage] = inputs
            elif stage.kind == "relu" and self.job.rule != "deconvnet":
                slope = stage.options["rectifier"].derivative(inputs[0])
                kept[stage] = (
                    slope.contiguous(memory_format=torch.channels_last) if slope.dim() == 4 else slope
                )
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
            field = self.patch[stage]
            sizes.append(
                stage.shape[0] * field.size[0] * field.size[1] if field else torch.Size(stage.shape).numel()
            )
        sizes.append(torch.Size(self.picture_shape).numel())
        return max(1, min(4096, scratch_bytes(self.job.device) // (3 * max(sizes) * item)))

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
            batch = _Seeds(image[part], unit[part], position[part], value[part])
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
        picture = self.network.stages[0]
        signals = {self.network.layer: self.start(seeds, maps)}
        for stage in reversed(self.network.stages):
            if stage is picture:
                break
            signal = signals.pop(stage, None)
            if signal is not None:
                self.undo(stage, signal, seeds, kept, signals, pixels)
        signal, field, seen = signals[picture], self.patch[picture], self.seen[picture]
        if signal is not pixels:
            if field is not None and not self.job.crop:
                signal = self.whole(picture, signal, field, seeds)
            elif field is None and self.job.crop and seen is not None:
                each = torch.arange(len(seeds), device=signal.device)
                signal = cut(signal, each, seeds.origin(seen), seen.size)
            pixels.copy_(signal)
        self.buffers.give_all_back()

    def start(self, seeds: _Seeds, maps: Tensor | None) -> Tensor:
        """The signal at the layer: each seed in an otherwise empty map, or a patch of one position."""
        stage, value = self.network.layer, seeds.value
        rows = torch.arange(len(seeds), device=value.device)
        if self.patch[stage] is not None:
            signal = value.new_zeros((len(seeds), stage.shape[0], 1, 1))
            signal[rows, seeds.unit, 0, 0] = value
            return signal
        signal = value.new_zeros((len(seeds), *stage.shape))  # features, whole maps, or what needs them below
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
        if field is None:
            return maps[seeds.image]
        return cut(maps, seeds.image, seeds.origin(field), field.size)

    def send(
        self,
        target: Stage,
        signal: Tensor,
        field: Field | None,
        seeds: _Seeds,
        signals: dict,
        fresh: bool = False,
    ) -> None:
        """Adds what came down on one way to the target's signal.

        field: the patch that `signal` is, or None. fresh: it is a step's own result, which nothing else holds and
        which is zero outside its map already.
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
        if target in signals:
            signal = signal.add_(signals[target]) if fresh else signal + signals[target]
        signals[target] = signal

    def undo(
        self, stage: Stage, signal: Tensor, seeds: _Seeds, kept: dict, signals: dict, pixels: Tensor
    ) -> None:
        """One stage down, or several at once: from the signal at its output to those at its inputs."""
        job, field = self.job, self.patch[stage]
        chain = self.chains[stage]
        if chain is not None:
            self.step(stage, chain, signal, seeds, kept, signals, pixels)
            return
        if stage.kind == "map":
            inputs = [x[seeds.image] for x in kept[stage]]
            for source, g in zip(stage.inputs, _vjp(stage.run, inputs, signal)):
                self.send(source, g, None, seeds, signals)
            return
        if stage.kind == "cat":
            first = 0
            for source in stage.inputs:
                part = signal[:, first : first + source.shape[0]]
                first += source.shape[0]
                self.send(source, part, field, seeds, signals)
            return
        if stage.kind == "add":
            for source in stage.inputs:
                self.send(source, signal, field, seeds, signals)
            return
        source = stage.inputs[0]
        down = field and self.below(field, stage)
        if stage.kind == "max_pool":
            signal = self.unpool(stage, signal, seeds, kept)
        elif stage.kind == "relu":
            if job.rule != "gradient" and stage.options["rectifier"].slope == 0 and self.owns(signal, signals):
                signal = signal.relu_()
            elif job.rule != "gradient":
                signal = stage.options["rectifier"].rectify(signal)
            if job.rule != "deconvnet":
                signal = times(signal, self.own(kept[stage], field, seeds))
        elif stage.kind == "avg_pool":
            share = kept.get(stage, stage.options["share"])
            if field and isinstance(share, Tensor):
                share = cut(share, torch.zeros_like(seeds.image), seeds.origin(field), field.size)
            signal = _avg_transpose(stage, signal * share, down and down.size)
        elif stage.kind == "pad":
            signal = signal if field else _fit(signal, stage.window.padding, source.shape[1:])
        elif stage.kind in ("batch_norm", "scale"):
            scale = scale_of(stage)
            signal = signal * (scale.to(signal.dtype) if isinstance(scale, Tensor) else scale)
        self.send(source, signal, down, seeds, signals)

    def owns(self, signal: Tensor, signals: dict) -> bool:
        """Whether the signal is a step's result that nothing else still waits for."""
        return signal in self.buffers and not any(other is signal for other in signals.values())

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
            down = (self.below(field, chain.pool) if chain.pool else field).through(conv.window)
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
            out = self.buffers.take(len(seeds), source.shape[0], *size)
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
        if self.owns(signal, signals):
            self.buffers.give_back(signal)
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


def _fit(full: Tensor, before: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cuts the padding off a transposed convolution, and adds the rows and columns that no window reached."""
    after = [n - (m - b) for n, m, b in zip(size, full.shape[-2:], before)]
    if not any(before) and not any(after):
        return full
    return F.pad(full, (-before[1], after[1], -before[0], after[0]))


def _avg_transpose(pool: Stage, signal: Tensor, patch: tuple[int, int] | None) -> Tensor:
    w, channels = pool.window, pool.shape[0]
    ones = signal.new_ones((channels, 1, *w.kernel))
    full = F.conv_transpose2d(signal, ones, None, w.stride, 0, 0, channels)
    return full if patch else _fit(full, w.padding, pool.inputs[0].shape[1:])


def _vjp(run: Callable[..., Tensor], inputs: list[Tensor], signal: Tensor) -> list[Tensor]:
    """The plain gradient of an operation, for what has no rule of its own."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(run(*inputs), inputs, signal, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]
