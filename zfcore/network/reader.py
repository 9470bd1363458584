"""Reads a network into stages with torch.fx.

The tracer is fx's, but its proxies carry stages: an operation becomes a stage when it happens, so that sizes
are plain numbers in the model's own code. What the reader does not know stays unread, with the reason, and
counts only for a layer that is computed from it.
"""

from __future__ import annotations

import builtins
import contextlib
import difflib
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as fx_tracing
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import map_aggregate

from zfcore.errors import LayerNotFound, ShapeError, UnsupportedOperation, ZfcoreError
from zfcore.network.geometry import Field
from zfcore.network.guard import Observer, observing
from zfcore.network.operations import (
    FUNCTIONS,
    IN_PLACE_FUNCTIONS,
    METHODS,
    VIEWS,
    Unknown,
    operation_of_module,
    size,
)
from zfcore.network.stages import Stage

# The calls of modules are replaced for the whole process while a model is followed; one model at a time, and
# the reader below lets the calls of other threads through.
_tracing = threading.Lock()


@dataclass
class Network:
    """A network read up to a layer: its stages in the order they run, the input first, the layer last."""

    model: nn.Module
    stages: list[Stage]
    calls: dict[nn.Module, list[object]]  # what each call of a module returned: a stage, or what was not read

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
                    del values[source]
        return values[self.layer]


# ---- Layers by name ----------------------------------------------------------------------------------------


def resolve_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, int | None]:
    """The dotted name of a layer, and which of its calls is meant: None for the last.

    Args:
        layer: a module of the model, or its name; "name@i" means the i-th call, from 0. The model itself
            stands for its output, under the name "".

    Raises:
        LayerNotFound: the model has no such module; the message lists the nearest names.
    """
    names = dict(model.named_modules(remove_duplicate=False))
    if isinstance(layer, nn.Module):
        for name, module in names.items():
            if module is layer:
                return name, None
        raise LayerNotFound(
            f"layer={type(layer).__name__}(...): expected a module of the model, which this is not"
        )
    if not isinstance(layer, str):
        raise LayerNotFound(
            f"layer={layer!r}: expected a module's name or a module, got {type(layer).__name__}"
        )
    name, at, call = layer.rpartition("@")
    if layer in names or not (at and call.isdecimal()):
        name, call = layer, ""
    if name and name in names:
        first = next(
            n for n, module in names.items() if module is names[name]
        )  # the name that a module has first
        return first, int(call) if call else None
    known = [n for n in names if n]
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:8]
    raise LayerNotFound(
        f"layer={layer!r}: the model has no such module; the nearest names are {', '.join(near)}"
    )


# ---- Tracing -----------------------------------------------------------------------------------------------


@dataclass
class _Unread:
    """Stands for what an operation that was not read would have computed."""

    error: ZfcoreError


class _Parts(tuple):
    """Several results of one operation. fx leaves a mark on the node of what a wrapped function returns."""

    node: fx.Node


_PLAIN_FUNCTIONS = (FunctionType, BuiltinFunctionType, type(Tensor.add))


class _Traced(fx.Proxy):
    """A map on its way through the model's code.

    value:  the stage, or why there is none.
    memory: all proxies that may share this one's memory, for operations that work in place.
    """

    _is_param = _is_buffer = False  # what isinstance asks of nn.Parameter and nn.Buffer

    def __init__(self, reader: _Reader, value: Stage | _Unread, memory: list[_Traced]):
        super().__init__(reader.node, reader)
        self.value = value
        self.memory = memory
        memory.append(self)

    @property
    def __class__(self):  # models ask isinstance(x, torch.Tensor), and mean to go on when it is
        return Tensor

    @property
    def stage(self) -> Stage:
        if isinstance(self.value, _Unread):
            raise self.value.error
        return self.value

    @property
    def shape(self):
        return size(self.stage)

    @property
    def ndim(self) -> int:
        return len(self.stage.shape) + 1

    @property
    def dtype(self) -> torch.dtype:
        return self.tracer.dtype

    @property
    def device(self) -> torch.device:
        return self.tracer.device

    @property
    def is_cuda(self) -> bool:
        return self.tracer.device.type == "cuda"

    requires_grad = False

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """As fx has it, for the plain functions that models call; its own search of the arguments is slow."""
        kwargs = kwargs or {}
        if not isinstance(function, _PLAIN_FUNCTIONS):
            return super().__torch_function__(function, types, args, kwargs)
        reader = next((a.tracer for a in _flat((args, kwargs)) if isinstance(a, cls)), None)
        if reader is None:
            return super().__torch_function__(function, types, args, kwargs)
        if torch.overrides.is_tensor_method_or_property(function):
            return reader.create_proxy("call_method", function.__name__, args, kwargs)
        return reader.create_proxy("call_function", function, args, kwargs)

    def _in_place(name):  # noqa: N805
        function = getattr(operator, name)
        return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})

    __iadd__, __isub__, __imul__, __itruediv__ = map(_in_place, ("iadd", "isub", "imul", "itruediv"))
    del _in_place


class _Reader(fx.Tracer):
    def __init__(self, model: nn.Module, image_shape: tuple[int, int, int], dtype, device):
        super().__init__(autowrap_modules=())
        self.model, self.dtype, self.device = model, dtype, device
        self.image_shape = tuple(image_shape)
        self.thread = threading.get_ident()
        self.count = 0  # stages so far
        self.inside: list[FunctionType] = []  # wrapped functions that are being followed
        self.owners: dict[
            Stage, tuple[nn.Module, int]
        ] = {}  # the innermost call of a module that returned it
        self.paths = {module: name for name, module in model.named_modules()}
        self.scopes: list[nn.Module] = [model]
        self.calls: dict[nn.Module, list[object]] = {}  # what each call of a module returned: a stage, or not
        self.failure: ZfcoreError | None = None  # why not all of the model's code was followed
        self.blind: str | None = None  # a module whose inside was not followed
        self.by_call = False  # modules are met where they are called, not in their `_call_impl`

    # -- the model's code

    def read(self) -> None:
        """Follow the model's forward as far as it goes."""
        if refusal := self.refusal(self.model):
            self.failure = UnsupportedOperation(f"{self.described(self.model)} {refusal}")
            return
        try:
            with _attributes_kept(self.paths):
                self.follow()
        except Exception as error:  # tracing runs the user's code on proxies, which may fail in any way
            if self.failure is None:
                self.fail(error, self.scopes[-1])

    def follow(self) -> None:
        """`fx.Tracer.trace`, less what only a graph needs, which takes it longer than all of the rest."""
        _LazyGraphModule.force_recompile(self.model)
        forward = type(self.model).forward
        if not isinstance(forward, FunctionType):
            raise TypeError(f"its forward is a {type(forward).__name__}, not a function")
        self.graph = fx.Graph()
        self.node = self.graph.placeholder("image")
        image = Stage("input", shape=self.image_shape, name="image", field=Field())
        before = getattr(fx_tracing, "_is_fx_tracing_flag", None)  # not every version of torch has it
        if before is not None:
            fx_tracing._is_fx_tracing_flag = True
        try:
            with fx_tracing._new_patcher() as patcher:
                self.follow_calls(patcher)
                fx_tracing._patch_wrapped_functions(patcher)
                out = forward(self.model, _Traced(self, image, []))  # its other arguments keep their defaults
                self.returned(self.model, out)
        finally:
            if before is not None:
                fx_tracing._is_fx_tracing_flag = before

    def follow_calls(self, patcher: object) -> None:
        """From now on the calls of modules go to `call_module`.

        fx replaces nn.Module's __call__; but then Python visits every class of modules there is. What that
        calls is cheap to replace, and does as well where no compiled version of a module is called instead.
        """
        self.by_call = any([m._compiled_call_impl is not None for m in self.paths])
        name = "__call__" if self.by_call else "_call_impl"
        original = getattr(nn.Module, name)

        def call(module, *args, **kwargs):
            return self.call_module(module, functools.partial(original, module), args, kwargs)

        patcher.patch_method(nn.Module, name, call, deduplicate=False)

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if not (args and isinstance(args[0], fx.Proxy)) and not _any_proxy((args, kwargs)):
            return forward(*args, **kwargs)  # a constant of the model, computed as it goes
        self.scopes.append(m)
        try:
            out = self.followed(m, forward, args, kwargs)
        except Exception as error:
            if self.failure is None:
                self.fail(error, m)
            raise
        finally:
            self.scopes.pop()
        self.returned(m, out)
        return out

    def followed(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict):
        refusal = self.refusal(m)
        operation = operation_of_module(m)
        if refusal is None and operation is None and not _is_opaque(m):
            if self.by_call:
                return m._call_impl(*args, **kwargs)  # as `forward`, but never a compiled version of it
            return forward(*args, **kwargs)
        if refusal is not None or operation is None:
            unread = self.unread(refusal or "is not an operation that the engines read")
            inside = next(m.children(), None) is not None
            if inside:
                self.blind = self.blind or str(unread.error)
            changes = inside or refusal is not None or _works_in_place(m)
            return self.lose(unread, (args, kwargs), (args, kwargs) if changes else ())
        if len(args) != 1 or kwargs:
            unread = self.unread("is called with more than one map")
            return self.lose(unread, (args, kwargs), args if _works_in_place(m) else ())
        return self.operate(
            lambda x: operation(x, m), args, {}, in_place=_works_in_place(m),
            view=isinstance(m, (nn.Flatten, nn.Unflatten)),
        )  # fmt: skip

    def refusal(self, m: nn.Module) -> str | None:
        """Why a module's code cannot be followed, whatever it is."""
        if isinstance(m, torch.jit.ScriptModule):
            return "is TorchScript, whose operations cannot be seen"
        if m is self.model and "forward" in vars(m):
            return "has a forward of its own, set on the instance"
        hooks = m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        if hooks or self.meddled(m) and m is not self.model or _hooks_on_all_modules():
            return "has hooks, which may change what it computes"
        return None

    @staticmethod
    def meddled(m: nn.Module) -> bool:
        """Whether a forward hook may change the module's output."""
        hooks = m._forward_hooks
        return bool(hooks) and not all(isinstance(hook, Observer) for hook in hooks.values())

    def returned(self, m: nn.Module, out: object) -> None:
        value = self.value_of(out)
        calls = self.calls.setdefault(m, [])
        if isinstance(value, Stage) and m is not self.model:
            self.owners.setdefault(value, (m, len(calls)))
        calls.append(value)

    def fail(self, error: Exception, where: nn.Module) -> None:
        if isinstance(error, ZfcoreError):
            self.failure = error
            return
        self.failure = UnsupportedOperation(
            f"{self.described(where)} cannot be traced: {type(error).__name__}: {error}"
        )
        self.failure.__cause__ = error

    def described(self, module: nn.Module) -> str:
        """How an error names a module: 'features.3' (Foo)."""
        return f"'{self.paths.get(module, '')}' ({type(module).__name__})"

    # -- its operations

    def create_proxy(self, kind, target, args, kwargs, name=None, type_expr=None, proxy_factory_fn=None):
        if kind == "call_method":
            operation, label = METHODS.get(target), f"Tensor.{target}"
            in_place = target.endswith("_") and not target.endswith("__")
        elif kind == "call_function" and target is not builtins.getattr:
            operation, in_place = (
                FUNCTIONS.get(target),
                target in IN_PLACE_FUNCTIONS or _changes_input(target),
            )
            module = (getattr(target, "__module__", None) or "torch").removeprefix("_operator")
            label = f"{module}.{getattr(target, '__name__', target)}".removeprefix(".")
        else:
            raise UnsupportedOperation(f"{self.described(self.scopes[-1])}: {kind} {args[1:]} is not read")
        if operation is None and self.is_wrapped(target):
            self.inside.append(target)
            try:
                return target(*args, **kwargs)  # fx.wrap() makes it a leaf; its code may be read all the same
            finally:
                self.inside.pop()
        kwargs = dict(kwargs)
        in_place = kwargs.pop("inplace", False) is True or in_place
        if operation is None or "out" in kwargs:
            unread = self.unread(f"calls {label}, which is not an operation that the engines read")
            return self.lose(unread, (args, kwargs), (args[:1] if in_place else (), kwargs.get("out")))
        return self.operate(operation, args, kwargs, in_place, operation in VIEWS, label)

    def is_wrapped(self, target: object) -> bool:
        """Whether this is a Python function of a model's, and not on its way already."""
        own = isinstance(target, FunctionType) and not target.__module__.startswith("torch.")
        return own and target not in self.inside

    def operate(self, operation, args, kwargs, in_place=False, view=False, label=""):
        """The result of an operation: a proxy, or numbers."""
        given, changed = (args, kwargs), args[:1] if in_place else ()
        for a in _flat(given):
            if isinstance(a, fx.Proxy) and isinstance(value := self.value_of(a), _Unread):
                return self.lose(value, given, changed)
        values = map_aggregate((args, kwargs), lambda a: a.value if isinstance(a, _Traced) else a)
        try:
            result = operation(*values[0], **values[1])
        except (Unknown, TypeError) as error:
            why = f" ({error})" if str(error) else ""
            what = f"calls {label} in a way" if label else "is an operation"
            return self.lose(self.unread(f"{what} that the engines do not read{why}", error), given, changed)
        except ShapeError as error:
            return self.lose(
                _Unread(ShapeError(f"{self.described(self.scopes[-1])}: {error}")), given, changed
            )
        source = args[0] if args else None
        memory = source.memory if view and isinstance(source, _Traced) else None
        if isinstance(result, tuple) and any(isinstance(part, Stage | Unknown) for part in result):
            parts = _Parts(
                self.wrap(
                    self.add(part, label) if isinstance(part, Stage) else self.unread(str(part)), memory
                )
                for part in result
            )
            parts.node = self.node
            return parts
        if not isinstance(result, Stage):
            return result
        if isinstance(source, _Traced) and result is source.value:  # dropout and the like
            return source
        if in_place and not isinstance(source, _Traced):
            return self.wrap(self.unread(f"calls {label} on a tensor of its own, which it would change"))
        self.add(result, label)
        if in_place:
            return self.replace(source, result)
        return self.wrap(result, memory)

    def add(self, stage: Stage, label: str) -> Stage:
        self.count += 1
        stage.index = self.count
        stage.name = f"{self.paths.get(self.scopes[-1], '')}:{label.rpartition('.')[2]}"
        return stage

    def replace(self, proxy: _Traced, stage: Stage):
        """An operation in place: all that share the map's memory see its result from now on."""
        old = proxy.value
        for other in proxy.memory:
            if other.value is old:
                other.value = stage
            else:  # another view of the same memory
                other.value = self.unread("works in place on a map of which a view is in use")
        return proxy

    def value_of(self, a: object) -> object:
        """The stage of a proxy, or why there is none; of anything else the name of its type."""
        source = _root(a)
        if not isinstance(source, _Traced):
            return type(a).__name__
        if source is a or isinstance(source.value, _Unread):
            return source.value
        return self.unread(f"reads Tensor.{a.attr}, which the engines do not")

    def lose(self, value: _Unread, given: object, changed: object) -> _Traced:
        """The result of what was not read.

        It may share memory with all that was given, and `changed` is unread too.
        """
        memory: list[_Traced] = []
        for proxy in map(_root, _flat(given)):
            if isinstance(proxy, _Traced) and proxy.memory is not memory:
                memory.extend(proxy.memory)
                for other in proxy.memory.copy():
                    other.memory = memory
        for proxy in map(_root, _flat(changed)):
            if isinstance(proxy, _Traced):
                for other in proxy.memory:
                    other.value = value
        return self.wrap(value, memory)

    def wrap(self, value: Stage | _Unread, memory: list[_Traced] | None = None) -> _Traced:
        return _Traced(self, value, [] if memory is None else memory)

    def unread(self, why: str, cause: Exception | None = None) -> _Unread:
        error = UnsupportedOperation(f"{self.described(self.scopes[-1])} {why}")
        error.__cause__ = cause
        return _Unread(error)

    # -- what fx would do with attributes: parameters are tensors here, and constants stay where they are

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        return attr_val

    def create_arg(self, a):
        return None


def _root(value: object) -> object:
    """The map that an attribute, as x.T, is read from."""
    while issubclass(type(value), fx.proxy.Attribute):
        value = value.root
    return value


_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in (
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "imatmul",
        "iand",
        "ior",
        "ixor",
        "setitem",
    )
)


def _changes_input(function: Callable) -> bool:
    """Whether a function works in place, as relu_ and iadd do."""
    name = getattr(function, "__name__", "")
    return function in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


def _flat(value: object) -> list[object]:
    """What lists, tuples and dicts hold. isinstance would ask a map for its __class__, which takes longer."""
    found, rest = [], [value]
    while rest:
        part = rest.pop()
        kind = type(part)
        if issubclass(kind, (tuple, list)):
            rest.extend(reversed(part))
        elif issubclass(kind, dict):
            rest.extend(reversed(part.values()))
        else:
            found.append(part)
    return found


def _any_proxy(value: object) -> bool:
    return any([isinstance(part, fx.Proxy) for part in _flat(value)])


def _works_in_place(module: nn.Module) -> bool:
    """Whether its attribute `inplace` is True; nn.Module takes long to say that it has no such attribute."""
    if "inplace" not in module.__dict__ and not hasattr(type(module), "inplace"):
        return False
    return module.inplace is True


def _is_opaque(module: nn.Module) -> bool:
    """Whether fx would not look inside: torch's own modules but the containers."""
    own = type(module).__module__.startswith("torch.nn.") and "forward" not in vars(module)
    return own and not isinstance(module, nn.Sequential)


def _hooks_on_all_modules() -> bool:
    hooks = torch.nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


@contextlib.contextmanager
def _attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Proxies that the model's code sets on its modules while it is traced are taken back."""
    kept = [(module.__dict__, module.__dict__.copy()) for module in modules]
    try:
        yield
    finally:
        for now, before in kept:
            if len(now) == len(before) and all(map(operator.is_, now.values(), before.values())):
                continue
            for name in [name for name, value in now.items() if before.get(name, kept) is not value]:
                if _any_proxy(now[name]):
                    del now[name]
                    if name in before:
                        now[name] = before[name]


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


# ---- Reading -----------------------------------------------------------------------------------------------


def read_network(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    layer: str | nn.Module | None = None,
    example: Tensor | None = None,
) -> Network:
    """Read a model up to `layer` (default: its output) for images of `image_shape`.

    The model should be in eval mode (`evaluating`), since its code may ask.

    Args:
        model: takes one image batch [N, C, H, W]; its other arguments keep their defaults.
        image_shape: (C, H, W) of the images, in pixels.
        layer: a module or its dotted name; of a module called several times the last call, "name@i" for
        another.
        example: an image batch on which the model may be run, where not all of its code can be followed, to
            count the layer's calls; without one such a layer is refused.

    Raises:
        LayerNotFound: there is no such layer, or it is never called.
        ShapeError: images of this shape do not fit the layers up to this one.
        UnsupportedOperation: an operation on the way to the layer, named in the message, is not one the
        engines read.
    """
    name, call = resolve_layer(model, layer) if layer is not None else ("", None)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    reader = _Reader(model, image_shape, parameter.dtype, parameter.device)
    with _tracing, torch.no_grad():
        reader.read()
    module = model.get_submodule(name)
    calls = reader.calls.get(module, [])
    label = name if call is None else f"{name}@{call}"
    if call is None or call >= len(calls):
        _check_all_seen(reader, module, label, calls, example if call is None else None)
    if not calls:
        raise LayerNotFound(f"layer={label!r}: expected a layer that the model calls on its way")
    if call is not None and call >= len(calls):
        raise LayerNotFound(f"layer={label!r}: the model calls {name!r} {len(calls)} times, from @0")
    if module is model and reader.meddled(model):
        raise UnsupportedOperation(f"{reader.described(model)} has hooks, which may change what it computes")
    found = calls[-1 if call is None else call]
    if isinstance(found, _Unread):
        raise found.error
    if not isinstance(found, Stage):
        raise UnsupportedOperation(f"{reader.described(module)} returns a {found}, expected a map")
    stages = _up_to(found)
    for index, stage in enumerate(stages):
        stage.index = index
        stage.field = _field_of(stage) if stage.inputs else stage.field
        if stage in reader.owners:
            owner, i = reader.owners[stage]
            path = reader.paths.get(owner, type(owner).__name__)
            stage.name = path if len(reader.calls[owner]) == 1 else f"{path}@{i}"
    if stages[0].kind != "input":
        raise UnsupportedOperation(f"{label!r} is not computed from the images")
    return Network(model, stages, reader.calls)


def _check_all_seen(
    reader: _Reader, module: nn.Module, label: str, calls: list[object], example: Tensor | None
) -> None:
    """Refuse a layer that may be called, for the first time or again, where the model was not followed."""
    if reader.failure is None and (reader.blind is None or module is reader.model):
        return
    if calls and example is not None:
        outputs: list[object] = []
        with observing(module, outputs.append), torch.no_grad():
            reader.model(example.clone())
        if len(outputs) == len(calls):
            return
    if reader.failure is not None:
        raise reader.failure
    if not calls:
        raise UnsupportedOperation(f"{reader.blind}; it is not followed, and {label!r} may be called inside")
    raise UnsupportedOperation(f"{reader.blind}; it is not followed, and may call {label!r} too")


def _up_to(layer: Stage) -> list[Stage]:
    """The layer and all that it is computed from, in the order they run."""
    keep, queue = {layer}, [layer]
    while queue:
        for source in queue.pop().inputs:
            if source not in keep:
                keep.add(source)
                queue.append(source)
    return sorted(keep, key=lambda stage: stage.index)
