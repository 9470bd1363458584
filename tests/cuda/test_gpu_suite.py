"""What compute-sanitizer watches on a GPU, without one: the suite is right, it finds what is wrong, and the bugs compile."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from pathlib import Path

import gpu_sanitizers
import gpu_suite
import pytest
import torch
from test_resources import nvcc

HERE = Path(__file__).resolve().parent


def test_the_suite_passes_on_the_cpus_kernels():
    command = [sys.executable, HERE / "gpu_suite.py", "--device", "cpu", "--far"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "every answer is the reference's"
    for group in (*gpu_suite.GROUPS, gpu_suite.far):
        assert f"{group.__name__}: " in done.stdout


@pytest.mark.parametrize(
    ("op", "group"),
    [
        ("conv_delta", "products"),
        ("conv_boxes", "first_products"),
        ("pool_delta", "changes"),
        ("lrn_delta", "changes"),
        ("relu_delta", "changes"),
        ("pointwise_delta", "changes"),
        ("paste_boxes", "boxes"),
        ("deconv_step", "steps"),
    ],
)
def test_a_wrong_answer_fails_the_suite_and_its_group_alone(monkeypatch, capsys, op, group):
    right = getattr(gpu_suite, op)
    monkeypatch.setattr(gpu_suite, op, lambda *arguments: right(*arguments) * 1.03)
    monkeypatch.setattr(gpu_suite, "GROUPS", gpu_suite.GROUPS[1:])  # pooling takes most of the time
    assert gpu_suite.main(["--device", "cpu"]) == 1
    output, errors = capsys.readouterr()
    assert output.splitlines()[-1] == f"failed: {group}" and f"Wrong: {op}" in errors
    assert len(output.splitlines()) == len(gpu_suite.GROUPS)


def test_an_op_that_falls_back_fails_the_suite(monkeypatch, capsys):
    def falls_back(*arguments):
        warnings.warn("zfcore.pool_delta runs on the reference (plain PyTorch, slower) for ...", RuntimeWarning, stacklevel=2)

    monkeypatch.setattr(gpu_suite, "pool_delta", falls_back)
    monkeypatch.setattr(gpu_suite, "GROUPS", (gpu_suite.changes,))
    with warnings.catch_warnings():
        assert gpu_suite.main(["--device", "cpu"]) == 1
    assert "RuntimeWarning: zfcore.pool_delta runs on the reference" in capsys.readouterr().err


def test_a_wrong_switch_ends_the_suite(monkeypatch):
    right = gpu_suite.ops.max_pool2d_with_switches

    def wrong(*arguments):
        y, switches = right(*arguments)
        return y, switches ^ 1

    monkeypatch.setattr(gpu_suite.ops, "max_pool2d_with_switches", wrong)
    with pytest.raises(gpu_suite.Wrong, match="switches"):
        next(gpu_suite.pooling(torch.device("cpu")))


def test_the_planted_bugs_compile(tmp_path):
    if nvcc() is None:
        pytest.skip("no CUDA compiler: nvcc is not on PATH, and CUDACXX and CUDA_HOME name none")
    program = tmp_path / "planted"
    command = [nvcc(), "-std=c++17", "-arch=sm_90", "-Werror=all-warnings", "-o", program, HERE / "planted.cu"]
    subprocess.run(command, check=True)
    done = subprocess.run([program, "telepathy"], capture_output=True, text=True)
    assert done.returncode == 2  # no such tool, or no GPU


def stub(path, body):
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def sanitizers(tmp_path, monkeypatch, capsys):
    """sanitizers(compute_sanitizer): the status and the output of gpu_sanitizers, where stubs stand for what needs a GPU."""

    def run(body, seconds=20):
        stub(tmp_path / "nvcc", "exit 0")
        stub(tmp_path / "python", "exit 0")
        stub(tmp_path / "compute-sanitizer", body)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setitem(gpu_sanitizers.ENVIRONMENT, "PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        return gpu_sanitizers.main(["--seconds", str(seconds)]), capsys.readouterr().out

    return run


RIGHT = 'case "$*" in *clean | *gpu_suite.py*) exit 0 ;; *) exit 99 ;; esac'


def test_tools_that_find_the_bugs_and_nothing_else(sanitizers):
    status, output = sanitizers(RIGHT)
    assert status == 0 and "sanitizers: all is well" in output
    for tool in gpu_sanitizers.TOOLS:
        for what in ("the planted bug", "the clean program", "the suite"):
            assert f"{tool} on {what}: as it must be" in output


@pytest.mark.parametrize(
    ("body", "report"),
    [
        ("exit 0", "racecheck on the planted bug: status 0, expected 99"),
        ("exit 99", "initcheck on the clean program: status 99, expected 0"),
        ('echo "no device"; exit 1', "no device"),
        (RIGHT.replace("*gpu_suite.py*", "nothing"), "synccheck on the suite: status 99, expected 0"),
    ],
)
def test_tools_that_do_not(sanitizers, body, report):
    status, output = sanitizers(body)
    assert status == 1 and report in output


def test_a_tool_that_hangs_is_ended(sanitizers, tmp_path):
    mark = tmp_path / "alive"
    hang = f"(sleep 4; touch {mark}) & wait"
    status, output = sanitizers(RIGHT.replace("*clean |", f'*"racecheck clean") {hang} ;; *clean |'), seconds=2)
    assert status == 1 and "racecheck on the clean program: status did not end in time" in output
    time.sleep(3)
    assert not mark.exists()


def test_a_machine_without_the_tools(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_sanitizers.main([]) == 1
    assert "not on PATH: compute-sanitizer, nvcc" in capsys.readouterr().out
