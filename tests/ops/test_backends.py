"""Which backend runs an op: the device's own, one that is forced, or the reference, with the reason."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from running import BACKENDS, running_on, why_missing

import zfcore.ops as ops
from zfcore.errors import ArgumentError, BackendUnavailable
from zfcore.ops import _library


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.gpu) if n == "cuda" else n for n in BACKENDS])
def test_backend_runs_here(name):
    missing = why_missing(name)
    if missing:
        pytest.skip(missing)
    with running_on(name) as backend:
        y, _ = ops.max_pool2d_with_switches(torch.arange(16.0, device=backend.device).view(1, 1, 4, 4), 2)
    assert y.flatten().tolist() == [5, 7, 13, 15]


def test_backends_say_why_they_are_missing():
    listed = ops.backends()
    assert list(listed) == ["reference", "cpu", "cuda", "triton"]
    assert listed["reference"].available and listed["cpu"].available
    for status in listed.values():
        assert status.available == (status.reason == "")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_forcing_a_missing_backend_says_why(no_gpu, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="'triton' is not available: triton is not installed"):
        ops.use_backend("triton")
    with pytest.raises(ArgumentError, match="name='gpu': expected one of the backends reference, cpu"):
        ops.use_backend("gpu")


def test_triton_says_what_it_lacks(no_gpu, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    with pytest.raises(BackendUnavailable, match="no usable CUDA device, and TRITON_INTERPRET=1, which needs none"):
        ops.use_backend("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(_library, "_load_kernels", lambda: "the Triton kernels do not load: ImportError: libfoo")
    assert ops.backends()["triton"] == (False, "the Triton kernels do not load: ImportError: libfoo")
    monkeypatch.setattr(_library, "_load_kernels", lambda: "")
    assert ops.backends()["triton"] == (True, "")


def test_triton_takes_cpu_tensors_only_where_it_interprets(monkeypatch):
    monkeypatch.setattr(_library, "_triton_status", lambda: _library.BackendStatus(True, ""))
    cpu, kernels = torch.device("cpu"), {"triton": None}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert _library._refusal("triton", "op", kernels, cpu) == "it takes cuda tensors, not cpu"
    assert _library._refusal("triton", "op", kernels, torch.device("cuda")) == ""
    assert _library._refusal("triton", "op", {}, torch.device("cuda")) == "it has no kernel for op"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _library._refusal("triton", "op", kernels, cpu) == ""


def test_cuda_tensors_run_on_triton_where_there_is_no_cuda_kernel(monkeypatch):
    have = {"cuda", "triton"}
    monkeypatch.setattr(
        _library, "_status", lambda name: _library.BackendStatus(name in have, "" if name in have else "not here")
    )
    monkeypatch.setattr(_library, "_learn_plain", lambda device: None)
    cuda = torch.device("cuda")
    both = {"reference": 0, "cuda": 1, "triton": 2}
    assert _library._default("op", both, cuda) == 1
    assert _library._default("op", {"reference": 0, "cpu": 1, "triton": 2}, cuda) == 2
    have.remove("cuda")
    assert _library._default("op", both, cuda) == 2
    have.remove("triton")
    with pytest.warns(RuntimeWarning, match="for cuda tensors: not here; triton: not here"):
        assert _library._default("op", both, cuda) == 0


def test_importing_leaves_triton_alone():
    """It takes a second, and only tensors on a GPU need it."""
    code = "import sys, zfcore.ops, zfcore.occlusion; zfcore.backends(); print('triton' in sys.modules)"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture
def calls(monkeypatch):
    """The names of the native functions that the ops call."""
    made = []
    for name in ("max_pool2d_with_switches_cpu", "unpool_relu2d_cpu", "pool_gather2d_cpu"):
        run = getattr(_library.native, name)
        monkeypatch.setattr(
            _library.native, name, lambda *args, name=name, run=run: made.append(name) or run(*args)
        )
    return made


def test_forcing_reaches_the_backward_pass_and_is_undone(calls):
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    with ops.use_backend("reference"):
        y, _ = ops.max_pool2d_with_switches(x, 2)
        with ops.use_backend("cpu"):
            ops.max_pool2d_with_switches(x, 2)
        assert calls == ["max_pool2d_with_switches_cpu"]
    y.sum().backward()
    assert calls == ["max_pool2d_with_switches_cpu"]
    y, _ = ops.max_pool2d_with_switches(x, 2)
    y.sum().backward()
    assert calls == ["max_pool2d_with_switches_cpu"] * 2 + ["unpool_relu2d_cpu"]


def test_forcing_is_undone_after_an_error(calls):
    with pytest.raises(ArgumentError), ops.use_backend("reference"):
        ops.max_pool2d_with_switches(torch.randn(1, 1, 4, 4), 0)
    ops.max_pool2d_with_switches(torch.randn(1, 1, 4, 4), 2)
    assert calls == ["max_pool2d_with_switches_cpu"]


def test_forcing_holds_for_one_thread(calls):
    with ops.use_backend("reference"):
        other = threading.Thread(target=ops.max_pool2d_with_switches, args=(torch.randn(1, 1, 4, 4), 2))
        other.start()
        other.join()
        assert calls == ["max_pool2d_with_switches_cpu"]
        ops.max_pool2d_with_switches(torch.randn(1, 1, 4, 4), 2)
        assert calls == ["max_pool2d_with_switches_cpu"]


def fallback_kernels(**kernels):
    return {"reference": lambda x: "reference", **kernels}


def test_what_falls_back_says_so_once():
    """A device without kernels runs on the reference, and a warning says why."""
    device = torch.device("meta")
    with pytest.warns(
        RuntimeWarning, match="runs on the reference .* meta tensors: there are no kernels for"
    ):
        assert _library._default("op", fallback_kernels(), device)(None) == "reference"
    with pytest.warns(RuntimeWarning, match="for cpu tensors: it has no kernel for op"):
        assert _library._default("op", fallback_kernels(), torch.device("cpu"))(None) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels = fallback_kernels(cpu=lambda x: "native")
        assert _library._default("op", kernels, torch.device("cpu"))(None) == "native"


def test_a_native_core_that_does_not_load_is_the_reason(monkeypatch):
    monkeypatch.setattr(_library, "native", None)
    monkeypatch.setattr(_library, "_native_missing", "the native core zfcore._C does not load: no such file")
    listed = ops.backends()
    assert listed["reference"].available
    for name in ("cpu", "cuda"):
        assert not listed[name].available and "no such file" in listed[name].reason
    with pytest.warns(
        RuntimeWarning, match="for cpu tensors: the native core zfcore._C does not load: no such"
    ):
        _library._default("op", fallback_kernels(cpu=None), torch.device("cpu"))
    with pytest.raises(BackendUnavailable, match="no such file"):
        ops.use_backend("cpu")


def test_a_backend_takes_tensors_of_its_own_device():
    assert (
        _library._refusal("cpu", "op", {"cpu": None}, torch.device("meta"))
        == "it takes cpu tensors, not meta"
    )
    assert _library._refusal("cpu", "op", {}, torch.device("cpu")) == "it has no kernel for op"
    assert _library._refusal("reference", "op", {"reference": None}, torch.device("meta")) == ""


def test_many_threads_share_the_ops():
    """Eight threads get what one gets."""
    inputs = [torch.randn(2, 9, 8, 8) for _ in range(8)]
    weight = torch.randn(9, 4, 3, 3)

    def run(x):
        y, switches = ops.max_pool2d_with_switches(x, 3, 2)
        return ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=(3, 2))

    expected = [run(x) for x in inputs]
    wrong = []

    def repeat(number):
        for _ in range(100):
            if not torch.equal(run(inputs[number]), expected[number]):
                wrong.append(number)

    workers = [threading.Thread(target=repeat, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
