"""Timing several ways to the same answer in turn, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from device import on_gpu

SECONDS = 1.0  # that a group's rounds may take, apart from the least and the most rounds
GPU_SECONDS = 0.2  # likewise on a GPU, whose rounds are shorter
LEAST_ROUNDS = 5
MOST_ROUNDS = 100
# The GPU waits this long before a run, so that all of its kernels are queued when the first one begins: a millisecond.
PAUSE_CYCLES = 2_000_000


def timed(run: Callable[[], object], wall: bool = False) -> float:
    """Seconds of one run. On a GPU: between two events on its stream, or with `wall` until all of its work is done."""
    if on_gpu():
        return _timed_on_gpu(run, wall)
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result  # freed outside the time, as a caller who uses the result would
    return seconds


def _timed_on_gpu(run: Callable[[], object], wall: bool) -> float:
    torch.cuda.synchronize()
    if wall:
        start = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    else:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(PAUSE_CYCLES)
        begin.record()
        result = run()
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
    del result
    return seconds


def interleave(
    rows: Mapping[str, Callable[[], object]],
    seconds: float = SECONDS,
    least: int = LEAST_ROUNDS,
    wall: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every row, round after round (A B C, A B C, ...); the caller has run each row before."""
    times = {name: [] for name in rows}
    seconds = min(seconds, GPU_SECONDS) if on_gpu() else seconds
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= least and time.perf_counter() - start > seconds:
            break
        for name, run in rows.items():
            times[name].append(timed(run, wall))
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median over the rounds of slow / fast, two sides of one `interleave`."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
