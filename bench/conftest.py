"""Options, floors and the closing table of `pytest bench/ --benchmark-only`."""

import importlib
import time
from pathlib import Path

import ceilings
import device
import floors
import groups as grouping
import pytest
import table

MODULES = ("bench_ops", "bench_steps", "bench_changes", "bench_kernels", "bench_analyses")
GPU_ONLY = ("bench_kernels",)
SESSION = pytest.StashKey[grouping.Groups]()
END = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption("--device", choices=device.NAMES, default="cpu", help="what the benchmarks run on (cpu)")
    parser.addoption(
        "--zfcore-json",
        type=Path,
        metavar="PATH",
        help="store the table of this run as JSON at PATH, and as Markdown beside it",
    )
    parser.addoption(
        "--stop-after", type=float, metavar="SECONDS", default=float("inf"), help="begin no row after so many seconds"
    )


def pytest_configure(config):
    file = floors.floors_file()
    try:
        device.choose(config.option.device)
    except RuntimeError as error:
        raise pytest.UsageError(f"--device {config.option.device}: {error}") from error
    modules = [importlib.import_module(name) for name in MODULES if device.on_gpu() or name not in GPU_ONLY]
    loaded = {}
    if not device.on_gpu():  # whose floors wait for a first measurement
        try:
            loaded = floors.load_floors(file)
            floors.check_names(loaded, [group for module in modules for group in module.GROUPS])
        except (OSError, ValueError) as error:
            raise pytest.UsageError(f"{file}: {error}") from error
    config.stash[SESSION] = grouping.Groups(loaded)
    config.stash[END] = time.monotonic() + config.option.stop_after


def pytest_ignore_collect(collection_path):
    return True if collection_path.stem in GPU_ONLY and not device.on_gpu() else None


def pytest_collection_modifyitems(items):
    """Ops first: what the analyses leave to the allocator would spare some later rows their page faults, not others."""
    items.sort(key=lambda item: MODULES.index(item.path.stem))


@pytest.fixture(scope="session")
def groups(request):
    return request.config.stash[SESSION]


def pytest_runtest_setup(item):
    if time.monotonic() > item.config.stash[END]:
        pytest.skip("no time was left")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What is left out is named in the table; what was measured is kept, whatever becomes of the next row."""
    report = yield
    session, path = item.config.stash[SESSION], item.config.option.zfcore_json
    if report.skipped:
        session.left_out[item.name.removeprefix("test_")] = str(call.excinfo.value)
    elif path and call.when == "teardown" and session.measured:
        table.store(path, session.measured, session.left_out, ceilings.ceilings())
    return report


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[SESSION]
    if not session.measured:
        return
    terminalreporter.section("zfcore")
    for line in table.text_table(session.measured):
        terminalreporter.write_line(line)
    for line in table.left_out_lines(session.left_out):
        terminalreporter.write_line(line)
    top = ceilings.ceilings()
    terminalreporter.write_line(f"ceilings on {top}")
    if config.option.zfcore_json:
        table.store(config.option.zfcore_json, session.measured, session.left_out, top)
