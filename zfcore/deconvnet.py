"""The deconvnet: projects a unit's activation back to pixels.

The arguments are checked here; `zfcore.engine` does the work, on patches of the receptive field, or on whole maps for
networks that cannot be read.

Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Iterator, Sequence
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
from zfcore.engine.dense import Dense
from zfcore.engine.job import Job
from zfcore.engine.patches import Engine
from zfcore.errors import (
    ArgumentError,
    DtypeError,
    ShapeError,
    UnitNotFound,
    UnsupportedOperation,
)
from zfcore.kinds import plain, without_values
from zfcore.network import evaluating, exact_arithmetic, read_network, resolve_layer
from zfcore.ops._filters import held as filters_held
from zfcore.progress import bar_of

__all__ = ["Projection", "deconv_project", "iter_projections"]

_INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
RULES = ("deconvnet", "guided", "gradient")
SEEDS = ("activation", "one")
OVERLAPS = ("sum", "last")


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
    first = 0
    with contained(), contextlib.ExitStack() as stack:
        job = _Job(
            model, images, layer, units, positions, rule, seed, overlap, crop, batch_size, strict, stack
        )
        parts = {
            name: value.new_empty((job.count, *value.shape[1:])) for name, value in job.nothing().items()
        }
        stack.enter_context(filters_held())
        bar = stack.enter_context(bar_of(progress, total=job.count, unit="projection"))
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
    with contained():
        job = _Job(model, images, layer, units, **{**defaults, **options})

    def batches():
        with bar_of(progress, total=job.count, unit="projection") as bar:
            for part in job.run():
                yield Projection(**part, layer=job.layer, path=job.path, reason=job.reason)
                bar.update(len(part["pixels"]))

    return batches()


# ---- Arguments ---------------------------------------------------------------------------------------------


def _choice(name: str, value, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")
    return value


class _Job(Job):
    """One call: its checked arguments, and the path that runs it."""

    def __init__(
        self,
        model,
        images,
        layer,
        units,
        positions,
        rule,
        seed,
        overlap,
        crop,
        batch_size,
        strict,
        stay: contextlib.ExitStack | None = None,
    ):
        """stay: keeps the job `working` from here on; without one it is while the network is read."""
        check_surroundings()
        inside = unwrapped(model)
        layer = layer_inside(layer, model, inside)
        self.model = model = inside
        images = checked_images(images)
        self.device, self.dtype = placement(model, images)
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
        with contextlib.ExitStack() as own:
            (stay or own).enter_context(self.working())
            try:
                network = read_network(model, tuple(self.images.shape[1:]), layer, self.images[:1], gradient=True)
            except UnsupportedOperation as error:
                if strict:
                    raise
                self.reason = str(error)
                warnings.warn(f"zfcore: the dense path runs this network: {error}", stacklevel=3)
                self.runner = Dense(self, name, call)
            else:
                self.runner = Engine(self, network)
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
        if isinstance(units, Tensor) and (what := without_values(units)):
            raise DtypeError(f"units: {what}; expected an int, a sequence of ints, or None for all")
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
        if what := without_values(positions):
            raise DtypeError(f"positions: {what}; expected 'max', 'all' or an int tensor [N, U, 2] of values")
        expected = (len(self.images), len(self.units), 2)
        if tuple(positions.shape) != expected:
            raise ShapeError(
                f"positions of shape {tuple(positions.shape)}: expected [N, U, 2] = {list(expected)}"
            )
        positions = plain(positions).detach().cpu().long()
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
            contained(),
            torch.inference_mode(False),
            default_device(self.images),
            eagerly(),
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
                with working(), running(self.model):
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
