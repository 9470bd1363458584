"""The deconvnet: projects a unit's activation back to pixels.

One clean forward per image batch, only to the layer asked for, keeps the switches of its pools. The way down
is then batched over seeds, a seed being one (image, unit, position). All seeds of a layer see fields of one
size, so the signal is carried as patches, one a seed, as long as a patch is smaller than its map, and as
whole maps from there on.

Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from zfcore.errors import (
    ArgumentError,
    DtypeError,
    LayerNotFound,
    ShapeError,
    UnitNotFound,
    UnsupportedOperation,
)
from zfcore.network import (
    Field,
    Network,
    Stage,
    evaluating,
    exact_arithmetic,
    observing,
    read_network,
    resolve_layer,
    rule_of_call,
)
from zfcore.ops import max_pool2d_with_switches, pool_gather2d, unpool2d
from zfcore.ops.deconv_step import deconv_step
from zfcore.ops.strongest import strongest
from zfcore.reference._params import StepParams
from zfcore.reference.deconv_step import cut

__all__ = ["Projection", "deconv_project", "iter_projections"]

_INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
RULES = ("deconvnet", "guided", "gradient")
SEEDS = ("activation", "one")
OVERLAPS = ("sum", "last")
SCRATCH_BYTES = 128 * 2**20  # what batch_size=None lets the signals of one batch of seeds take
FORWARD_BYTES = 256 * 2**20  # likewise the maps of one batch of images on the way up


@dataclass(frozen=True, eq=False, repr=False)
class Projection:
    """Units projected to pixels.

    The leading axes are (N, U) from `deconv_project`, and one, (B,), from `iter_projections`.

    pixels:      [N, U, C, H, W], or [N, U, C, h, w] with crop=True: what the unit saw, in the model's dtype.
    boxes:       [N, U, 4] int64, (y0, x0, y1, x1): the receptive field in the image; may reach past its edge.
    activations: [N, U], the value of each unit at its position (positions="all": the sum over its map).
    positions:   [N, U, 2] int64, (row, column) in the layer's map; -1 with positions="all".
    images:      [N, U] int64, the image of each projection.
    units:       [N, U] int64, its unit.
    layer:       the layer's name.
    path:        "engine", or "dense" for a network that the engine cannot read.
    reason:      why the dense path was taken, else "".
    """

    pixels: Tensor
    boxes: Tensor
    activations: Tensor
    positions: Tensor
    images: Tensor
    units: Tensor
    layer: str
    path: str
    reason: str

    def __repr__(self) -> str:
        return (
            f"Projection(layer={self.layer!r}, pixels={tuple(self.pixels.shape)} {self.pixels.dtype}, "
            f"path={self.path!r})"
        )


def deconv_project(
    model: nn.Module,
    images: Tensor,
    layer: str | nn.Module,
    units: int | Sequence[int] | Tensor | None = None,
    *,
    positions: str | Tensor = "max",
    rule: str = "deconvnet",
    seed: str = "activation",
    overlap: str = "sum",
    crop: bool = False,
    batch_size: int | None = None,
    strict: bool = False,
    progress: bool = False,
) -> Projection:
    """Project units of a layer back to pixels, as the deconvnet does.

    From the seed, every layer below is undone: pools by their switches, the ReLU family by rectifying what
    comes down, convolutions by their transposed filters, batch normalisation by its scale; contrast
    normalisation is passed over and no bias takes part. Nothing is rectified after the last transposed
    convolution.

    Args:
        model: takes [N, C, H, W] images. In eval mode for the call, and given back as it was.
        images: [N, C, H, W] or [C, H, W] float, any dtype, device and layout; brought to the model's dtype
            and device.
        layer: a module, or its dotted name; of a module called several times the last call, "name@i" for
            another.
        units: the feature maps (or features) to project: an int, a sequence, or None for all.
        positions: "max", where each unit is strongest in each image (NaN is passed over, the first of equals
            is taken); "all", the unit's whole map at once; or an int tensor [N, U, 2] of (row, column).
        rule: what the ReLU family does to the signal g that comes down, z being its input on the way up:
            "deconvnet" max(g, 0); "guided" max(g, 0) * [z > 0]; "gradient" g * [z > 0].
        seed: "activation", the unit's own value; or "one".
        overlap: what overlapping pooling windows do where they name one place: "sum", or "last" in raster
            order.
        crop: return the receptive field only. Networks on the dense path have no geometry: the field is the
            image.
        batch_size: seeds worked at once. None picks it so that their signals take about 128 MB.
        strict: raise UnsupportedOperation for a network that the engine cannot read, instead of the dense
            path.
        progress: draw a bar that counts projections.

    Returns:
        A Projection.

    Raises:
        ArgumentError, DtypeError, ShapeError: an argument is wrong; the message names it and says what was
            expected.
        LayerNotFound, UnitNotFound: no such layer, unit or position.
        UnsupportedOperation: with strict=True, names the operation that keeps the network from the engine.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1.
    """
    job = _Job(model, images, layer, units, positions, rule, seed, overlap, crop, batch_size, strict)
    first = 0
    with torch.inference_mode(False):
        parts = {
            name: value.new_empty((job.count, *value.shape[1:])) for name, value in job.nothing().items()
        }
    with tqdm(total=job.count, disable=not progress, unit="projection") as bar, job.working():
        for part in job.run(parts["pixels"]):
            for name, value in part.items():
                if name != "pixels":  # which are there already
                    parts[name][first : first + len(value)] = value
            first += len(part["pixels"])
            bar.update(len(part["pixels"]))
    shaped = {name: value.unflatten(0, (len(job.images), len(job.units))) for name, value in parts.items()}
    return Projection(**shaped, layer=job.layer, path=job.path, reason=job.reason)


def iter_projections(
    model: nn.Module,
    images: Tensor,
    layer: str | nn.Module,
    units: int | Sequence[int] | Tensor | None = None,
    *,
    progress: bool = False,
    **options,
) -> Iterator[Projection]:
    """`deconv_project` for jobs: yields the projections batch by batch, so that memory stays bounded.

    Takes the arguments of `deconv_project`. Each Projection holds at most `batch_size` projections along one
    leading axis, image by image and in the order of `units`; its `images` and `units` say which they are.
    Arguments are checked at the call. The model is in eval mode while a batch is worked at, and as it was
    while the caller has one.
    """
    defaults = dict(
        positions="max",
        rule="deconvnet",
        seed="activation",
        overlap="sum",
        crop=False,
        batch_size=None,
        strict=False,
    )
    if unknown := set(options) - set(defaults):
        raise ArgumentError(
            f"{', '.join(sorted(unknown))}: expected options among {', '.join(defaults)}, progress"
        )
    job = _Job(model, images, layer, units, **{**defaults, **options})

    def batches():
        with tqdm(total=job.count, disable=not progress, unit="projection") as bar:
            for part in job.run():
                yield Projection(**part, layer=job.layer, path=job.path, reason=job.reason)
                bar.update(len(part["pixels"]))

    return batches()


# ---- Arguments ---------------------------------------------------------------------------------------------


def _choice(name: str, value, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")
    return value


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of torch.compile and of data parallelism."""
    while True:
        parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inside = model.module if parallel else getattr(model, "_orig_mod", None)
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def _as_unwrapped(layer, model: nn.Module):
    """A layer's name as the wrapped network has it."""
    names = dict(model.named_modules(remove_duplicate=False))
    while isinstance(layer, str) and layer.partition("@")[0] not in names:
        wrapper, dot, inside = layer.partition(".")
        if wrapper not in ("module", "_orig_mod") or not dot:
            break
        layer = inside
    return layer


def _placement(model: nn.Module, images: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where and in what the model computes: as its first floating-point parameter or buffer is."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if torch.nn.parameter.is_lazy(value):
            raise ArgumentError(f"model: {name!r} has no shape yet; expected a model that has run once")
        if value.is_floating_point():
            return value.device, value.dtype
    return images.device, images.dtype


def _check_images(images: Tensor) -> Tensor:
    if not isinstance(images, Tensor):
        raise DtypeError(f"images={type(images).__name__}: expected a float tensor [N, C, H, W] or [C, H, W]")
    if not images.is_floating_point():
        raise DtypeError(
            f"images of dtype {images.dtype}: expected a float tensor, scaled as the model was trained"
        )
    if images.dim() == 3:
        images = images.unsqueeze(0)
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise ShapeError(
            f"images of shape {tuple(images.shape)}: expected [N, C, H, W] or [C, H, W], none of them 0"
        )
    return images


class _Job:
    """One call: its checked arguments, and the path that runs it."""

    def __init__(self, model, images, layer, units, positions, rule, seed, overlap, crop, batch_size, strict):
        if not isinstance(model, nn.Module):
            raise DtypeError(f"model={type(model).__name__}: expected an nn.Module")
        inside = _unwrapped(model)
        if inside is not model:
            layer = inside if layer is model else _as_unwrapped(layer, inside)
        self.model = model = inside
        images = _check_images(images)
        self.device, self.dtype = _placement(model, images)
        self.images = images.detach().to(self.device, self.dtype)
        self.rule = _choice("rule", rule, RULES)
        self.seed = _choice("seed", seed, SEEDS)
        self.overlap = _choice("overlap", overlap, OVERLAPS)
        for name, value in (("crop", crop), ("strict", strict)):
            if not isinstance(value, bool):
                raise DtypeError(f"{name}={value!r}: expected a bool")
        self.crop = crop
        if batch_size is not None and (
            isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
        ):
            raise ArgumentError(f"batch_size={batch_size!r}: expected an int of at least 1, or None")
        self.batch_size = batch_size
        name, call = resolve_layer(model, layer)
        self.layer = name if call is None else f"{name}@{call}"
        self.positions = positions
        self.reason = ""
        with self.working():
            try:
                network = read_network(model, tuple(self.images.shape[1:]), layer, self.images[:1])
            except UnsupportedOperation as error:
                if strict:
                    raise
                self.reason = str(error)
                warnings.warn(f"zfcore: the dense path runs this network: {error}", stacklevel=3)
                self.runner = _Dense(self, name, call)
            else:
                self.runner = _Engine(self, network)
        self.path = "dense" if self.reason else "engine"
        shape = self.runner.layer_shape
        if len(shape) not in (1, 3):
            raise ShapeError(
                f"layer={self.layer!r} gives {shape} an image: expected a map (C, H, W) or features (F,)"
            )
        self.map_size = shape[1:] or (1, 1)
        self.units = self.check_units(units, shape[0])
        self.positions = self.check_positions(positions)
        self.count = len(self.images) * len(self.units)

    def check_units(self, units, count: int) -> Tensor:
        if units is None:
            return torch.arange(count, device="cpu")
        given = units
        if hasattr(units, "tolist"):  # a tensor, or numpy's array or number
            units = units.tolist()
        if not isinstance(units, Sequence):
            units = [units]
        try:
            if any(isinstance(u, bool) for u in units):
                raise TypeError("a bool is no unit")
            units = [operator.index(u) for u in units]
        except TypeError as error:
            raise DtypeError(
                f"units={given!r}: expected an int, a sequence of ints, or None for all"
            ) from error
        if not units:
            raise ArgumentError("units=[]: expected at least one unit, or None for all")
        for unit in units:
            if not 0 <= unit < count:
                raise UnitNotFound(
                    f"units: {unit} is not a unit of layer {self.layer!r}, which has 0 to {count - 1}"
                )
        return torch.tensor(units, device="cpu")

    def check_positions(self, positions) -> str | Tensor:
        if isinstance(positions, str):
            return _choice("positions", positions, ("max", "all"))
        if not isinstance(positions, Tensor) or positions.dtype not in _INT_DTYPES:
            raise DtypeError(f"positions={positions!r}: expected 'max', 'all' or an int tensor [N, U, 2]")
        expected = (len(self.images), len(self.units), 2)
        if tuple(positions.shape) != expected:
            raise ShapeError(
                f"positions of shape {tuple(positions.shape)}: expected [N, U, 2] = {list(expected)}"
            )
        positions = positions.detach().cpu().long()
        size = torch.tensor(self.map_size, device="cpu")
        outside = ((positions < 0) | (positions >= size)).any(-1)
        if outside.any():
            row, column = positions[outside][0].tolist()
            raise UnitNotFound(
                f"positions: ({row}, {column}) is outside the map of layer {self.layer!r}, "
                f"{tuple(self.map_size)}"
            )
        return positions

    @contextlib.contextmanager
    def working(self):
        """The model in eval mode, and the arithmetic its own, whatever modes surround the call."""
        with (
            torch.inference_mode(False),
            evaluating(self.model),
            exact_arithmetic(self.device),
            torch.no_grad(),
        ):
            yield

    def run(self, pixels: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
        """The projections, in order, as dicts of Projection's tensors along one axis.

        pixels: [N * U, C, h, w] that they are written into, by a caller who is `working`; or None for new ones, and
        the model is as it was while the caller has a batch.
        """
        working = self.working if pixels is None else contextlib.nullcontext
        for begin, end in self.runner.image_batches():
            own = None if pixels is None else pixels[begin * len(self.units) : end * len(self.units)]
            parts = self.runner.run(begin, end, own)
            while True:
                with working():
                    part = next(parts, None)
                if part is None:
                    break
                yield part

    def nothing(self) -> dict[str, Tensor]:
        """What `run` yields, of no projections."""
        ints = torch.empty((0, 4), dtype=torch.int64, device=self.device)
        floats = torch.empty((0, *self.runner.picture_shape), dtype=self.dtype, device=self.device)
        values = floats.new_empty(0, dtype=self.runner.layer_dtype)
        return {
            "pixels": floats,
            "boxes": ints,
            "activations": values,
            "positions": ints[:, :2],
            "images": ints[:, 0],
            "units": ints[:, 0],
        }

    def locate(
        self, maps: Tensor, begin: int, units: range | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The seeds of images [begin, begin + n).

        Returns positions [n, U, 2] (on the CPU), values [n, U], and the activations that they report [n, U].

        maps: [n, C, H, W], the layer's. units: those of the job's, by place, None for all.
        """
        n, _, h, w = maps.shape
        ids = (self.units if units is None else self.units[units.start : units.stop]).to(self.device)
        if isinstance(self.positions, Tensor):
            positions = self.positions[begin : begin + n]
            positions = positions if units is None else positions[:, units.start : units.stop]
        elif self.positions == "all":
            totals = maps[:, ids].flatten(2).sum(-1)
            return torch.full((n, len(ids), 2), -1, device="cpu"), totals, totals
        else:
            place = strongest(maps, ids).cpu()
            positions = torch.stack((place // w, place % w), -1)
        at = positions.to(self.device)
        values = maps[torch.arange(n, device=self.device)[:, None], ids, at[..., 0], at[..., 1]]
        return positions, (torch.ones_like(values) if self.seed == "one" else values), values

    def seed_maps(self, activations: Tensor) -> Tensor:
        """positions="all": the maps that seed the way down."""
        return torch.ones_like(activations) if self.seed == "one" else activations


# ---- The engine --------------------------------------------------------------------------------------------


class _Seeds:
    """A batch of seeds: image (within the image batch), unit, position and value of each."""

    def __init__(self, image: Tensor, unit: Tensor, position: Tensor, value: Tensor):
        self.image, self.unit, self.value = image, unit, value
        self.position_cpu = position
        self.position = position.to(value.device)

    def __len__(self) -> int:
        return len(self.value)

    def origin(self, field: Field) -> Tensor:
        """Where each seed's patch begins, [B, 2], in the map that `field` is about."""
        return self._affine(self.position, field)

    def origin_range(self, field: Field) -> tuple[list[int], list[int]]:
        origin = self._affine(self.position_cpu, field)
        return origin.amin(0).tolist(), origin.amax(0).tolist()

    @staticmethod
    def _affine(position: Tensor, field: Field) -> Tensor:
        jump = torch.tensor(field.jump, device=position.device)
        return position * jump + torch.tensor(field.offset, device=position.device)


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

    def give_back(self, result: Tensor) -> None:
        """Nothing reads this result, or what is not one, any more."""
        if id(result) in self.used:
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

    def scale(self, dtype: torch.dtype) -> Tensor | None:
        """[K], or None for one."""
        if not self.scales:
            return None
        weight = self.conv.options["weight"]()
        total = torch.ones(len(weight), dtype=dtype, device=weight.device)
        for stage in self.scales:
            scale = _scale(stage)
            total = total * (scale.to(dtype).flatten() if isinstance(scale, Tensor) else scale)
        return total


class _Engine:
    """The way up once an image batch, and the way down for batches of seeds."""

    def __init__(self, job: _Job, network: Network):
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
        values: dict[Stage, Tensor] = {}
        kept: dict = {}
        readers = {stage: len(found) for stage, found in self.consumers.items()}
        for stage in self.network.stages:
            inputs = [values[source] for source in stage.inputs]
            if stage.kind == "input":
                value = images
            elif stage.kind == "max_pool":
                w = stage.window
                value, switches = max_pool2d_with_switches(
                    inputs[0], w.kernel, w.stride, w.padding, w.dilation, stage.options["ceil_mode"]
                )
                kept[stage] = self.keep_switches(stage, switches)
            else:
                value = stage.run(*inputs)
                if stage.kind == "map":
                    kept[stage] = inputs
                elif stage.kind == "relu" and self.job.rule != "deconvnet":
                    slope = stage.options["rectifier"].derivative(inputs[0])
                    kept[stage] = (
                        slope.contiguous(memory_format=torch.channels_last) if slope.dim() == 4 else slope
                    )
                elif stage.kind == "avg_pool" and callable(stage.options["share"]):
                    kept[stage] = stage.options["share"](inputs[0])
            values[stage] = value
            for source in stage.inputs:
                readers[source] -= 1
                if not readers[source]:
                    del values[source]
        return values[self.network.layer], kept

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
        return max(1, min(4096, SCRATCH_BYTES // (3 * max(sizes) * item)))

    def run(self, begin: int, end: int, pixels: Tensor | None) -> Iterator[dict[str, Tensor]]:
        job = self.job
        activations, kept = self.up(job.images[begin:end])
        if activations.dim() == 2:
            activations = activations[:, :, None, None]
        positions, seeds, reported = job.locate(activations, begin)
        n, u = reported.shape
        image = torch.arange(n, device=job.device).repeat_interleave(u)
        unit = job.units.to(job.device).repeat(n)
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
                "positions": position[part].to(job.device),
                "images": batch.image + begin,
                "units": batch.unit,
            }

    def boxes(self, seeds: _Seeds) -> Tensor:
        field = self.seen[self.network.stages[0]]
        height, width = self.job.images.shape[-2:]
        if field is None:
            return torch.tensor([0, 0, height, width], device=self.job.device).repeat(len(seeds), 1)
        start = seeds.origin(field)
        return torch.cat((start, start + torch.tensor(field.size, device=start.device)), 1)

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
        if signal is pixels:
            self.buffers.give_all_back()
            return
        everything = torch.arange(len(seeds), device=signal.device)
        if field is not None and not self.job.crop:
            signal = self.whole(picture, signal, seeds)
        elif field is None and self.job.crop and seen is not None:
            signal = cut(signal, everything, seeds.origin(seen), seen.size)
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
        low, high = seeds.origin_range(field)
        height, width = stage.shape[-2:]
        h, w = field.size
        if low[0] >= 0 and low[1] >= 0 and high[0] + h <= height and high[1] + w <= width:
            return signal
        origin = seeds.origin(field)
        y = origin[:, :1] + torch.arange(h, device=origin.device)
        x = origin[:, 1:] + torch.arange(w, device=origin.device)
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
        return signal.masked_fill(~inside.unsqueeze(1), 0)

    def whole(self, stage: Stage, signal: Tensor, seeds: _Seeds) -> Tensor:
        """Patches put into whole maps."""
        everything = torch.arange(len(seeds), device=signal.device)
        return cut(signal, everything, -seeds.origin(self.patch[stage]), stage.shape[-2:])

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
            everything = torch.arange(len(seeds), device=signal.device)
            signal = cut(signal, everything, -seeds.origin(field), target.shape[-2:])
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
            if job.rule != "gradient":
                signal = stage.options["rectifier"].rectify(signal)
            if job.rule != "deconvnet":
                slope = kept[stage]
                slope = (
                    cut(slope, seeds.image, seeds.origin(field), field.size) if field else slope[seeds.image]
                )
                signal = _times(signal, slope)
        elif stage.kind == "avg_pool":
            share = kept.get(stage, stage.options["share"])
            if field and isinstance(share, Tensor):
                share = cut(share, torch.zeros_like(seeds.image), seeds.origin(field), field.size)
            signal = _avg_transpose(stage, signal * share, down and down.size)
        elif stage.kind == "pad":
            signal = signal if field else _fit(signal, stage.window.padding, source.shape[1:])
        elif stage.kind in ("batch_norm", "scale"):
            scale = _scale(stage)
            signal = signal * (scale.to(signal.dtype) if isinstance(scale, Tensor) else scale)
        self.send(source, signal, down, seeds, signals)

    def switches(self, pool: Stage, signal: Tensor, seeds: _Seeds, kept: dict) -> tuple[Tensor, Tensor]:
        """The signal and the switches of each seed.

        With overlap="last", what later windows overwrite is dropped from the signal.
        """
        field = self.patch[pool]

        def own(maps):
            return cut(maps, seeds.image, seeds.origin(field), field.size) if field else maps[seeds.image]

        switches, winners = kept[pool]
        if winners is not None:
            signal = signal.masked_fill(~own(winners), 0)
        return signal, own(switches)

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
            down = self.below(field, chain.pool).through(conv.window) if chain.pool else field.through(conv.window)
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
            chain.scale(signal.dtype),
            frame,
            out,
        )
        if not any(other is signal for other in signals.values()):
            self.buffers.give_back(signal)
        if picture:
            signals[source] = pixels
        else:
            self.send(source, out, down, seeds, signals, fresh=True)


def _scale(stage: Stage) -> Tensor | float:
    """What batch normalisation, or a constant, multiplies by: [C, 1, 1], or one number."""
    return stage.options["scale"]()[:, None, None] if stage.kind == "batch_norm" else stage.options["factor"]


def _times(signal: Tensor, slope: Tensor) -> Tensor:
    """signal * slope, a rectifier's derivative; as a mask it stops an infinity too."""
    if slope.dtype == torch.bool:
        return torch.where(slope, signal, torch.zeros((), dtype=signal.dtype, device=signal.device))
    return signal * slope


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


# ---- The dense path ----------------------------------------------------------------------------------------


class _Rectify(torch.autograd.Function):
    """A member of the ReLU family, with a rule for its way down."""

    @staticmethod
    def forward(ctx, z, rectifier, rule):
        ctx.rectifier, ctx.rule = rectifier, rule
        if rule != "deconvnet":
            ctx.save_for_backward(rectifier.derivative(z))
        return rectifier.forward(z)

    @staticmethod
    def backward(ctx, g):
        if ctx.rule != "gradient":
            g = ctx.rectifier.rectify(g)
        if ctx.rule != "deconvnet":
            g = _times(g, ctx.saved_tensors[0])
        return g, None, None


class _PassOver(torch.autograd.Function):
    """Contrast normalisation on the way up, nothing on the way down."""

    @staticmethod
    def forward(ctx, x, run):
        return run(x)

    @staticmethod
    def backward(ctx, g):
        return g, None


class _PoolLast(torch.autograd.Function):
    """Max-pooling whose way down keeps the last of the windows that name one place."""

    @staticmethod
    def forward(ctx, x, window, ceil_mode):
        y, switches = max_pool2d_with_switches(
            x, window.kernel, window.stride, window.padding, window.dilation, ceil_mode
        )
        ctx.window, ctx.size = window, x.shape[-2:]
        ctx.save_for_backward(switches)
        return y

    @staticmethod
    def backward(ctx, g):
        w = ctx.window
        return (
            unpool2d(g, *ctx.saved_tensors, w.kernel, w.stride, w.padding, w.dilation, ctx.size, "last"),
            None, None,
        )  # fmt: skip


class _Rules(TorchFunctionMode):
    """Applies the rules to each operation as it happens, in this thread only and with no hooks."""

    def __init__(self, rule: str, overlap: str):
        super().__init__()
        self.rule, self.overlap = rule, overlap

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.overlap == "last" and function in _POOLS:
            return self.pool(function, args, kwargs)
        stage, in_place = rule_of_call(function, args, kwargs)
        x = args[0] if args else kwargs.get("input")
        if stage is None or not isinstance(x, Tensor):
            return function(*args, **kwargs)
        if stage.kind == "relu":
            if not in_place:
                return _Rectify.apply(x, stage.options["rectifier"], self.rule)
            return x.copy_(_Rectify.apply(x.clone(), stage.options["rectifier"], self.rule))
        if stage.kind == "lrn":
            return _PassOver.apply(x, stage.run)
        return function(*args, **kwargs)

    @staticmethod
    def pool(function, args, kwargs):
        """A pool whose way down keeps the last, and the indices or switches that the function returns."""
        plain = {name: value for name, value in kwargs.items() if name != "return_indices"}
        stage, _ = rule_of_call(F.max_pool2d, args, plain)
        if stage is None:
            raise ArgumentError(
                "overlap='last': expected windows of at most 255 taps; the model's are larger"
            )
        pooled = _PoolLast.apply(
            args[0] if args else kwargs["input"], stage.window, stage.options["ceil_mode"]
        )
        return pooled if function in _PLAIN_POOLS else (pooled, function(*args, **kwargs)[1])


_PLAIN_POOLS = (F.max_pool2d, torch.max_pool2d)
_POOLS = (*_PLAIN_POOLS, F.max_pool2d_with_indices, max_pool2d_with_switches)


class _Dense:
    """Whole maps and autograd: for networks that cannot be read.

    The layer's output comes from a hook on it alone.
    """

    def __init__(self, job: _Job, name: str, call: int | None):
        self.job, self.call = job, call
        self.overwritten = False  # whether the model works in place on what autograd saved
        for path, module in job.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise UnsupportedOperation(
                    f"'{path or type(job.model).__name__}' is a TorchScript module, whose operations cannot "
                    "be seen; "
                    "expected a model of Python modules"
                )
        self.module = job.model.get_submodule(name)
        images = job.images[:1] if len(job.images) else job.images.new_zeros((1, *job.images.shape[1:]))
        output = self.up(images)[1]
        self.layer_shape, self.layer_dtype = tuple(output.shape[1:]), output.dtype
        self.picture_shape = tuple(job.images.shape[1:])

    def seeds_at_once(self) -> int:
        if self.job.batch_size is not None:
            return self.job.batch_size
        pixels = torch.Size(self.job.images.shape[1:]).numel()
        return max(1, SCRATCH_BYTES // (pixels * self.job.images.element_size()))

    def image_batches(self) -> Iterator[tuple[int, int]]:
        step = max(1, min(8, self.seeds_at_once() // len(self.job.units)))
        for begin in range(0, len(self.job.images), step):
            yield begin, min(begin + step, len(self.job.images))

    def up(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The images as a leaf of autograd's graph, and the layer's output."""
        job, outputs = self.job, []

        def keep(output):
            # A copy: an in-place operation after the layer must not change what was kept.
            outputs.append(output.clone() if isinstance(output, Tensor) else output)

        # A model that draws random numbers in eval mode does not move the caller's generators.
        devices = [job.device] if job.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices):
            leaf = images.detach().clone().requires_grad_()
            with observing(self.module, keep), _Rules(job.rule, job.overlap), self.saving():
                job.model(leaf.clone())  # a copy: the model may work on its input in place
        name = self.job.layer
        if not outputs:
            raise LayerNotFound(f"layer={name!r}: expected a layer that the model calls")
        if self.call is not None and self.call >= len(outputs):
            raise LayerNotFound(f"layer={name!r}: the model calls it {len(outputs)} times, from @0")
        output = outputs[-1 if self.call is None else self.call]
        if not isinstance(output, Tensor) or output.dim() not in (2, 4):
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ShapeError(f"layer={name!r} returns {what}: expected a tensor [N, C, H, W] or [N, F]")
        if not output.requires_grad:
            raise UnsupportedOperation(
                f"layer={name!r}: its output is cut off from the images; expected a model without no_grad() "
                "and detach()"
            )
        return leaf, output

    def saving(self) -> contextlib.AbstractContextManager:
        """Keeps copies of what autograd saves, for models that work in place on what their gradient needs."""
        if not self.overwritten:
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(lambda x: x if x.is_leaf else x.clone(), lambda x: x)

    def run(self, begin: int, end: int, pixels: Tensor | None) -> Iterator[dict[str, Tensor]]:
        step = len(self.job.units) if end - begin > 1 else self.seeds_at_once()
        for first in range(0, len(self.job.units), step):
            units = range(first, min(first + step, len(self.job.units)))
            try:
                part = self.part(begin, end, units)
            except RuntimeError as error:
                if self.overwritten or "modified by an inplace operation" not in str(error):
                    raise
                self.overwritten = True
                part = self.part(begin, end, units)
            if pixels is not None:
                pixels[first * (end - begin) :][: len(part["pixels"])] = part["pixels"]
            yield part

    def part(self, begin: int, end: int, units: range) -> dict[str, Tensor]:
        """Some units, by their place in the job's, of images [begin, end)."""
        job = self.job
        leaf, output = self.up(job.images[begin:end])
        if output.shape[0] != end - begin:
            raise ShapeError(
                f"layer={job.layer!r} returns {tuple(output.shape)}: expected {end - begin} images first"
            )
        maps = output.detach()
        maps = maps[:, :, None, None] if maps.dim() == 2 else maps
        ids = job.units[units.start : units.stop]
        positions, seeds, reported = job.locate(maps, begin, units)
        n, u = reported.shape
        pixels = leaf.new_empty((n, u, *leaf.shape[1:]))
        rows = torch.arange(n, device=job.device)
        for i, unit in enumerate(ids.tolist()):
            seed = torch.zeros_like(maps)
            if job.positions == "all":
                seed[:, unit] = job.seed_maps(maps[:, unit])
            else:
                at = positions[:, i].to(job.device)
                seed[rows, unit, at[:, 0], at[:, 1]] = seeds[:, i]
            (g,) = torch.autograd.grad(
                output, leaf, seed.reshape(output.shape), retain_graph=i + 1 < u, allow_unused=True
            )
            pixels[:, i] = 0 if g is None else g
        height, width = leaf.shape[-2:]
        return {
            "pixels": pixels.flatten(0, 1),
            "boxes": torch.tensor([0, 0, height, width], device=job.device).repeat(n * u, 1),
            "activations": reported.reshape(-1).clone(),
            "positions": positions.reshape(-1, 2).to(job.device),
            "images": (rows + begin).repeat_interleave(u),
            "units": ids.to(job.device).repeat(n),
        }
