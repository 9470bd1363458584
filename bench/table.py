"""The table of a run: printed at its end, and stored as JSON and Markdown with what it was measured on."""

from __future__ import annotations

import datetime
import functools
import importlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from ceilings import EXACT, Ceilings
from device import on_gpu
from groups import Measured

ROOT = Path(__file__).resolve().parents[1]
HEADERS = (
    "group",
    "row",
    "ms",
    "against",
    "its ms",
    "ratio",
    "floor",
    "GB/s",
    "GFLOP/s",
    "dense GFLOP/s",
    "of ceiling",
)
LEFT = ("group", "row", "against")


def number(value: float | None, digits: int = 1, suffix: str = "") -> str:
    return "" if value is None else f"{value:.{digits}f}{suffix}"


def cells(rows: Sequence[Measured]) -> list[tuple[str, ...]]:
    """A line for every row; one that others are held against is in their lines already."""
    held_against = {(row.group, row.against) for row in rows}
    lines = []
    for row in sorted(rows, key=lambda row: row.group.split()[0]):  # stable: the stages stay in order
        if (row.group, row.row) in held_against:
            continue
        share = None if row.share_of_ceiling is None else 100 * row.share_of_ceiling
        lines.append(
            (
                row.group,
                row.row,
                number(row.milliseconds, 2),
                row.against or "",
                number(row.against_milliseconds, 2),
                number(row.ratio, 2),
                number(row.floor, 2),
                number(row.gigabytes_per_second),
                number(row.gigaflops),
                number(row.gigaflops_dense),
                number(share, 0, " %"),
            )
        )
    return lines


def text_table(rows: Sequence[Measured]) -> list[str]:
    lines = [HEADERS, *cells(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if header in LEFT else cell.rjust(width)
            for header, cell, width in zip(HEADERS, line, widths, strict=True)
        )
        for line in lines
    ]


def markdown_table(rows: Sequence[Measured]) -> list[str]:
    rule = ["---" if header in LEFT else "---:" for header in HEADERS]
    return [f"| {' | '.join(line)} |" for line in (HEADERS, rule, *cells(rows))]


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def cpu_features() -> tuple[str, str]:
    """The CPU's features that matter to the kernels, and the instruction set that they use."""
    native = importlib.import_module("zfcore._C")
    names = [name for name, present in native.cpu_features().items() if present]
    return ", ".join(names) or "none that matter", native.cpu_isa()


@functools.cache
def commit() -> str:
    """The commit of the working tree, marked where the tree differs from it. Without git: $ZFCORE_COMMIT or "unknown"."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "kernels", "zfcore", "bench")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ZFCORE_COMMIT") or "unknown"


@functools.cache
def driver() -> str:
    """The version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def processor() -> dict[str, object]:
    if on_gpu():
        major, minor = torch.cuda.get_device_capability()
        own = {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}", "driver": driver()}
        return {**own, "cuda": torch.version.cuda, "triton": package_version("triton")}
    features, isa = cpu_features()
    return {"cpu": cpu_model(), "cpu_features": features, "kernels": isa, "threads": torch.get_num_threads()}


def environment(ceilings: Ceilings) -> dict[str, object]:
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **processor(),
        "python": platform.python_version(),
        **{name: package_version(name) for name in ("torch", "numpy", "captum")},
        "copy_gigabytes_per_second": round(ceilings.bytes_per_second / 1e9, 2),
        **{f"{name}_gigaflops": round(rate / 1e9, 1) for name, rate in ceilings.flops_per_second.items()},
        f"{EXACT}_peak_by": ceilings.peak_by,
    }


def left_out_lines(left_out: Mapping[str, str]) -> list[str]:
    """A line for every reason. left_out: reasons by row."""
    return [
        f"left out: {', '.join(row for row, why in left_out.items() if why == reason)}: {reason}"
        for reason in dict.fromkeys(left_out.values())
    ]


def page(stored: Mapping[str, object]) -> str:
    """A stored run as Markdown."""
    facts = [f"- {name.replace('_', ' ')}: {value}" for name, value in stored["measured_on"].items()]
    left_out = [f"- {line}" for line in left_out_lines(stored["left_out"])]
    rows = [Measured(**row) for row in stored["rows"]]
    return "\n".join(["# One run of the benchmarks", "", *facts, *left_out, "", *markdown_table(rows)]) + "\n"


def store(path: Path, rows: Sequence[Measured], left_out: Mapping[str, str], ceilings: Ceilings) -> None:
    """Write the run to `path` (JSON) and beside it as Markdown. left_out: groups that were not measured, and why."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        "measured_on": environment(ceilings), "left_out": dict(left_out), "rows": [asdict(row) for row in rows]
    }  # fmt: skip
    path.write_text(json.dumps(stored, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(stored))
