"""The device that the benchmarks run on: chosen once, before the groups are drawn, since their shapes depend on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

NAMES = ("cpu", "cuda")
_chosen = torch.device("cpu")


def choose(name: str) -> None:
    """On a GPU both sides of every comparison compute in true float32, unless their row says otherwise."""
    global _chosen
    if name == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no usable CUDA device")
        torch.backends.cudnn.benchmark = True  # the other side's convolutions at their best
        _set_tf32(False)
    _chosen = torch.device(name)


def device() -> torch.device:
    return _chosen


def on_gpu() -> bool:
    return _chosen.type == "cuda"


def _set_tf32(allowed: bool) -> None:
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """What torch's own products compute in: "exact", "tf32", or "bf16" under autocast."""
    if precision == "tf32":
        _set_tf32(True)
        try:
            yield
        finally:
            _set_tf32(False)
    elif precision == "bf16":
        with torch.autocast(_chosen.type, dtype=torch.bfloat16):
            yield
    else:
        yield
