"""The backends that the op tests run on: the reference, the native kernels for each instruction set, CUDA."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from zfcore import _C
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
    """Every op call inside runs on this backend."""
    name, _, isa = backend.partition("-")
    before = _C.cpu_isa()
    with use_backend(name):
        if isa:
            _C.set_cpu_isa(isa)
        try:
            yield Backend(name, "cuda" if name == "cuda" else "cpu")
        finally:
            _C.set_cpu_isa(before)


def present() -> list[str]:
    """The backends that this machine can test. A test per backend says why the others are missing."""
    return [name for name in BACKENDS if not why_missing(name)]
