"""Timing several ways to the same answer in turn, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

SECONDS = 1.0  # that a group's rounds may take, apart from the least and the most rounds
LEAST_ROUNDS = 5
MOST_ROUNDS = 100


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result  # freed outside the time, as a caller who uses the result would
    return seconds


def interleave(
    rows: Mapping[str, Callable[[], object]], seconds: float = SECONDS, least: int = LEAST_ROUNDS
) -> dict[str, list[float]]:
    """Seconds of every row, round after round (A B C, A B C, ...); the caller has run each row before."""
    times = {name: [] for name in rows}
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= least and time.perf_counter() - start > seconds:
            break
        for name, run in rows.items():
            times[name].append(timed(run))
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median over the rounds of slow / fast, two sides of one `interleave`."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
