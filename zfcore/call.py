"""What every method does with its model and images before it starts, and while the model's own code runs."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import UninitializedTensorMixin, is_lazy

from zfcore import forks
from zfcore.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedOperation, ZfcoreError
from zfcore.kinds import Freed, plain, unusual, without_values
from zfcore.network.guard import recording

_INSIDE = ("_orig_mod", "module")  # what the wrappers call the network that they hold


# ---- The model ---------------------------------------------------------------------------------------------


def check_surroundings() -> None:
    """Refuses a call from inside of what does not compute with values: it would be left out, or its result be fixed.

    Raises: UnsupportedOperation.
    """
    around = ""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        around = "a transform of torch.func (vmap, grad, jvp and the like)"
    elif torch._C._get_tracing_state() is not None:
        around = "torch.jit.trace"
    elif type(found := torch.empty(0, device="cpu")) is not Tensor:
        around = f"a mode that makes every tensor a {type(found).__name__}"
    if around:
        raise UnsupportedOperation(f"called inside {around}; expected a call outside of it, on tensors that hold values")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of torch.compile, of data parallelism and of averaged weights.

    Raises: DtypeError, for what is no module; ArgumentError, for one that has no shapes yet or needs more than images;
    DeviceError, for one on the meta device; UnsupportedOperation, for one that forward-mode derivatives are taken of.
    """
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model: a {type(model).__name__}; expected a torch.nn.Module")
    while isinstance(inside := _inside(model), nn.Module):
        model = inside
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharding = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    with torch._C.DisableTorchFunctionSubclass():  # what a tensor's own class says of it may fail
        for module in model.modules():
            if isinstance(module, sharding):
                raise UnsupportedOperation(
                    f"model: a {type(module).__name__} puts its parameters together and frees them as it runs; expected a "
                    "model with whole parameters, such as one that its full state dict was loaded into"
                )
            for value in (*module._parameters.values(), *module._buffers.values()):
                if value is None:
                    continue
                if value.is_meta or torch._is_functional_tensor(value) or isinstance(value, UninitializedTensorMixin):
                    _refuse_empty(model)
    if forward_ad._current_level >= 0:
        for name, value in _tensors(model):
            _refuse_tangent(f"model: {name!r}", value)
    _check_arguments(model)
    return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _refuse_empty(model: nn.Module) -> None:
    for name, value in _tensors(model):
        if is_lazy(value):
            raise ArgumentError(f"model: {name!r} has no shape yet; expected a model that has run once")
        if value.is_meta:
            raise DeviceError(f"model: {name!r} is on the meta device, which holds no values; expected one that does")
        if torch._is_functional_tensor(value):
            raise DtypeError(f"model: {name!r} is {unusual(value)}; expected a tensor that holds values")


def _refuse_tangent(name: str, value: Tensor) -> None:
    """A tangent would be dropped without a word, and the derivative be zero."""
    if not unusual(value) and forward_ad.unpack_dual(value).tangent is not None:
        raise UnsupportedOperation(
            f"{name} carries a tangent of forward-mode derivatives, which an analysis has none of; expected one that is "
            "detached"
        )


def _inside(model: nn.Module) -> nn.Module | None:
    if "_orig_mod" in model._modules:  # torch.compile's
        return model._modules["_orig_mod"]
    wrappers = nn.DataParallel | nn.parallel.DistributedDataParallel | torch.optim.swa_utils.AveragedModel
    return model.module if isinstance(model, wrappers) else None


def _check_arguments(model: nn.Module) -> None:
    """That the model's forward can be called with images alone."""
    if model._forward_pre_hooks or not inspect.ismethod(model.forward):
        return  # hooks may give it more; TorchScript has its own words
    missing = []
    for index, parameter in enumerate(inspect.signature(model.forward, follow_wrapped=False).parameters.values()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        by_position = parameter.kind is not parameter.KEYWORD_ONLY
        if parameter.default is parameter.empty and not (by_position and index == 0):
            missing.append(repr(parameter.name))
    if missing:
        raise ArgumentError(
            f"model: {type(model).__name__}.forward needs {' and '.join(missing)} besides the images; expected a model "
            "that takes images alone, such as a module that fills the others in"
        )


def layer_inside(layer: object, model: nn.Module, inside: nn.Module) -> object:
    """A layer of `model` as one of the network inside its wrappers. "" and the model itself are its output."""
    if layer is model or (isinstance(layer, str) and layer == ""):
        return inside
    names = None
    while isinstance(layer, str) and layer.partition("@")[0].partition(".")[0] in _INSIDE:
        names = names or dict(inside.named_modules(remove_duplicate=False))
        wrapper, dot, rest = layer.partition(".")
        if layer.partition("@")[0] in names:
            break
        if not dot:
            return inside if wrapper in _INSIDE else layer
        layer = rest
    return layer


def observable(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name, whose outputs are to be seen."""
    module = dict(model.named_modules(remove_duplicate=False))[name]
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedOperation(
            f"layer {name!r} is a TorchScript module, whose outputs cannot be seen; expected a Python module"
        )
    return module


def placement(model: nn.Module, images: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where and in what the model computes: as its first floating-point parameter or buffer is."""
    with torch._C.DisableTorchFunctionSubclass():
        tensors = itertools.chain(model.parameters(), model.buffers())
        first = next((each for each in tensors if each.is_floating_point()), images)
        return first.device, first.dtype


def writable(model: nn.Module) -> nn.Module:
    """The model, or a copy of one that was made in inference mode, whose tensors autograd may keep."""
    with torch._C.DisableTorchFunctionSubclass():
        tensors = itertools.chain(model.parameters(), model.buffers())
        made = any(each.is_inference() for each in tensors)
    return copy.deepcopy(model) if made else model


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Around torch's work with a model: what fails there for a tensor of an unusual kind is said of that tensor.

    Raises: DtypeError.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ZfcoreError) and not isinstance(error, Freed):
            raise
        what = _unusual_tensor(model, str(error))
        if what is None:
            raise
        words = f"{type(error).__name__}: {error}"
        raise DtypeError(f"model: {what}, with which torch fails: {words}") from error


# What torch's errors about dtypes have in common.
_DTYPE_WORDS = re.compile(r"type|scalar|implemented|Promotion")


def _unusual_tensor(model: nn.Module, words: str) -> str | None:
    """The tensor of the model's that an error, of these words, is likely to be about."""
    for name, value in _tensors(model):
        if what := unusual(value):
            return f"{name!r} is {what}"
    if not _DTYPE_WORDS.search(words):
        return None
    first, dtype = next(((name, t.dtype) for name, t in _tensors(model) if t.is_floating_point()), (None, None))
    if first is None or dtype.itemsize == 1:
        return None if first is None else f"{first!r} is {dtype}"
    for name, value in _tensors(model):
        # Counters are whole numbers, and stand alone.
        if value.dtype != dtype and (isinstance(value, nn.Parameter) or value.dim() or value.is_floating_point()):
            return f"{name!r} is {value.dtype} and {first!r} {dtype}"
    return None


# ---- Its images --------------------------------------------------------------------------------------------


def checked_images(images: Tensor) -> Tensor:
    """[N, C, H, W], as they are otherwise."""
    if not isinstance(images, Tensor):
        raise DtypeError(f"images: a {type(images).__name__}; expected a tensor [N, C, H, W] or [C, H, W]")
    if what := without_values(images):
        meta = what.startswith("on the meta device")
        error, wanted = (DeviceError, "a device that does") if meta else (DtypeError, "a dense one")
        raise error(f"images: {what}; expected {wanted}")
    images = plain(images)
    if not images.is_floating_point():
        raise DtypeError(f"images: {images.dtype}; expected a floating point dtype, scaled as the model was trained")
    if images.dim() not in (3, 4) or 0 in images.shape[-3:]:
        raise ShapeError(
            f"images: shape {tuple(images.shape)}; expected [N, C, H, W] or [C, H, W], C, H, W >= 1"
        )
    if forward_ad._current_level >= 0:
        _refuse_tangent("images", images)
    return images if images.dim() == 4 else images[None]


# What torch's errors about shapes have in common.
_SHAPE_WORDS = re.compile(r"\b(sizes?|shapes?|channels?|dimensions?|dim|elements|groups)\b", re.IGNORECASE)


@contextlib.contextmanager
def fitting(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Runs a model's first forward: what torch says of shapes there is said of the images, as `running` has the rest."""
    try:
        with running(model):
            yield
    except (RuntimeError, ValueError, AssertionError) as error:
        guarded = isinstance(error, AssertionError) and "Guard failed" in str(error)  # by an exported program
        # What torch says of strides is about a layout that a view does not fit.
        words = "" if "stride" in str(error) else str(error)
        told = type(error) in (RuntimeError, ValueError) and _SHAPE_WORDS.search(words)
        if not (guarded or told):
            raise
        raise ShapeError(
            f"images: shape {tuple(images.shape)}, on which the model fails; expected images that fit it: {error}"
        ) from error


def default_device(images: Tensor) -> contextlib.AbstractContextManager:
    """Where new tensors are made: beside the images, if the caller has any default device."""
    default = torch.get_default_device()
    return contextlib.nullcontext() if default.type in ("cpu", images.device.type) else images.device


# ---- While the model's code runs ---------------------------------------------------------------------------


class _ThreadState:
    """The modes of torch's that a thread is in, and what its calls have changed."""

    def __init__(self) -> None:
        self.changes = forks.of_this_thread()
        self.modes = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
        self.gradient, self.functions = torch.is_grad_enabled(), torch._C._is_torch_function_enabled()
        self.autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        self.record = getattr(recording, "record", None)

    def restore(self) -> None:
        while torch._C._len_torch_dispatch_stack() > self.modes[0]:
            torch._C._pop_torch_dispatch_stack(None)
        while torch._C._len_torch_function_stack() > self.modes[1]:
            torch._C._pop_torch_function_stack()
        if torch.is_grad_enabled() != self.gradient:
            torch._C._set_grad_enabled(self.gradient)
        if self.functions and not torch._C._is_torch_function_enabled():
            torch._C._EnableTorchFunction().__enter__()
        for device, enabled in zip(("cpu", "cuda"), self.autocast, strict=True):
            if torch.is_autocast_enabled(device) != enabled:
                torch.set_autocast_enabled(device, enabled)
        recording.record = self.record
        for leave in reversed(forks.of_this_thread()):
            if leave not in self.changes:
                forks.left(leave)


class contained:  # noqa: N801 - a context, named as one
    """All of a call, or of a part of it that ends before the caller goes on: afterwards all is as it was.

    Each change has its own end; but an exception of a signal's handler, as of Ctrl-C, may come in the midst of that. One that
    comes in the few microseconds in which this itself begins or ends may still leave something behind. And in a forked
    process torch works in one thread.
    """

    def __enter__(self) -> None:
        self.state = _ThreadState()
        self.threads = forks.one_thread_if_forked()
        self.threads.__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is not None and not issubclass(kind, Exception):
                # Generators that it left hanging in contexts of their own end now, not when the trace is forgotten.
                traceback.clear_frames(trace)
            self.threads.__exit__(kind, error, trace)
        finally:
            try:
                self.state.restore()
            except BaseException:
                self.state.restore()
                raise


class _Eager:
    """Compiled parts of models run as they were written. The switch is the process's: the last user turns it back."""

    def __init__(self) -> None:
        self.users: set[object] = set()
        self.undo = contextlib.ExitStack()
        self.renew()
        forks.renewed(self.renew)

    def renew(self) -> None:
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if "torch._dynamo" not in sys.modules:  # so nothing is compiled, and the import takes seconds
            yield
            return
        leave = functools.partial(self.turn_for, user := object(), False)
        try:
            forks.entered(leave)
            self.turn_for(user, True)
            yield
        finally:
            forks.left(leave)

    def turn_for(self, user: object, wants: bool) -> None:
        with self.lock:
            turned = bool(self.users)
            (self.users.add if wants else self.users.discard)(user)
            if self.users and not turned:
                self.undo.enter_context(torch.compiler.set_stance("force_eager"))
            elif turned and not self.users:
                self.undo.close()


eagerly = _Eager()
