"""Runs a group: answers checked, rows timed in turn, floors held, and every row noted for the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import NamedTuple

from ceilings import ceilings
from floors import check_floor
from stages import Work
from timing import LEAST_ROUNDS, SECONDS, interleave, ratio, timed

PYTORCH = "pytorch"
AGAIN = 3  # times the rounds, when a ratio lies under its floor at first


@dataclass(frozen=True)
class Measured:
    """A row of the table. milliseconds: the median of its rounds.

    ratio: how many times faster than the row `against` of the same group, None without such a row.
    The rates are None where the group's work is not counted.
    """

    group: str
    row: str
    milliseconds: float
    rounds: int
    against: str | None = None
    against_milliseconds: float | None = None
    ratio: float | None = None
    floor: float | None = None
    gigabytes_per_second: float | None = None
    gigaflops: float | None = None
    gigaflops_dense: float | None = None
    share_of_ceiling: float | None = None


def rates(work: Work, seconds: float) -> dict[str, float | None]:
    """Rates of the least work, and the time that the machine needs for it as a share of the time taken."""
    top = ceilings()
    least = max(work.bytes / top.bytes_per_second, work.flops / top.peak(work.precision))
    return {
        "gigabytes_per_second": work.bytes / seconds / 1e9 if work.bytes else None,
        "gigaflops": work.flops / seconds / 1e9 if work.flops else None,
        "gigaflops_dense": work.dense_flops / seconds / 1e9 if work.flops else None,
        "share_of_ceiling": least / seconds,
    }


class Comparison(NamedTuple):
    """A group's rounds: seconds by row, and the least work of its answer where that is counted."""

    times: dict[str, list[float]]
    work: Work | None


class Groups:
    """Of one session: what has been measured, and against which floors; a group without one is not held.

    left_out: by row, why it was not measured.
    """

    def __init__(self, floors: Mapping[str, float]):
        self.floors = floors
        self.measured: list[Measured] = []
        self.left_out: dict[str, str] = {}
        self._compared: dict[str, Comparison] = {}

    def _compare(self, group, rows, check, work, against, seconds, least, items, wall) -> Comparison:
        check({name: run() for name, run in rows.items()})

        def each(seconds, least):
            times = interleave(rows, seconds, least, wall)
            return {name: [t / items.get(name, 1) for t in taken] for name, taken in times.items()}

        times, floor = each(seconds, least), self.floors.get(group)
        if floor is not None and min(ratio(times[against], times[name]) for name in rows if name != against) < floor:
            times = each(AGAIN * seconds, AGAIN * least)
        return Comparison(times, work() if work else None)

    def row(
        self,
        benchmark,
        group: str,
        row: str,
        rows: Mapping[str, Callable[[], object]],
        check: Callable[[dict[str, object]], None],
        work: Callable[[], Work] | None = None,
        *,
        against: str = PYTORCH,
        seconds: float = SECONDS,
        least: int = LEAST_ROUNDS,
        items: Mapping[str, int] = MappingProxyType({}),
        wall: bool = False,
    ) -> None:
        """Time `row` of `group`, and hold it to the group's floor unless it is the row they are held against.

        items: how many answers a row gives in one run, where it is not one; times and work are then of one answer.
        wall: on a GPU, count the host's own time too.
        All of `rows` are checked and timed at the group's first row, for `seconds` or `least` rounds.
        """
        if group not in self._compared:
            self._compared[group] = self._compare(
                group, rows, check, work, against, seconds, least, items, wall
            )
        times, counted = self._compared[group]
        own = times[row]
        median = statistics.median(own)
        # These rounds only fill pytest-benchmark's own report; a ratio needs rounds that were taken in turn.
        benchmark.group = group
        benchmark.pedantic(rows[row], rounds=1, iterations=1)
        numbers = rates(counted, median) if counted else {}
        if row != against:
            numbers |= {
                "against": against,
                "against_milliseconds": statistics.median(times[against]) * 1e3,
                "ratio": ratio(times[against], own),
                "floor": self.floors.get(group),
            }
        self._note(benchmark, Measured(group, row, median * 1e3, len(own), **numbers))
        if row != against and group in self.floors:
            check_floor(group, row, numbers["ratio"], self.floors[group])

    def alone(self, benchmark, group: str, row: str, run: Callable[[], object]) -> None:
        """Time a row once that takes no part in the comparison."""
        benchmark.group = group
        times = []
        benchmark.pedantic(lambda: times.append(timed(run)), rounds=1, iterations=1)
        self._note(benchmark, Measured(group, row, times[0] * 1e3, 1))

    def _note(self, benchmark, measured: Measured) -> None:
        self.measured.append(measured)
        benchmark.extra_info.update(
            {name: value for name, value in asdict(measured).items() if name not in ("group", "row")}
        )
