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


class Observer:
    """A forward hook that calls ``see(output)`` in the thread that made it, and changes nothing.

    The reader knows it: a module that is observed, in this thread or another, is no less readable.
    """

    def __init__(self, see: Callable[[object], None]):
        self.see = see
        self.thread = threading.get_ident()

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if threading.get_ident() == self.thread:
            self.see(output)


@contextlib.contextmanager
def observing(module: nn.Module, see: Callable[[object], None]) -> Iterator[None]:
    """Calls ``see`` with every output of the module in this thread."""
    handle = module.register_forward_hook(Observer(see))
    try:
        yield
    finally:
        handle.remove()


class _FullPrecision:
    """fp32 products in fp32 and the same bits twice: no TF32, no narrow matrix products.

    These switches are the process's, so the first user turns them and the last one turns them back.
    """

    def __init__(self) -> None:
        self.users = 0
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with _lock:
            if self.users == 0:
                before = torch.get_float32_matmul_precision()
                if before != "highest":
                    torch.set_float32_matmul_precision("highest")
                    self.undo.callback(torch.set_float32_matmul_precision, before)
                cudnn = torch.backends.cudnn
                self.turn(cudnn, "deterministic", True)
                try:
                    self.turn(cudnn, "allow_tf32", False)
                except RuntimeError:  # convolutions were set apart from RNNs, which the newer switch can express
                    self.turn(cudnn.conv, "fp32_precision", "ieee")
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with _lock:
            self.users -= 1
            if self.users == 0:
                self.undo.close()

    def turn(self, owner: object, name: str, value: object) -> None:
        before = getattr(owner, name)
        if before != value:
            setattr(owner, name, value)
            self.undo.callback(setattr, owner, name, before)


_full_precision = _FullPrecision()


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """The model's own precision, whatever autocast or TF32 setting surrounds the call."""
    with torch.autocast(device.type, enabled=False), _full_precision:
        yield
