"""The one ``torch.library.Library("zfcore")``, and the choice of the backend that runs an op.

The tensor's device chooses: CPU tensors run on the native kernels, CUDA tensors on the CUDA kernels, or on the Triton
kernels for an op that has no other, everything else on the reference. What falls back to the reference says so once,
with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import torch
from torch._functorch import pyfunctorch
from torch._subclasses import functional_tensor
from torch.autograd import forward_ad

from zfcore.errors import ArgumentError, BackendUnavailable, DtypeError

library = torch.library.Library("zfcore", "DEF")

NAMES = ("reference", "cpu", "cuda", "triton")
_BY_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # which backends run a device's tensors, best first


class BackendStatus(NamedTuple):
    """Whether a backend can run here, and if not, why."""

    available: bool
    reason: str


def _load_native() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("zfcore._C"), ""
    except ImportError as error:
        return None, f"the native core zfcore._C does not load: {error}"


native, _native_missing = _load_native()


@functools.cache
def _load_kernels() -> str:
    """Why the Triton kernels do not load, or an empty string."""
    try:
        importlib.import_module("zfcore.kernels._places")
    except Exception as error:  # an incomplete or unsuited Triton fails in many ways, on its import
        return f"the Triton kernels do not load: {type(error).__name__}: {error}"
    return ""


def triton_kernel(name: str) -> Callable:
    """The launcher of a Triton kernel. Triton is imported when the first one is asked for."""
    return getattr(importlib.import_module(f"zfcore.kernels.{name}"), name)


def interprets() -> bool:
    """Whether Triton runs its kernels in Python, and so on CPU tensors, too."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _triton_status() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, "triton is not installed")
    if not interprets() and not torch.cuda.is_available():
        return BackendStatus(
            False, "torch finds no usable CUDA device, and TRITON_INTERPRET=1, which needs none, is not set"
        )
    missing = _load_kernels()
    return BackendStatus(not missing, missing)


class _Choice(threading.local):
    name: str | None = None  # the backend that use_backend() forces in this thread


_choice = _Choice()


def _status(name: str) -> BackendStatus:
    if name == "reference":
        return BackendStatus(True, "")
    if name == "triton":
        return _triton_status()
    if native is None:
        return BackendStatus(False, _native_missing)
    if name == "cuda":
        if not native.build_info()["with_cuda"]:
            return BackendStatus(False, "zfcore._C was built without CUDA")
        if not torch.cuda.is_available():
            return BackendStatus(False, "torch finds no usable CUDA device")
    return BackendStatus(True, "")


def backends() -> Mapping[str, BackendStatus]:
    """The backends by name, each with ``available`` and, where it is not, the ``reason``."""
    return MappingProxyType({name: _status(name) for name in NAMES})


@contextlib.contextmanager
def _forced(name: str | None) -> Iterator[None]:
    before = _choice.name
    _choice.name = name
    try:
        yield
    finally:
        _choice.name = before


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """A context in which this thread's ops run on the backend ``name``, in their backward passes too.

    Args:
        name: one of ``zfcore.backends()``.

    Raises:
        ArgumentError: there is no backend of that name.
        BackendUnavailable: this install or machine does not have it; the message says why. An op raises it
            too, when the backend has no kernel for that op or for its tensors' device.
    """
    if name not in NAMES:
        raise ArgumentError(f"name={name!r}: expected one of the backends {', '.join(NAMES)}")
    status = _status(name)
    if not status.available:
        raise BackendUnavailable(f"backend {name!r} is not available: {status.reason}")
    return _forced(name)


def _refusal(name: str, op: str, kernels: Mapping[str, Callable], device: torch.device) -> str:
    """Why the backend cannot run the op on this device, or an empty string."""
    status = _status(name)
    if not status.available:
        return status.reason
    if name not in kernels:
        return f"it has no kernel for {op}"
    takes = (name,)
    if name == "triton":
        takes = ("cuda", "cpu") if interprets() else ("cuda",)
    if name != "reference" and device.type not in takes:
        return f"it takes {' or '.join(takes)} tensors, not {device.type}"
    return ""


# What tells a plain tensor in a plain call from one that needs the dispatcher. These are torch internals;
# without them every call goes through the dispatcher, which costs some microseconds and changes nothing else.
_INTERNALS = ("_dispatch_keys", "_len_torch_dispatch_stack", "_any_requires_grad", "_is_any_autocast_enabled")
_can_tell_plain = all(hasattr(torch._C, name) for name in _INTERNALS)
_plain_keys: list = []  # the dispatch keys of plain tensors, of each device that an op has run on


def _learn_plain(device: torch.device) -> None:
    if not _can_tell_plain:
        return
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys = torch._C._dispatch_keys(torch.empty(0, device=device))
        if keys not in _plain_keys:
            _plain_keys.append(keys)


_learn_plain(torch.device("cpu"))


def _is_plain(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether only the kernel would see this call: no gradient, autocast, mode, transform or subclass."""
    if torch._C._len_torch_dispatch_stack() or torch._C._is_any_autocast_enabled():
        return False
    if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)):
        return False
    for x in tensors:  # a loop, which costs half of all(...)
        if torch._C._dispatch_keys(x) not in _plain_keys:
            return False
    return True


def is_plain(x: object) -> bool:
    """Whether it is a tensor that is known for one that no subclass, transform, layout or negative bit stands before."""
    try:
        return torch._C._dispatch_keys(x) in _plain_keys
    except (TypeError, AttributeError):  # no tensor, or a torch without this internal
        return False


def _default(op: str, kernels: Mapping[str, Callable], device: torch.device) -> Callable:
    refusals = []
    for name in _BY_DEVICE.get(device.type, ()):
        refusal = _refusal(name, op, kernels, device)
        if not refusal:
            _learn_plain(device)
            return kernels[name]
        if name == device.type:
            refusals.append(refusal)
        elif name in kernels:
            refusals.append(f"{name}: {refusal}")
    why = "; ".join(refusals) or f"there are no kernels for {device.type} tensors"
    warnings.warn(
        f"zfcore.{op} runs on the reference (plain PyTorch, slower) for {device.type} tensors: {why}",
        RuntimeWarning,
        stacklevel=3,
    )
    return kernels["reference"]


def choosing(name: str, kernels: Mapping[str, Callable]) -> Callable:
    """The function that runs the kernel of the backend that is forced, or that its first tensor's device chooses."""
    by_device: dict[torch.device, Callable] = {}

    def run(x, *args):
        try:
            device = x.device
        except AttributeError:  # the dispatcher lets None through
            raise DtypeError(f"{name}: a {type(x).__name__} for a tensor") from None
        if _choice.name is not None:
            refusal = _refusal(_choice.name, name, kernels, device)
            if refusal:
                raise BackendUnavailable(f"backend {_choice.name!r} cannot run {name} on {device}: {refusal}")
            return kernels[_choice.name](x, *args)
        kernel = by_device.get(device)
        if kernel is None:
            kernel = by_device[device] = _default(name, kernels, device)
        return kernel(x, *args)

    return run


def runs_on(device: torch.device, names: tuple[str, ...]) -> bool:
    """Whether an op with kernels of these backends would run one on such tensors now, or was told to run on the
    reference. A backend that is forced has to be one for all ops, which the CPU's alone is.
    """
    if _choice.name == "reference":
        return True
    kernels = dict.fromkeys(names)
    tried = _BY_DEVICE.get(device.type, ()) if _choice.name is None else {"cpu"} & {_choice.name}
    return any(not _refusal(name, "op", kernels, device) for name in tried)


def register(
    schema: str,
    *,
    tensors: int,
    kernels: Mapping[str, Callable],
    fake: Callable,
    setup_context: Callable,
    backward: Callable,
    jvp: Callable,
) -> Callable:
    """Register an op with its kernels by backend, its fake kernel and its derivatives; returns the op to call.

    The first ``tensors`` arguments of the schema are tensors, and the first one's device chooses the backend.
    ``setup_context(ctx, inputs, output)`` keeps what ``backward(ctx, *grads)`` and ``jvp(ctx, *tangents)`` need, tensors
    by ``keep(ctx, *tensors)``; both run on the backend that the forward was forced to. Where other ops differentiate
    them, so do they.
    """
    name = schema.split("(", 1)[0]
    run = choosing(name, kernels)
    library.define(schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"zfcore::{name}", fake, lib=library)
    overload = getattr(torch.ops.zfcore, name).default

    class Methods(torch.autograd.Function):
        """The op under autograd, and under the transforms of torch.func, which need the methods apart."""

        @staticmethod
        def forward(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.backend = _choice.name
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx, *grads):
            # The engine runs the backward of CUDA tensors in a thread of its own.
            with _forced(ctx.backend):
                return backward(ctx, *grads)

        @staticmethod
        def jvp(ctx, *tangents):
            with _forced(ctx.backend):
                return jvp(ctx, *tangents)

        @staticmethod
        def vmap(info, in_dims, *args):
            return batched(overload, tensors, info.batch_size, in_dims, args)

    # By this name the nodes of autograd's graph are known.
    differentiable = type(f"zfcore_{name}", (Methods,), {})

    def below(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def differentiate(keyset, *args):
        if any(x is not None and x.is_nested for x in args[:tensors]):
            raise DtypeError(f"{name}: a nested tensor: expected a dense one")
        # Which tensors carry a derivative forward, autograd alone knows.
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args[:tensors])):
            return differentiable.apply(*args)
        return below(keyset, *args)

    library.impl(name, differentiate, "Autograd", with_keyset=True)

    def transformed(*args):
        functionalized = _functionalizing()
        if functionalized is None:
            return differentiable.apply(*args)
        inside = functionalized.unwrap_tensors(args)
        with functionalized.redispatch_to_next():
            return functionalized.wrap_tensors(overload(*inside))

    def nested(x, *args):
        raise DtypeError(f"{name}: a nested tensor: expected a dense one")

    for key in ("NestedTensorCPU", "NestedTensorCUDA"):
        library.impl(name, nested, key)
    library.impl(name, transformed, "FuncTorchDynamicLayerFrontMode")  # where the transforms of torch.func begin

    def call(*args):
        if torch.compiler.is_compiling() or not (_can_tell_plain and _is_plain(args[:tensors])):
            return overload(*args)
        return run(*args)

    return call


def _functionalizing():
    """What wraps tensors for ``torch.func.functionalize``, where that is the transform that runs. The op mutates nothing."""
    interpreter = pyfunctorch.retrieve_current_functorch_interpreter()
    if not isinstance(interpreter, pyfunctorch.FunctionalizeInterpreter):
        return None
    return functional_tensor.FunctorchFunctionalizeAPI(interpreter)


def batched(op: Callable, tensors: int, count: int, in_dims: tuple, args: tuple) -> tuple:
    """An op on maps [N, C, H, W] with one axis more, of ``count``, in those of its first ``tensors`` arguments where
    in_dims says so: maps are one batch, and filters are taken one after the other. Returns the results, and their axes.
    """
    maps = min(tensors, 2)  # what follows are filters, of which all maps of a call share one
    if all(axis is None for axis in in_dims[maps:tensors]):
        folded = [_folded(x, axis, count) for x, axis in zip(args[:maps], in_dims, strict=False)]
        found = op(*folded, *args[maps:])
        unfold = lambda y: y.unflatten(0, (count, len(y) // count))  # noqa: E731
        return (tuple(map(unfold, found)), (0,) * len(found)) if isinstance(found, tuple) else (unfold(found), 0)
    found = []
    for i in range(count):
        own = (x if axis is None else x.select(axis, i) for x, axis in zip(args[:tensors], in_dims, strict=False))
        found.append(op(*own, *args[tensors:]))
    return torch.stack(found), 0


def _folded(x: torch.Tensor, axis: int | None, count: int) -> torch.Tensor:
    x = x.expand(count, *x.shape) if axis is None else x.movedim(axis, 0)
    return x.flatten(0, 1)


def keep(ctx, *tensors: torch.Tensor) -> None:
    """Keeps tensors for the backward pass and for the derivative forward."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
