"""Reads a network into stages: what a record of its forward holds, up to a layer."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zfcore.errors import LayerNotFound, ShapeError, UnsupportedOperation
from zfcore.network.counting import IMAGES, IMAGES_ON_A_GPU, MOST
from zfcore.network.geometry import Field
from zfcore.network.guard import Observer, kept, observing
from zfcore.network.layers import fixed_batch, resolve_layer
from zfcore.network.record import Record, alike
from zfcore.network.stages import Stage
from zfcore.network.values import Loose, Unread


@dataclass
class Network:
    """A network read up to a layer: its stages in the order they run, the input first, the layer last.

    calls:   what each call of a module returned: a stage, or what was not read.
    rebuild: makes what the model returns of the last stage's values, where that is more than one tensor.
    """

    model: nn.Module
    stages: list[Stage]
    calls: dict[nn.Module, list[object]]
    rebuild: Callable[[Tensor], object] | None = None

    def returned(self, rows: Tensor) -> object:
        """What the model returns, of the last stage's values."""
        return rows if self.rebuild is None else self.rebuild(rows)

    @property
    def layer(self) -> Stage:
        return self.stages[-1]

    def consumers(self) -> dict[Stage, list[Stage]]:
        """Who reads each stage."""
        readers: dict[Stage, list[Stage]] = {stage: [] for stage in self.stages}
        for stage in self.stages:
            for source in stage.inputs:
                readers[source].append(stage)
        return readers

    def forward(self, images: Tensor, compute: Callable[[Stage, list[Tensor]], Tensor]) -> Tensor:
        """The layer's value, every stage's being compute(stage, its inputs), dropped once nothing reads it."""
        values: dict[Stage, Tensor] = {}
        waiting = {stage: len(readers) for stage, readers in self.consumers().items()}
        for stage in self.stages:
            inputs = [values[source] for source in stage.inputs]
            values[stage] = images if stage.kind == "input" else compute(stage, inputs)
            for source in stage.inputs:
                waiting[source] -= 1
                if not waiting[source]:
                    values.pop(source, None)
        return values[self.layer]


def read_network(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    layer: str | nn.Module | None = None,
    example: Tensor | None = None,
    *,
    gradient: bool = False,
) -> Network:
    """Read a model up to `layer` (default: its output) for images of `image_shape`.

    The model should be in eval mode (`evaluating`), since its code may ask.

    Args:
        model: takes one image batch [N, C, H, W]; its other arguments keep their defaults.
        image_shape: (C, H, W) of the images, in pixels.
        layer: a module or its dotted name; of a module called several times the last call, "name@i" for
            another.
        example: an image batch on which the model may be run, where not all of its code can be followed, to
            count the layer's calls, and where foreign hooks are to see values; without one such a layer is refused.
        gradient: the way down is asked for too: what autograd would not pass (`no_grad`, `detach`, hooks on
            gradients) is refused, and custom autograd functions keep their own backward.

    Raises:
        LayerNotFound: there is no such layer, or it is never called.
        ShapeError: images of this shape do not fit the layers up to this one.
        UnsupportedOperation: an operation on the way to the layer, named in the message, is not one the
            engines read.
    """
    name, call = resolve_layer(model, layer) if layer is not None else ("", None)
    module = dict(model.named_modules(remove_duplicate=False))[name]
    # The first forward of a model says how often a layer is called; from then on a forward is followed up to it.
    single = layer is not None and call is None and module is not model and _is_called_once(model, image_shape, module)
    until = None if layer is None or module is model else 0 if single else call
    record = _recorded(model, image_shape, example, gradient, None if until is None else (module, until))
    if until is None and record.failure is None:
        _remember(model, image_shape, record)
    calls = record.calls.get(module, [])
    label = name if call is None else f"{name}@{call}"
    if record.failure is not None and (call is None or call >= len(calls)):
        _check_all_seen(record, module, calls, example if call is None else None)
    if not calls and isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedOperation(f"{record.described(module)} is TorchScript, inside which calls cannot be seen")
    if not calls:
        raise LayerNotFound(f"layer={label!r}: expected a layer that the model calls on its way")
    if call is not None and call >= len(calls):
        raise LayerNotFound(f"layer={label!r}: the model calls {name!r} {len(calls)} times, from @0")
    found, rebuild = calls[-1 if call is None else call], None
    if layer is None and isinstance(found, str) and found != "constant":
        found, rebuild = _joined(record)
    if isinstance(found, Unread):
        raise found.error
    if found == "constant":
        raise UnsupportedOperation(f"{label!r} is not computed from the images")
    if not isinstance(found, Stage):
        what = found
        if isinstance(found, Loose):
            what = f"tensor of {found.dtype}" if found.plain else "tensor whose images are not its first axis"
        raise UnsupportedOperation(f"{record.described(module)} returns a {what}, expected a map")
    stages = _up_to(found)
    for index, stage in enumerate(stages):
        stage.index = index
        stage.field = _field_of(stage) if stage.inputs else Field()
        if stage in record.owners:
            owner, i = record.owners[stage]
            path = record.paths.get(owner, type(owner).__name__)
            stage.name = path if len(record.calls[owner]) == 1 else f"{path}@{i}"
    return Network(model, stages, record.calls, rebuild)


# By model: the pictures' shape and what the model was like when a whole forward was recorded, and the modules that were
# called once.
_seen: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, set[int]]] = weakref.WeakKeyDictionary()


def _likeness(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple:
    """What a model would not have kept if its forward had another way to go: its modules, their code and attributes."""
    parts: list[object] = [image_shape]
    for module in model.modules():
        kind = type(module)
        parts += (id(module), id(kind if isinstance(module, torch.jit.ScriptModule) else kind.forward))
        parts += map(id, list(module.__dict__.values()))  # a list at once: other threads' forwards may add to it
        parts += map(id, list(module._modules.values()))
    return tuple(parts)


def _is_called_once(model: nn.Module, image_shape: tuple[int, int, int], module: nn.Module) -> bool:
    likeness, once = _seen.get(model, (None, ()))
    return id(module) in once and likeness == _likeness(model, image_shape)


def _remember(model: nn.Module, image_shape: tuple[int, int, int], record: Record) -> None:
    once = {id(module) for module, calls in record.calls.items() if len(calls) == 1}
    _seen[model] = _likeness(model, image_shape), once


def _recorded(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    example: Tensor | None,
    gradient: bool,
    until: tuple[nn.Module, int] | None,
) -> Record:
    """until: a module, and which of its calls is the last to be followed."""
    tensors = itertools.chain(model.parameters(), model.buffers(), () if example is None else (example,))
    parameter = next((each for each in tensors if each.is_floating_point()), torch.empty(0))
    hooked = _hooked(model)
    if hooked is not None and (example is None or not len(example)):
        name = next(name for name, module in model.named_modules() if module is hooked)
        raise UnsupportedOperation(f"'{name}' ({type(hooked).__name__}) has hooks, which may change what it computes")
    place = (model, image_shape, parameter.dtype, parameter.device, gradient, example[:1] if hooked is not None else None)
    fixed = fixed_batch(model)
    with torch.inference_mode(False), _own_precision(parameter.device):
        record = Record(*place, fixed or (IMAGES if parameter.device.type == "cpu" else IMAGES_ON_A_GPU), until)
        record.run()
        done: set[int] = set()
        wanted = record.count.numbers() - {record.images} if fixed is None else set()
        while wanted - done and not isinstance(record.failure, ShapeError):
            images = min(wanted - done)
            other = Record(*place, images, until)
            other.guide = record.choices if images == 1 else None
            if images <= MOST:
                other.run()
            same = (record.failure is None) == (other.failure is None)
            if images > MOST or not (same and alike(record.log, other.log, single=images == 1)):
                record.failure = UnsupportedOperation(
                    f"{record.described(model)} computes what depends on the number of images"
                )
                record.calls = {}
                break
            record.others.append(other)
            done.add(images)
            wanted |= other.count.numbers() - {record.images}
    return record


def _own_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """The model's, whatever autocast surrounds the call."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def _hooked(model: nn.Module) -> nn.Module | None:
    """A module whose hooks are the user's, and would see the tensors of a record, which hold no values."""
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return model
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                home = getattr(hook if isinstance(hook, FunctionType) else type(hook), "__module__", None) or ""
                if not (isinstance(hook, Observer) or home.startswith(("torch.nn.utils", "torch.export"))):
                    return module
    return None


def _check_all_seen(record: Record, module: nn.Module, calls: list[object], example: Tensor | None) -> None:
    """Refuse a layer that may be called, for the first time or again, after the forward was lost."""
    if isinstance(record.failure, ShapeError) and calls and module is not record.model:
        return  # no forward goes on from there
    if calls and example is not None and len(example) and module is not record.model:
        outputs: list[object] = []
        with kept(record.model) as held, held.watching(), observing(module, outputs.append), torch.no_grad():
            # Where the model itself fails, no forward goes on from there either.
            with contextlib.suppress(Exception):
                record.model(example.clone())
        if len(outputs) == len(calls):
            return
    raise record.failure


def _joined(record: Record) -> tuple[object, Callable[[Tensor], object] | None]:
    """What a model returns besides one tensor: its maps in one row, and how to lay them out again."""
    parts, structure = pytree.tree_flatten(record.output)
    with record.unseen():
        values = [record.value_of(part) if isinstance(part, Tensor) else None for part in parts]
    lost = next((v for v in values if isinstance(v, Unread)), None)
    if lost is not None:
        return lost, None
    others = [pytree.tree_leaves(other.output) for other in record.others]
    for constants in ([part for part, v in zip(each, values, strict=False) if v is None] for each in others):
        ours = [part for part, v in zip(parts, values, strict=True) if v is None]
        if not alike([("", tuple(ours), {})], [("", tuple(constants), {})]):
            return record.unread("returns what depends on the number of images besides"), None
    stages = [v for v in values if v is not None]
    kind = type(record.output).__name__
    if not stages or not all(isinstance(v, Stage) for v in stages) or len(parts) == 1 and parts[0] is record.output:
        return kind, None
    lengths = [torch.Size(stage.shape).numel() for stage in stages]

    def rebuild(rows: Tensor) -> object:
        maps = iter(row.reshape(len(rows), *stage.shape) for row, stage in zip(rows.split(lengths, 1), stages, strict=True))
        made = [next(maps) if v is not None else part for part, v in zip(parts, values, strict=True)]
        return pytree.tree_unflatten(made, structure)

    row = Stage(
        "map", list(stages), lambda *maps: torch.cat([m.flatten(1) for m in maps], 1), (sum(lengths),), name="outputs"
    )
    return record.named(row, "outputs"), rebuild


def _up_to(layer: Stage) -> list[Stage]:
    """The layer and all that it is computed from, in the order they run."""
    keep, queue = {layer}, [layer]
    while queue:
        for source in queue.pop().inputs:
            if source not in keep:
                keep.add(source)
                queue.append(source)
    return sorted(keep, key=lambda stage: stage.index)


def _field_of(stage: Stage) -> Field | None:
    """What a position of the stage's output sees of the picture."""
    fields = [source.field for source in stage.inputs]
    if stage.kind == "map" or any(f is None for f in fields) or len(stage.shape) != 3:
        return None
    if stage.window is not None:
        return fields[0].above(stage.window)
    merged = fields[0]
    for other in fields[1:]:
        merged = merged and merged.union(other)
    return merged
