"""Forked and spawned processes, and pickles."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile

import torch

import zfcore.ops as ops

FORKS = """
import os, signal, numpy, torch, zfcore.ops as ops

torch.set_num_threads(2)
x, weight = torch.randn(4, 64, 64, 64), torch.randn(64, 32, 3, 3)

def run():
    y, switches = ops.max_pool2d_with_switches(x, 3, 2)
    u = ops.unpool_relu2d(y, switches, 3, 2)
    g = ops.pool_gather2d(u, switches, 3, 2)
    z = ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=(3, 2))
    return [t.numpy() for t in (y, switches, u, g, z)]  # torch.equal would wait for threads itself

expected = run()
for _ in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for threads which are not there
        os._exit(0 if all(map(numpy.array_equal, run(), expected)) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
"""


def test_a_fork_after_threads_ran_does_not_hang():
    away = tempfile.gettempdir()  # not the source tree, which would hide the install
    command = [sys.executable, "-c", FORKS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=away)
    assert done.returncode == 0, done.stderr


def test_parameters_survive_a_pickle():
    for params in (ops.PoolParams(3, 2, ceil_mode=True), ops.ConvParams(2, (1, 0), groups=4)):
        again = pickle.loads(pickle.dumps(params))
        assert again == params and type(again) is type(params)


def test_results_survive_a_pickle():
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    y, switches = ops.max_pool2d_with_switches(x, 2)
    again_y, again_switches = pickle.loads(pickle.dumps((y, switches)))
    assert torch.equal(y, again_y) and torch.equal(switches, again_switches)
    assert torch.equal(ops.unpool2d(again_y, again_switches, 2), ops.unpool2d(y, switches, 2))
