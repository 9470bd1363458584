"""A model in eval mode for an analysis, and as it was afterwards, also when several threads share it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import nn

_lock = threading.RLock()  # a finaliser that the collector runs inside may need it too
_holds: dict[int, _Hold] = {}  # by the id of the module, which lives as long as it is held


class _Hold:
    """How many calls hold a module in eval mode, and its mode before the first of them."""

    __slots__ = ("module", "count", "training")

    def __init__(self, module: nn.Module):
        self.module = module
        self.count = 0
        self.training = module.training


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode. Each module's own mode comes back when the last call that holds it ends.

    Held module by module, so that calls on a model and on a part of it do not disturb one another. Only the
    training flags are touched, and not by ``eval()``, which a model may override with more than that:
    parameters, buffers, gradients, hooks and random state are not.
    """
    modules = list(model.modules())
    with _lock:
        for module in modules:
            hold = _holds.get(id(module))
            if hold is None:
                hold = _holds[id(module)] = _Hold(module)
            hold.count += 1
            if module.training:
                module.training = False
    try:
        yield model
    finally:
        with _lock:
            for module in modules:
                hold = _holds[id(module)]
                hold.count -= 1
                if hold.count == 0:
                    if module.training != hold.training:
                        module.training = hold.training
                    del _holds[id(module)]


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


class _Products:
    """What products of fp32 may round to, "exact" (nothing) or "tf32", and the same bits twice.

    These switches are the process's, so the first user turns them and the last one turns them back. While any call wants
    exact products, all have them: TF32 is a permission.
    """

    def __init__(self) -> None:
        self.users = {"exact": 0, "tf32": 0}
        self.turned: str | None = None
        self.undo = contextlib.ExitStack()

    @contextlib.contextmanager
    def of(self, precision: str) -> Iterator[None]:
        self.count(precision, 1)
        try:
            yield
        finally:
            self.count(precision, -1)

    def count(self, precision: str, users: int) -> None:
        with _lock:
            self.users[precision] += users
            wanted = next((name for name, count in self.users.items() if count), None)
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


class _Kept:
    def watching(self):
        return contextlib.nullcontext()


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[_Kept]:
    before = [(d, d.copy()) for m in model.modules() for d in (m.__dict__, m._parameters, m._buffers, m._modules)]
    try:
        yield _Kept()
    finally:
        for now, then in before:
            if len(now) != len(then) or any(now.get(k) is not v for k, v in then.items()):
                now.clear()
                now.update(then)
