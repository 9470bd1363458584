"""gpu_check.sh and what it runs, as far as a machine without a GPU can show it: stages are stubs, rows are small."""

import json
import math
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
SCRIPT = BENCH / "gpu_check.sh"
STAGES = [
    "build", "tests", "sanitizers", "bench analyses", "bench ops", "bench changes", "bench kernels", "bench steps", "tune"
]  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    """bench(name): a module of bench/."""
    monkeypatch.syspath_prepend(BENCH)
    return import_module


def test_the_script_is_well_formed():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True)


def stub(path, body):
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def check(tmp_path):
    """check(fails, **variables): the script with stubs on PATH, where a command that holds the word `fails` fails."""
    programs = tmp_path / "bin"
    programs.mkdir()
    stub(programs / "nvidia-smi", "echo 'NVIDIA H200, 9.0'")
    for name in ("nvcc", "cmake"):
        stub(programs / name, "exit 0")
    # Only the report is made for real. The benchmarks' tables are those that a test recorded.
    stub(
        programs / "python3",
        f"""
        case "$*" in *gpu_report.py*) exec {sys.executable} "$@" ;; esac
        echo "ran: $*"
        [[ -z $FAILS || "$*" != *$FAILS* ]] || exit 3
        [[ -z $HANGS || "$*" != *$HANGS* ]] || exec sleep 60
        """,
    )

    def check(fails="", hangs="", **variables):
        environment = {
            **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OUT": str(tmp_path / "out"), "FAILS": fails,
            "HANGS": hangs, **variables,
        }  # fmt: skip
        environment.pop("PYTHON", None)
        done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
        results = tmp_path / "out" / "results.json"
        return done, json.loads(results.read_text()) if results.exists() else None

    check.programs, check.out = programs, tmp_path / "out"
    return check


def test_every_stage_runs_and_is_noted(check):
    done, results = check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(stage["stage"] for stage in results["stages"]) == sorted(STAGES)
    assert {stage["result"] for stage in results["stages"]} == {"passed"}
    assert "all is well" in done.stdout
    files = sorted(path.name for path in check.out.iterdir())
    assert files == [
        "bench.log", "build.log", "results.json", "results.md", "sanitizers.log", "tests.log", "tune.log"
    ]  # fmt: skip
    assert "| bench ops | " in (check.out / "results.md").read_text()
    log = (check.out / "tests.log").read_text()
    assert "-m gpu --no-skips" in log and f"--rootdir {ROOT}" in log


@pytest.mark.parametrize(
    ("word", "stage"), [("no-skips", "tests"), ("gpu_sanitizers", "sanitizers"), ("bench_ops", "bench ops")]
)
def test_a_stage_that_fails_stops_no_other_and_fails_the_run(check, word, stage):
    done, results = check(fails=word)
    assert done.returncode == 1
    assert "not everything passed" in done.stderr
    assert {s["stage"]: s["result"] for s in results["stages"]} == {
        name: "failed (3)" if name == stage else "passed" for name in STAGES
    }


def test_without_a_build_nothing_is_checked(check):
    done, results = check(fails="pip install")
    assert done.returncode == 1 and results is None
    assert "without a build there is nothing to check" in done.stderr and "ran: -m pip install" in done.stderr


def test_a_stage_that_hangs_is_stopped_and_later_ones_that_find_no_time_fail_the_run(check):
    done, results = check(hangs="bench_analyses", ZFCORE_GPU_SECONDS="9")
    assert done.returncode == 1
    found = {stage["stage"]: stage["result"] for stage in results["stages"]}
    assert found["tests"] == "passed" and found["bench analyses"].startswith("failed (stopped after")
    assert found["bench steps"] == found["tune"] == "skipped"
    assert sum(stage["seconds"] for stage in results["stages"]) <= 12


def test_without_a_gpu_it_stops_at_once(check):
    stub(check.programs / "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    done, results = check()
    assert done.returncode == 2 and results is None
    assert "no usable NVIDIA GPU here: NVIDIA-SMI has failed" in done.stderr


def test_a_report_holds_the_tables_of_all_stages(tmp_path, bench):
    groups, report = bench("groups"), bench("gpu_report")
    measured = groups.Measured("op pool1 nchw", "zfcore", 0.5, 7, "pytorch", 1.25, 2.5, None, 3000.0, None, None, 0.75)
    stored = {"measured_on": {"gpu": "some GPU"}, "left_out": {"other": "Captum is missing"}, "rows": [vars(measured)]}
    (tmp_path / "ops.json").write_text(json.dumps(stored))
    (tmp_path / "stages.tsv").write_text("build\t31\tpassed\ntests\t2\tfailed (1)\n")
    tuned = {
        "kernel": "conv_delta", "network": "zfnet", "layer": "conv2", "asked": {"precision": "tf32", "rows": 9},
        "rule": [64, 64, 32, 4, 3], "best": [64, 128, 32, 8, 3], "rule_over_best": 1.256,
    }  # fmt: skip
    (tmp_path / "tune.json").write_text(json.dumps([tuned]))
    report.main(tmp_path, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stages"][1] == {"stage": "tests", "seconds": 2, "result": "failed (1)"}
    assert results["rows"][0]["ratio"] == 2.5 and results["tuning"] == [tuned]
    text = (tmp_path / "results.md").read_text()
    for line in (
        "- gpu: some GPU",
        "- left out: other: Captum is missing",
        "| op pool1 nchw | zfcore | 0.50 | pytorch | 1.25 | 2.50 |  | 3000.0 |  |  | 75 % |",
        "| tests | 2 | failed (1) |",
        "| conv_delta | zfnet conv2 | precision tf32, rows 9 | 64 64 32 4 3 | 64 128 32 8 3 | 1.26 |",
    ):
        assert line in text.splitlines()


def run_pytest(cwd, *arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    return subprocess.run([*command, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_so(tmp_path):
    run = run_pytest(tmp_path, BENCH, "--benchmark-only", "--device", "cuda")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device cuda: torch finds no usable CUDA device" in run.stderr
    tune = subprocess.run([sys.executable, BENCH / "tune.py"], capture_output=True, text=True)
    assert tune.returncode == 1 and "tune: torch finds no usable CUDA device" in tune.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_skipped_test_fails_where_none_may_be_skipped(tmp_path):
    file = ROOT / "tests" / "triton" / "test_triton_gpu.py"
    run = run_pytest(tmp_path, file, "-m", "gpu", "--no-skips")
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert "skipped, which --no-skips forbids: torch finds no usable CUDA device" in run.stdout
    assert " skipped" not in run.stdout.splitlines()[-1]
    assert run_pytest(tmp_path, file, "-m", "gpu").returncode == pytest.ExitCode.OK


def test_no_row_begins_when_the_time_is_over(tmp_path):
    run = run_pytest(tmp_path, BENCH, "--benchmark-only", "-k", "pool5-nchw", "--stop-after", "0", "-rs")
    assert run.returncode == pytest.ExitCode.OK
    assert "no time was left" in run.stdout and " passed" not in run.stdout


def test_the_kernels_rows_agree_and_count_what_moves(bench):
    """On the CPU and at a few positions, what a GPU is to be timed at."""
    kernels = bench("bench_kernels")
    found = kernels.kernels(box=32, stride=32, part=(2, 2))
    for name in (kernels.PASTED, *kernels.KERNELS):
        rows = kernels.rows_of(found[name])
        outputs = {row: run() for row, run in rows.items()}
        kernels.check(outputs)
        assert kernels.work(found[name]).bytes > 2 * outputs["zfcore"].nbytes - 1
        with pytest.raises(AssertionError):
            kernels.check({**outputs, "zfcore": outputs["zfcore"] + outputs["zfcore"].abs().max()})


def test_narrow_products_agree_with_torch_in_the_same_precision(bench):
    changes = bench("bench_changes")
    product = changes.products("bf16")["conv5"]
    rows = changes.rows_of(product, "bf16")
    changes.check({row: run() for row, run in rows.items()}, "bf16")
    exact, narrow = changes.work(changes.products("exact")["conv5"], "exact"), changes.work(product, "bf16")
    assert (exact.precision, narrow.precision) == ("float32", "bf16")
    assert exact.bytes == narrow.bytes and 0 < exact.flops < exact.dense_flops


def test_plain_forwards_are_an_occlusion_maps_other_side(bench):
    analyses = bench("bench_analyses")
    occlusion = analyses.Occlusion("zfnet", 96, 64)
    other, answers, check = analyses.plain_side(occlusion, "")
    theirs, ours = other(), analyses.occlude(occlusion)
    assert theirs.shape == (answers,) == (9,)
    check(ours, theirs)
    with pytest.raises(AssertionError):
        check(ours, theirs * 1.01)
    work = analyses.counted_work(occlusion._replace(box=32))
    assert 0 < work.flops < work.dense_flops and work.bytes == 0


def test_a_share_is_of_the_peak_of_its_precision(bench, monkeypatch):
    groups, stages, ceilings = bench("groups"), bench("stages"), bench("ceilings")
    peaks = {"float32": 50e12, "tf32": 400e12, "bf16": 800e12}
    monkeypatch.setattr(groups, "ceilings", lambda: ceilings.Ceilings(4e12, peaks, "matmul"))
    for precision, peak in peaks.items():
        found = groups.rates(stages.Work(0, int(1e12), int(2e12), precision), 1e12 / peak * 2)
        assert math.isclose(found["share_of_ceiling"], 0.5) and found["gigabytes_per_second"] is None
    assert groups.rates(stages.Work(int(4e9)), 2e-3)["share_of_ceiling"] == 0.5


TUNE = """
import importlib, json, torch, calls, tune
from zfcore import use_backend
from zfcore.ops.conv_delta import ConvChange, Places, conv_delta, delta_filters
from zfcore.ops.pool_delta import pool_delta
z = torch.zeros(3, 2, dtype=torch.int64)
window = ((3, 3), (1, 1), (1, 1), (1, 1))
places = Places(torch.zeros(3, dtype=torch.int64), z + 1, z, (5, 5))
x, y, delta = torch.randn(1, 8, 9, 9), torch.randn(1, 40, 9, 9), torch.randn(3, 8, 3, 3)
module = importlib.import_module("zfcore.kernels.conv_delta")
with use_backend("triton"):
    filters = delta_filters(torch.randn(40, 8, 3, 3))
    product = calls.Call(conv_delta, "conv3", (delta, filters, ConvChange(window, 1, (9, 9), (9, 9)), places, y))
    pool = calls.Call(pool_delta, "pool1", (delta, x, x, window, places))
    found = tune.tuned(module, product)
    configs = tune.table_for(module, found["asked"])
    print(json.dumps([found, tune.tuned(module, pool), configs]))

from zfcore.ops import _library
_library._BY_DEVICE["cpu"] = ("triton", "cpu")
module = importlib.import_module("zfcore.kernels.deconv_step")
module.APART = module.APART._replace(BLOCK_M=64)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3)).eval()
steps = calls.of_projections(model, torch.randn(1, 3, 9, 9), "2", 2)
print(json.dumps([tune.tuned(module, step) for step in steps]))
"""


def test_tuning_times_every_configuration_and_names_the_rules(tmp_path):
    """In Triton's interpreter, away from the source tree, whose kernels are no package."""
    pytest.importorskip("triton", reason="triton is not installed")
    path = os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", TUNE], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    product, pool, configs = json.loads(first)
    steps = json.loads(second)
    assert [step["layer"] for step in steps] == ["2: 16 to 16 from 1 x 1", "2: 16 to 3 from 3 x 3"]
    assert [len(step["milliseconds"]) for step in steps] == [4, 1]  # few channels have a tile of their own
    assert pool is None  # which launches another kernel
    assert product["layer"] == "conv3"
    assert product["asked"].items() >= {"precision": "ieee", "filters": 40, "rows": 75}.items()
    times = {tuple(config): value for config, value in product["milliseconds"]}
    assert len(times) > 1 and set(times) == set(map(tuple, configs)) and min(times.values()) > 0
    assert times[tuple(product["best"])] == min(times.values())
    assert math.isclose(product["rule_over_best"], times[tuple(product["rule"])] / min(times.values()))
