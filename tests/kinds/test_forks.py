"""Analyses in forked processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FORKS = 100 if os.environ.get("ZFCORE_ATTACK") else 3  # of each call


# Busy parents by chance: a thread inside of torch may hold a lock of torch's own, which no child gets back.
BUSY = pytest.param(
    "busy",
    marks=pytest.mark.skipif(not os.environ.get("ZFCORE_ATTACK"), reason="depends on chance: ZFCORE_ATTACK=1 runs it"),
)


@pytest.mark.parametrize("parent", ("idle", BUSY))
def test_no_call_in_a_fork_waits_for_what_stayed_behind(parent):
    """busy: two threads of the parent are inside of calls on the same model, and hold what they hold."""
    command = [sys.executable, str(Path(__file__).parent / "forks.py"), str(FORKS), parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 * FORKS)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "failed 0", done.stdout + done.stderr[-2000:]


HELD = """
import os, signal, threading, torch, zfcore
from torch import nn
from zfcore import forks
from zfcore.network import guard

model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).train()
model.register_buffer("seen", torch.zeros(2))
images = torch.randn(1, 3, 8, 8)
inside, go_on = threading.Event(), threading.Event()

def score(output):
    model.seen.add_(1)
    model.kept = output
    inside.set()
    go_on.wait()
    return output[:, 0]

def net(x):
    return nn.Sequential.forward(model, x if x.sum() < 1e9 else -x)

model.forward = net
whole = nn.Module._call_impl
thread = threading.Thread(target=lambda: zfcore.occlusion_map(model, images, box=4, stride=4, score=score))
thread.start()
inside.wait()
assert not model.training and guard._keeps and forks._open
child = os.fork()
if child == 0:
    signal.alarm(10)
    try:
        same = all(m.training for m in model.modules()) and not hasattr(model, "kept") and nn.Module._call_impl is whole
        free = not (guard._holds or guard._keeps or forks._open)
        zfcore.occlusion_map(model, images, box=4, stride=4)
        os._exit(0 if same and free and not torch.is_inference_mode_enabled() else 1)
    finally:
        os._exit(2)
_, status = os.waitpid(child, 0)
go_on.set()
thread.join()
assert status == 0 and all(m.training for m in model.modules()), status
"""


def test_a_fork_takes_back_what_calls_of_other_threads_had_changed():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", HELD], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
