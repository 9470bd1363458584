"""The one ``torch.library.Library("zfcore")``, and the choice of the backend that runs an op.

The tensor's device chooses: CPU tensors run on the native kernels, CUDA tensors on the CUDA kernels, everything
else on the reference. What falls back to the reference says so once, with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch

from zfcore.errors import ArgumentError, BackendUnavailable

library = torch.library.Library("zfcore", "DEF")

NAMES = ("reference", "cpu", "cuda", "triton")


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


class _Choice(threading.local):
    name: str | None = None  # the backend that use_backend() forces in this thread


_choice = _Choice()


def _status(name: str) -> BackendStatus:
    if name == "reference":
        return BackendStatus(True, "")
    if name == "triton":
        return BackendStatus(False, "the Triton kernels are not part of this release")
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
        BackendUnavailable: this install or machine does not have it; the message says why. An op raises it too,
            when the backend has no kernel for that op or for its tensors' device.
    """
    if name not in NAMES:
        raise ArgumentError(f"name={name!r}: expected one of the backends {', '.join(NAMES)}")
    status = _status(name)
    if not status.available:
        raise BackendUnavailable(f"backend {name!r} is not available: {status.reason}")
    return _forced(name)


def forced_backend() -> str | None:
    """The backend that ``use_backend`` forces in this thread, or None."""
    return _choice.name


def _refusal(name: str, op: str, kernels: Mapping[str, Callable], device: torch.device) -> str:
    """Why the backend cannot run the op on this device, or an empty string."""
    status = _status(name)
    if not status.available:
        return status.reason
    if name not in kernels:
        return f"it has no kernel for {op}"
    if name != "reference" and name != device.type:
        return f"it takes {name} tensors, not {device.type}"
    return ""


class _Op:
    """An op's kernels, and the choice among them."""

    def __init__(self, name: str, kernels: Mapping[str, Callable]):
        self.name = name
        self.kernels = kernels
        self.by_device: dict[str, Callable] = {}  # what each device type was found to run on

    def __call__(self, x: torch.Tensor, *args: Any) -> Any:
        if _choice.name is not None:
            return self.forced(_choice.name, x.device)(x, *args)
        kernel = self.by_device.get(x.device.type)
        if kernel is None:
            kernel = self.by_device[x.device.type] = self.default(x.device)
        return kernel(x, *args)

    def forced(self, name: str, device: torch.device) -> Callable:
        refusal = _refusal(name, self.name, self.kernels, device)
        if refusal:
            raise BackendUnavailable(f"backend {name!r} cannot run {self.name} on {device}: {refusal}")
        return self.kernels[name]

    def default(self, device: torch.device) -> Callable:
        if device.type in NAMES:
            refusal = _refusal(device.type, self.name, self.kernels, device)
        else:
            refusal = f"there are no kernels for {device.type} tensors"
        if not refusal:
            return self.kernels[device.type]
        warnings.warn(
            f"zfcore.{self.name} runs on the reference (plain PyTorch, slower) for {device.type} tensors: {refusal}",
            RuntimeWarning,
            stacklevel=3,
        )
        return self.kernels["reference"]


def register(
    schema: str,
    *,
    kernels: Mapping[str, Callable],
    fake: Callable,
    setup_context: Callable,
    backward: Callable,
) -> torch._ops.OpOverload:
    """Register an op with its kernels by backend, its fake kernel and its gradient; returns the op to call.

    ``setup_context(ctx, inputs, output)`` saves for ``backward(ctx, *grads)``, which runs on the backend that the
    forward was forced to.
    """
    name = schema.split("(", 1)[0]
    library.define(schema)
    library.impl(name, _Op(name, kernels), "CompositeExplicitAutograd")
    torch.library.register_fake(f"zfcore::{name}", fake, lib=library)

    def save(ctx, inputs, output):
        ctx.backend = forced_backend()
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    def back(ctx, *grads):
        # The engine runs the backward of CUDA tensors in a thread of its own.
        with _forced(ctx.backend):
            return backward(ctx, *grads)

    torch.library.register_autograd(f"zfcore::{name}", back, setup_context=save, lib=library)
    return getattr(torch.ops.zfcore, name).default
