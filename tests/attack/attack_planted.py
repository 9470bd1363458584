"""Faulty ops, one a fault: what the attack has to notice."""

from __future__ import annotations

import os
import random
import signal
import time

import attack_calls
import torch

from zfcore.errors import ArgumentError, ShapeError


def _make(choose: random.Random) -> dict:
    return dict(x=torch.randn(2, 3), n=2)


def _define(x: torch.Tensor, n: int) -> torch.Tensor:
    if not isinstance(n, int) or not 0 <= n < 100:
        raise ArgumentError(f"n={n}: expected 0 to 99")
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32 or x.shape != (2, 3):
        raise ShapeError("x: expected float32 [2, 3]")
    return x * n


def _dies(x, n):
    if n != 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    return _define(x, n)


def _hangs(x, n):
    if n != 2:
        time.sleep(3600)
    return _define(x, n)


def _answers_anything(x, n):
    return torch.zeros(2, 3) if n != 2 else _define(x, n)


def _is_off(x, n):
    return _define(x, n) + 0.5


def _writes(x, n):
    result = _define(x, n).clone()
    x[0, 0] = 17
    return result


def _refuses(x, n):
    raise ArgumentError("nothing is good enough")


FAULTS = {
    "planted_signal": (_dies, "signal"),
    "planted_hang": (_hangs, "hang"),
    "planted_answer": (_answers_anything, "unheld"),
    "planted_value": (_is_off, "wrong"),
    "planted_write": (_writes, "wrong"),
    "planted_refusal": (_refuses, "refused"),
}


def plant() -> None:
    for name, (run, _) in FAULTS.items():
        attack_calls.OPS[name] = attack_calls.Op(_make, run, _define)
