"""Switches that another thread writes to while the ops read them: a value or SwitchError, and nothing else.

The address sanitizer sees what this would write outside (.ci/sanitize); tests/native has it for the kernels alone.
"""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

import zfcore.ops as ops
from zfcore.errors import SwitchError

SECONDS = float(os.environ.get("ZFCORE_RACE_SECONDS", 1))
WINDOW = dict(kernel_size=3, stride=2, padding=1)

X = torch.randn(4, 16, 32, 33)
Y, SWITCHES = ops.max_pool2d_with_switches(X, **WINDOW)
WEIGHT = torch.randn(16, 3, 3, 3)
SIZE = (32, 33)
OPS = {
    "unpool2d": lambda y, s, x: ops.unpool2d(y, s, **WINDOW, output_size=SIZE),
    "unpool2d last": lambda y, s, x: ops.unpool2d(y, s, **WINDOW, output_size=SIZE, overlap="last"),
    "unpool_relu2d": lambda y, s, x: ops.unpool_relu2d(y, s, **WINDOW, output_size=SIZE),
    "pool_gather2d": lambda y, s, x: ops.pool_gather2d(x, s, **WINDOW),
    "pool_gather2d last": lambda y, s, x: ops.pool_gather2d(x, s, **WINDOW, overlap="last"),
    "unpool_relu_conv_transpose2d": lambda y, s, x: ops.unpool_relu_conv_transpose2d(
        y, s, WEIGHT, pool=(3, 2, 1), output_size=(34, 35)
    ),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels last"])
@pytest.mark.parametrize("op", OPS)
def test_switches_that_change_during_a_call(op, layout, threads):
    threads(2)
    y, switches, x = (t.clone(memory_format=layout) for t in (Y, SWITCHES, X))
    good, stop, seen = switches.clone(), threading.Event(), {"values": 0, "refused": 0}

    def write():
        while not stop.is_set():
            switches.random_(0, 256)
            switches.copy_(good)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        end = time.monotonic() + SECONDS / 4
        while time.monotonic() < end or not seen["refused"]:
            try:
                OPS[op](y, switches, x)
                seen["values"] += 1
            except SwitchError:
                seen["refused"] += 1
    finally:
        stop.set()
        writer.join()
    assert torch.equal(OPS[op](y, good, x), OPS[op](y, switches, x))
