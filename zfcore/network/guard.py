"""A model in eval mode for an analysis, and as it was afterwards, also when several threads share it."""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zfcore import forks
from zfcore.kinds import check_memory, unusual

_lock = threading.RLock()  # a finaliser that the collector runs inside may need it too


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


forks.renewed(_renew_lock)

_holds: dict[int, _Hold] = {}  # by the id of the module, which lives as long as it is held


class _Hold:
    """Which calls hold a module in eval mode, and its mode before the first of them."""

    __slots__ = ("module", "users", "training")

    def __init__(self, module: nn.Module):
        self.module = module
        self.users: set[object] = set()
        self.training = module.training


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode. Each module's own mode comes back when the last call that holds it ends.

    Held module by module, so that calls on a model and on a part of it do not disturb one another. Only the
    training flags are touched, and not by ``eval()``, which a model may override with more than that:
    parameters, buffers, gradients, hooks and random state are not.
    """
    modules = list(model.modules())
    leave = functools.partial(_let_go, modules, user := object())
    try:
        forks.entered(leave)
        with _lock:
            for module in modules:
                hold = _holds.get(id(module))
                if hold is None:
                    hold = _holds[id(module)] = _Hold(module)
                hold.users.add(user)
                if module.training:
                    module.training = False
        yield model
    finally:
        forks.left(leave)


def _let_go(modules: list[nn.Module], user: object) -> None:
    with _lock:
        for module in modules:  # each step of which can be done twice
            hold = _holds.get(id(module))
            if hold is None:
                continue
            hold.users.discard(user)
            if not hold.users:
                if module.training != hold.training:
                    module.training = hold.training
                _holds.pop(id(module), None)


recording = threading.local()  # `record`: what this thread's forward of a model is recorded by, if it is


class Observer:
    """A forward hook that calls ``see(output)`` in the thread that made it, and changes nothing.

    The reader knows it: a module that is observed, in this thread or another, is no less readable, and a forward
    that is recorded, whose tensors hold no values, is not shown.
    """

    def __init__(self, see: Callable[[object], None]):
        self.see = see
        self.thread = threading.get_ident()

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if threading.get_ident() == self.thread and getattr(recording, "record", None) is None:
            self.see(output)


@contextlib.contextmanager
def observing(module: nn.Module, see: Callable[[object], None]) -> Iterator[None]:
    """Calls ``see`` with every output of the module in this thread."""
    handle = module.register_forward_hook(Observer(see))
    try:
        yield
    finally:
        handle.remove()


# ---- What a model keeps ------------------------------------------------------------------------------------

_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device))
_CONTAINERS = frozenset((dict, OrderedDict, list, set))
_keeps: dict[int, Kept] = {}  # by the id of the model, which lives as long as it is held


def _random_state() -> Callable[[], None]:
    """What sets every generator that a model may draw from to where it is now."""
    state, own, theirs = torch.get_rng_state(), random.getstate(), numpy.random.get_state(legacy=False)
    there = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore() -> None:
        # Setting a state takes longer than seeing that it has not moved.
        if not torch.equal(torch.get_rng_state(), state):
            torch.set_rng_state(state)
        if random.getstate() != own:
            random.setstate(own)
        now = numpy.random.get_state(legacy=False)["state"]
        if now["pos"] != theirs["state"]["pos"] or not numpy.array_equal(now["key"], theirs["state"]["key"]):
            numpy.random.set_state(theirs)
        if there is not None:
            torch.cuda.set_rng_state_all(there)

    return restore


_GENERATORS = (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)


def _state_of(generator: object) -> Callable[[], None]:
    """What sets a generator of the model's own to where it is now."""
    if isinstance(generator, numpy.random.Generator):
        return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    return functools.partial(generator.set_state, generator.get_state())


def _refill(container: dict | list | set | deque, before: dict | list | set) -> None:
    """Gives a container what it held, writing no more than it has to: other threads may read it."""
    if isinstance(container, set):
        if container != before:
            container.clear()
            container.update(before)
        return
    now, held = (container, before) if isinstance(before, list) else (container.values(), before.values())
    if len(now) == len(held) and all(map(operator.is_, now, held)):
        return
    if isinstance(before, list):
        container.clear()
        container.extend(before)
        return
    for name in [name for name in container if name not in before]:
        del container[name]
    for name, value in before.items():
        if name not in container or container[name] is not value:
            container[name] = value
    if list(container) != list(before):
        container.clear()
        container.update(before)


class Kept:
    """What a model's modules hold, the random state of the process, and values from before they are written."""

    def __init__(self, model: nn.Module):
        self.users: set[object] = set()  # the calls that hold it
        self.containers: list[tuple] = []  # each, and what it held
        self.empty: list = []  # containers that held nothing
        self.hooks: list[tuple[dict, dict]] = []  # likewise, forward hooks but for observers, which come and go
        self.tensors: list[tuple[Tensor, bool]] = []  # each, and its requires_grad
        self.grads: list[tuple[Tensor, Tensor | None]] = []  # of parameters
        self.written: dict[int, tuple[Tensor, Tensor]] = {}  # by storage, or tensor: its bytes or itself, and a copy
        self.storages: set[int] | None = None  # of the tensors; found when the first one is written
        self.seen: set[int] = set()
        self.generators: dict[int, Callable[[], None]] = {}  # what puts each back
        for module in model.modules():
            self.keep_module(module)
        self.random = _random_state()

    def keep_module(self, module: nn.Module) -> None:
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        attributes = module.__dict__
        before = attributes.copy()  # at once: other threads' forwards may add to it
        self.containers.append((attributes, before))
        rest = []
        for name, value in before.items():
            kind = type(value)
            if kind in _PLAIN:
                continue
            if kind in _CONTAINERS and not value:  # most of what an nn.Module has
                if name != "_forward_hooks":
                    self.empty.append(value)
            elif kind is dict and name in ("_parameters", "_buffers"):
                self.containers.append((value, value.copy()))
                parameters = name == "_parameters"
                for tensor in value.values():
                    if tensor is not None:
                        self.tensors.append((tensor, tensor.requires_grad))
                        if parameters:
                            self.grads.append((tensor, tensor.grad))
            elif kind is dict and name == "_modules":
                self.containers.append((value, value.copy()))
            elif name != "_forward_hooks":
                rest.append(value)
        hooks = attributes["_forward_hooks"]
        self.hooks.append((hooks, {key: hook for key, hook in hooks.items() if not isinstance(hook, Observer)}))
        if rest:
            self.keep(rest, type(module).__module__.partition(".")[0])

    def keep(self, values: list, package: str) -> None:
        """Values that a module of a package holds, and what is in them."""
        while values:
            value = values.pop()
            kind = type(value)
            if kind in _PLAIN:
                continue
            if isinstance(value, dict):
                if id(value) not in self.seen:
                    self.seen.add(id(value))
                    self.containers.append((value, dict(value)))
                    values.extend(value.values())
            elif isinstance(value, Tensor):
                self.tensors.append((value, value.requires_grad))
            elif isinstance(value, list | set | deque):
                if id(value) not in self.seen:
                    self.seen.add(id(value))
                    self.containers.append((value, set(value) if isinstance(value, set) else list(value)))
                    values.extend(value)
            elif isinstance(value, tuple):
                values.extend(value)
            elif isinstance(value, nn.Module):
                self.keep_module(value)
            elif isinstance(value, _GENERATORS):
                self.keep_generator(value)
            elif kind is SimpleNamespace or package != "torch" and kind.__module__.partition(".")[0] == package:
                values.append(getattr(value, "__dict__", None))  # an object of the model's own code

    def keep_generator(self, generator: object) -> None:
        if id(generator) not in self.generators:
            self.generators[id(generator)] = _state_of(generator)

    def watching(self) -> contextlib.AbstractContextManager:
        """Runs operations so that the values of tensors that the model held are kept when they are written to."""
        return _Writes(self)

    def save(self, tensor: Tensor) -> None:
        """Called before a tensor is written to."""
        if unusual(tensor):
            self.save_whole(tensor)
            return
        if self.storages is None:
            self.storages = {t.untyped_storage()._cdata for t, _ in self.tensors if not unusual(t)}
        storage = tensor.untyped_storage()
        with _lock:  # another thread's copy, taken after this one's write, would be of what was written
            if storage._cdata in self.storages and storage._cdata not in self.written:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                self.written[storage._cdata] = whole, whole.clone()

    def save_whole(self, tensor: Tensor) -> None:
        """One of a kind that has no bytes in memory that could be copied."""
        with _lock:
            if id(tensor) not in self.written and any(tensor is t for t, _ in self.tensors) and not tensor.is_meta:
                self.written[id(tensor)] = tensor, tensor.clone()

    def restore(self) -> None:
        for container, before in self.containers:
            _refill(container, before)
        for container in self.empty:
            if container:
                container.clear()
        for hooks, before in self.hooks:
            if hooks or before:
                _refill(hooks, before | {key: hook for key, hook in hooks.items() if isinstance(hook, Observer)})
        for tensor, requires_grad in self.tensors:
            if tensor.requires_grad and not requires_grad and not tensor._is_view():
                tensor.detach_()  # written to under autograd
            elif tensor.requires_grad != requires_grad and tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
        for parameter, grad in self.grads:
            if parameter.grad is not grad:
                parameter.grad = grad
        for put_back in self.generators.values():
            put_back()
        with torch.inference_mode():  # which may write to tensors of either kind
            for whole, values in self.written.values():
                if not unusual(whole) or unusual(values):  # else it was freed since
                    whole.copy_(values)
        self.random()


class _Writes(TorchDispatchMode):
    """Shows tensors to a `Kept` before an operation writes to them, in this thread only."""

    supports_higher_order_operators = True

    def __init__(self, kept: Kept):
        super().__init__()
        self.kept = kept

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes a second, to have this mode skipped by it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        check_memory(function, args)
        schema = getattr(function, "_schema", None)  # higher order operators have none
        if schema is not None and schema.is_mutable:
            for index, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[index] if index < len(args) else kwargs.get(argument.name)
                    for each in value if isinstance(value, list | tuple) else (value,):
                        if isinstance(each, Tensor):
                            self.kept.save(each)
        return function(*args, **kwargs)


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[Kept]:
    """Whatever runs inside, the model's attributes and containers, and the random state, are afterwards as before.

    The values of its tensors too, where they are written to in ``watching()`` of what this gives. Where threads share
    the model, that is when the last call that holds it ends.
    """
    leave = functools.partial(_release, id(model), user := object())
    try:
        forks.entered(leave)
        with _lock:
            kept = _keeps.get(id(model))
            if kept is None:
                kept = _keeps[id(model)] = Kept(model)
            kept.users.add(user)
        yield kept
    finally:
        forks.left(leave)


def _release(number: int, user: object) -> None:
    with _lock:
        kept = _keeps.get(number)
        if kept is None:
            return
        kept.users.discard(user)
        if not kept.users:  # which can be done twice
            kept.restore()
            _keeps.pop(number, None)


# ---- Arithmetic --------------------------------------------------------------------------------------------


class _Products:
    """What products of fp32 may round to, "exact" (nothing) or "tf32", and the same bits twice.

    These switches are the process's, so the first user turns them and the last one turns them back. While any call wants
    exact products, all have them: TF32 is a permission.
    """

    def __init__(self) -> None:
        self.users: dict[str, set[object]] = {"exact": set(), "tf32": set()}
        self.turned: str | None = None
        self.undo = contextlib.ExitStack()

    @contextlib.contextmanager
    def of(self, precision: str) -> Iterator[None]:
        user = object()
        leave = functools.partial(self.turn_for, precision, user, False)
        try:
            forks.entered(leave)
            self.turn_for(precision, user, True)
            yield
        finally:
            forks.left(leave)

    def turn_for(self, precision: str, user: object, wants: bool) -> None:
        with _lock:
            users = self.users[precision]
            (users.add if wants else users.discard)(user)
            wanted = next((name for name, each in self.users.items() if each), None)
            if wanted != self.turned:
                self.undo.close()
                self.turned = wanted
                if wanted is not None:
                    self.turn_to(wanted == "tf32")

    def turn_to(self, tf32: bool) -> None:
        older, newer = ("high", "tf32") if tf32 else ("highest", "ieee")
        backends = torch.backends
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:  # set by the newer switches, of which the older one cannot speak
            for owner in (backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv):
                self.turn(owner, "fp32_precision", newer)
        else:
            if before != older:
                torch.set_float32_matmul_precision(older)
                self.undo.callback(torch.set_float32_matmul_precision, before)
        self.turn(backends.cudnn, "deterministic", True)
        with contextlib.suppress(RuntimeError):  # where convolutions were set apart from RNNs, by the newer switches
            self.turn(backends.cudnn, "allow_tf32", tf32)
        # The older switch leaves these to what a wider one of the newer says.
        for owner in (backends.cudnn.conv, backends.cudnn.rnn):
            self.turn(owner, "fp32_precision", newer)

    def turn(self, owner: object, name: str, value: object) -> None:
        before = getattr(owner, name)
        if before != value:
            setattr(owner, name, value)
            self.undo.callback(setattr, owner, name, before)


_products = _Products()


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """The model's own precision, whatever autocast or TF32 setting surrounds the call."""
    with torch.autocast(device.type, enabled=False), _products.of("exact"):
        yield


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """How the model's own operations compute: "exact"; "tf32", which only GPUs have; or "bf16", under autocast."""
    if precision == "bf16":
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    elif precision == "tf32" and device.type == "cuda":
        with torch.autocast(device.type, enabled=False), _products.of("tf32"):
            yield
    else:
        with exact_arithmetic(device):
            yield
