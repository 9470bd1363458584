"""The backends that the op tests run on: the reference, the native kernels for each instruction set, CUDA."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch

from zfcore import _C
from zfcore.network import exact_arithmetic
from zfcore.ops import backends, use_backend

ISAS = ("generic", "avx2", "avx512")

BACKENDS = ("reference", *(f"cpu-{isa}" for isa in ISAS), "cuda")


@dataclass(frozen=True)
class Backend:
    """A backend under test, and the device that its tensors live on."""

    name: str
    device: str


def why_missing(backend: str) -> str:
    """Why this machine cannot test the backend, or an empty string."""
    name, _, isa = backend.partition("-")
    status = backends()[name]
    if not status.available:
        return f"backend {name}: {status.reason}"
    if isa and isa not in _C.usable_isas():
        return f"this CPU has no {isa}"
    return ""


@contextlib.contextmanager
def running_on(backend: str):
    """Every op call inside runs on this backend; with "cuda" on the one that CUDA tensors choose, in true float32."""
    name, _, isa = backend.partition("-")
    if name == "cuda":
        with exact_arithmetic(torch.device(name)):
            yield Backend(name, name)
        return
    before = _C.cpu_isa()
    with use_backend(name):
        if isa:
            _C.set_cpu_isa(isa)
        try:
            yield Backend(name, "cpu")
        finally:
            _C.set_cpu_isa(before)


def present() -> list[str]:
    """The backends that this machine can test. A test per backend says why the others are missing."""
    return [name for name in BACKENDS if not why_missing(name)]


# Of tests that go through all backends by themselves.
on_gpu_too = [pytest.mark.gpu] if "cuda" in present() else []
