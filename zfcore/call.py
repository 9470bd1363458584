"""What every method does with its model and images before it starts, and while the model's own code runs."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import re
import sys
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin, is_lazy

from zfcore.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedOperation

_INSIDE = ("_orig_mod", "module")  # what the wrappers call the network that they hold


# ---- The model ---------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of torch.compile, of data parallelism and of averaged weights.

    Raises: DtypeError, for what is no module; ArgumentError, for one that has no shapes yet or needs more than images;
    DeviceError, for one on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model: a {type(model).__name__}; expected a torch.nn.Module")
    while isinstance(inside := _inside(model), nn.Module):
        model = inside
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values()):
            if value is not None and (value.is_meta or isinstance(value, UninitializedTensorMixin)):
                _refuse_empty(model)
    _check_arguments(model)
    return model


def _refuse_empty(model: nn.Module) -> None:
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(value):
            raise ArgumentError(f"model: {name!r} has no shape yet; expected a model that has run once")
        if value.is_meta:
            raise DeviceError(f"model: {name!r} is on the meta device, which holds no values; expected one that does")


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
    tensors = itertools.chain(model.parameters(), model.buffers())
    first = next((each for each in tensors if each.is_floating_point()), images)
    return first.device, first.dtype


def writable(model: nn.Module) -> nn.Module:
    """The model, or a copy of one that was made in inference mode, whose tensors autograd may keep."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model) if any(each.is_inference() for each in tensors) else model


# ---- Its images --------------------------------------------------------------------------------------------


def checked_images(images: Tensor) -> Tensor:
    """[N, C, H, W], as they are otherwise."""
    if not isinstance(images, Tensor):
        raise DtypeError(f"images: a {type(images).__name__}; expected a tensor [N, C, H, W] or [C, H, W]")
    if images.is_meta:
        raise DeviceError("images: on the meta device, which holds no pixels; expected a device that does")
    if images.layout is not torch.strided or images.is_quantized or images.is_nested:
        kind = "nested" if images.is_nested else "quantised" if images.is_quantized else images.layout
        raise DtypeError(f"images: a {kind} tensor; expected a dense one")
    if not images.is_floating_point():
        raise DtypeError(f"images: {images.dtype}; expected a floating point dtype, scaled as the model was trained")
    if images.dim() not in (3, 4) or 0 in images.shape[-3:]:
        raise ShapeError(
            f"images: shape {tuple(images.shape)}; expected [N, C, H, W] or [C, H, W], C, H, W >= 1"
        )
    return images if images.dim() == 4 else images[None]


# What torch's errors about shapes have in common.
_SHAPE_WORDS = re.compile(r"\b(sizes?|shapes?|channels?|dimensions?|dim|elements|groups)\b", re.IGNORECASE)


@contextlib.contextmanager
def fitting(images: Tensor) -> Iterator[None]:
    """Runs a model's first forward: what torch says of shapes there is said of the images."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        guarded = isinstance(error, AssertionError) and "Guard failed" in str(error)  # by an exported program
        # What torch says of strides is about a layout that a view does not fit.
        words = "" if "stride" in str(error) else str(error)
        plain = type(error) in (RuntimeError, ValueError) and _SHAPE_WORDS.search(words)
        if not (guarded or plain):
            raise
        raise ShapeError(
            f"images: shape {tuple(images.shape)}, on which the model fails; expected images that fit it: {error}"
        ) from error


def default_device(images: Tensor) -> contextlib.AbstractContextManager:
    """Where new tensors are made: beside the images, if the caller has any default device."""
    default = torch.get_default_device()
    return contextlib.nullcontext() if default.type in ("cpu", images.device.type) else images.device


# ---- While the model's code runs ---------------------------------------------------------------------------


class _Eager:
    """Compiled parts of models run as they were written. The switch is the process's: the last user turns it back."""

    def __init__(self) -> None:
        self.lock, self.users, self.undo = threading.Lock(), 0, contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if "torch._dynamo" not in sys.modules:  # so nothing is compiled, and the import takes seconds
            yield
            return
        with self.lock:
            self.users += 1
            if self.users == 1:
                self.undo.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    self.undo.close()


eagerly = _Eager()
