"""The floors: how many times as fast as the other side of its group a row of zfcore must be.

floors.toml holds one number for every group, [op] / stage / layout. The environment variable
ZFCORE_BENCH_FLOORS names another file of the same form.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLE = "ZFCORE_BENCH_FLOORS"
COMMITTED = Path(__file__).with_name("floors.toml")


class BelowFloor(AssertionError):
    """A measured ratio lies under its group's floor."""


def floors_file() -> Path:
    return Path(os.environ.get(VARIABLE) or COMMITTED)


def load_floors(path: Path) -> dict[str, float]:
    """Group name ("op stage layout") to floor."""
    with path.open("rb") as file:
        tables = tomllib.load(file)
    return {
        f"{op} {stage} {layout}": float(floor)
        for op, stages in tables.items()
        for stage, layouts in stages.items()
        for layout, floor in layouts.items()
    }


def check_names(floors: Iterable[str], groups: Iterable[str]) -> None:
    """A floor for every group, and a group for every floor: a misspelt one would hold nothing."""
    floors, groups = set(floors), set(groups)
    if missing := sorted(groups - floors):
        raise ValueError(f"no floor for: {', '.join(missing)}")
    if unknown := sorted(floors - groups):
        raise ValueError(f"floors for groups that are not timed: {', '.join(unknown)}")


def check_floor(group: str, row: str, ratio: float, floor: float) -> None:
    if ratio < floor:
        raise BelowFloor(
            f"{group}: {row} is {ratio:.2f} times as fast as its other side here, its floor is {floor:.2f}"
        )
