"""Options, floors and the closing table of `pytest bench/ --benchmark-only`."""

from pathlib import Path

import bench_analyses
import bench_changes
import bench_ops
import bench_steps
import ceilings
import floors
import groups as grouping
import pytest
import table
import torch

GROUPS = [*bench_ops.GROUPS, *bench_steps.GROUPS, *bench_changes.GROUPS, *bench_analyses.GROUPS]
SESSION = pytest.StashKey[grouping.Groups]()


def pytest_addoption(parser):
    parser.addoption(
        "--zfcore-json",
        type=Path,
        metavar="PATH",
        help="store the table of this run as JSON at PATH, and as Markdown beside it",
    )


def pytest_configure(config):
    file = floors.floors_file()
    try:
        loaded = floors.load_floors(file)
        floors.check_names(loaded, GROUPS)
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"{file}: {error}") from error
    config.stash[SESSION] = grouping.Groups(loaded)


def pytest_collection_modifyitems(items):
    """Ops first: what the analyses leave to the allocator would spare some later rows their page faults, not others."""
    order = [module.__name__ for module in (bench_ops, bench_steps, bench_changes, bench_analyses)]
    items.sort(key=lambda item: order.index(item.path.stem))


@pytest.fixture(scope="session")
def groups(request):
    return request.config.stash[SESSION]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    measured = config.stash[SESSION].measured
    if not measured:
        return
    top = ceilings.ceilings()
    terminalreporter.section("zfcore")
    for line in table.text_table(measured):
        terminalreporter.write_line(line)
    terminalreporter.write_line(
        f"ceilings on {torch.get_num_threads()} threads: copy {top.bytes_per_second / 1e9:.1f} GB/s, "
        f"float32 {top.flops_per_second / 1e9:.0f} GFLOP/s ({top.peak_by})"
    )
    if config.option.zfcore_json:
        table.store(config.option.zfcore_json, measured, top)
