"""The benchmarks' own promises: a ratio under its floor fails the run, and a stored run names no place."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
GROUP = "max_pool2d_with_switches pool5 channels_last"  # the quickest one
UNREACHABLE = 1e9


@pytest.fixture
def floors(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import floors

    return floors


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import timing

    return timing


def write_floors(path, floors, changed):
    """The committed floors, some of them replaced."""
    tables = {}
    for group, floor in (floors.load_floors(floors.COMMITTED) | changed).items():
        op, stage, layout = group.split()
        tables.setdefault(op, []).append(f"{stage}.{layout} = {floor}")
    path.write_text("".join(f"[{op}]\n" + "\n".join(lines) + "\n" for op, lines in tables.items()))


def run_bench(tmp_path, floors_file, *options):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(BENCH), "--benchmark-only"]
    return subprocess.run(
        [*command, "-k", GROUP.replace(" ", "-"), *options],
        cwd=tmp_path,
        env=os.environ | {"ZFCORE_BENCH_FLOORS": str(floors_file)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_ratio_under_its_floor_is_an_error(floors):
    floors.check_floor("group", "zfcore", 3.0, 3.0)
    with pytest.raises(floors.BelowFloor, match=r"group: zfcore is 2\.99 times .* floor is 3\.00"):
        floors.check_floor("group", "zfcore", 2.99, 3.0)


@pytest.mark.parametrize(
    ("group", "least"),
    [
        ("max_pool2d_with_switches pool1 nchw", 3.0),
        ("max_pool2d_with_switches pool1 channels_last", 3.0),
        ("unpool_relu_conv_transpose2d pool1 nchw", 3.0),
        ("unpool_relu_conv_transpose2d pool1 channels_last", 3.0),
        ("unpool_relu_conv_transpose2d pool2 nchw", 2.0),
        ("unpool_relu_conv_transpose2d pool2 channels_last", 2.0),
    ],
)
def test_promised_floors_are_not_lowered(floors, group, least):
    assert floors.load_floors(floors.COMMITTED)[group] >= least


def test_no_floor_lets_what_users_call_be_slower_than_the_other_side(floors):
    parts = ("unpool2d", "unpool_relu2d", "pool_gather2d")  # alone they do more than the other side does
    kept = floors.load_floors(floors.COMMITTED)
    assert min(floor for group, floor in kept.items() if group.split()[0] not in parts and "full" not in group) >= 0.9
    assert min(kept.values()) >= 0.4


def test_every_group_has_a_floor_and_every_floor_a_group(floors):
    floors.check_names({"a": 1.0}, ["a"])
    with pytest.raises(ValueError, match="no floor for: b"):
        floors.check_names({"a": 1.0}, ["a", "b"])
    with pytest.raises(ValueError, match="not timed: a"):
        floors.check_names({"a": 1.0, "b": 1.0}, ["b"])


def test_ratios_are_taken_round_by_round(timing):
    # A disturbance that hits both sides of a round changes neither its ratio nor the median.
    assert timing.ratio([4.0, 40.0, 4.0], [2.0, 20.0, 2.0]) == 2.0
    calls = []
    times = timing.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0, least=3)
    assert "".join(calls) == "ababab"
    assert [len(seconds) for seconds in times.values()] == [3, 3]


def test_a_run_fails_under_a_floor(tmp_path, floors):
    write_floors(tmp_path / "floors.toml", floors, {GROUP: UNREACHABLE})
    run = run_bench(tmp_path, tmp_path / "floors.toml")
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    assert f"BelowFloor: {GROUP}: zfcore is" in run.stdout


def test_a_run_passes_prints_its_table_and_stores_it(tmp_path, floors):
    write_floors(tmp_path / "floors.toml", floors, {GROUP: 0.0})
    stored = tmp_path / "stored" / "run.json"
    run = run_bench(tmp_path, tmp_path / "floors.toml", "--zfcore-json", str(stored))
    assert run.returncode == pytest.ExitCode.OK, run.stdout + run.stderr
    assert re.search(rf"{GROUP} +zfcore +[\d.]+ +pytorch", run.stdout)
    assert "ceilings on" in run.stdout

    content = json.loads(stored.read_text())
    by_name = {row["row"]: row for row in content["rows"]}
    assert set(by_name) == {"pytorch", "zfcore", "reference"}
    ours = by_name["zfcore"]
    assert ours["group"] == GROUP and ours["against"] == "pytorch" and ours["floor"] == 0.0
    assert min(ours["ratio"], ours["gigabytes_per_second"], ours["share_of_ceiling"]) > 0
    assert set(content["measured_on"]) == {
        *("commit", "date", "cpu", "cpu_features", "kernels", "threads", "python", "torch", "numpy", "captum"),
        *("copy_gigabytes_per_second", "float32_gigaflops", "float32_peak_by"),
    }
    page = stored.with_suffix(".md").read_text()
    assert f"| {GROUP} | zfcore |" in page
    for path in (tmp_path, BENCH.parent, Path.home()):
        assert str(path) not in stored.read_text() + page


def test_a_floors_file_with_a_missing_group_is_refused(tmp_path):
    (tmp_path / "floors.toml").write_text("[max_pool2d_with_switches]\npool1.nchw = 3.0\n")
    run = run_bench(tmp_path, tmp_path / "floors.toml")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no floor for:" in run.stderr and GROUP in run.stderr
