"""Runs the attack: cases of every op in processes that may die, and what came of them as a table.

    python tests/attack/attack_run.py --cases 20000           every op
    python tests/attack/attack_run.py --op conv_delta --seed 17      one case, here

A worker loads torch once and forks a child for each batch of cases, so that a child that dies costs one case. It names
that case, runs it once more alone, and goes on with the next.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

BATCH = 250  # cases of one child
LIMIT_S = float(os.environ.get("ZFCORE_ATTACK_LIMIT_S", 10))  # that a case, or its definition, may take
MEMORY = 3 * 2**30  # bytes that a child may reserve beyond what it begins with
KEPT = 40  # failures of an op that are told in full
SIGNAL, HANG, DEFINITION = "signal", "hang", "definition"
COLUMNS = ("answer", "typed", "schema", "memory", "bare", "unheld", "wrong", "refused", SIGNAL, HANG, DEFINITION)
FAILURES = ("bare", "unheld", "wrong", "refused", SIGNAL, HANG)
NOTES = {
    "answer": "values that the definition gives too",
    "typed": "an error of zfcore's",
    "schema": "refused by torch's dispatcher",
    "memory": "an allocation that failed",
    "bare": "an error of no documented type",
    "unheld": "answered where the definition raises",
    "wrong": "other values than the definition's",
    "refused": "a good call refused",
    SIGNAL: "the process ended",
    HANG: f"over {LIMIT_S:g} s",
    DEFINITION: "the definition itself ended or hung: not judged",
}


# A worker -------------------------------------------------------------------------------------------------------------


def work() -> None:
    """Reads "op first count" lines, and writes what comes of the cases as lines of JSON."""
    import attack_judge  # noqa: F401  once, for all children
    import attack_planted
    import torch

    torch.set_num_threads(1)
    if os.environ.get("ZFCORE_ATTACK_PLANTED"):
        attack_planted.plant()
    for line in sys.stdin:
        name, first, count = line.split()
        done, end = int(first), int(first) + int(count)
        while done < end:
            done = _batch(name, done, min(done + BATCH, end))
        print(json.dumps({"end": name}), flush=True)


def _batch(name: str, first: int, end: int) -> int:
    """Runs cases in a child of its own until it is through or one ends it; returns the next case."""
    with tempfile.TemporaryFile() as said:
        pid, pipe = _fork(lambda tell: _cases(name, range(first, end), tell), said)
        seed, phase, done = first, "op", first
        for event in _events(pid, pipe):
            kind, number, *rest = event
            if kind == "start":
                seed, phase = number, "op"
            elif kind == "defining":
                phase = "definition"
            else:
                done = number + 1
                _tell(name, number, *rest)
        status = os.waitpid(pid, 0)[1]
        if status == 0 and done == end:
            return end
        outcome = HANG if status == signal.SIGKILL else SIGNAL
        if phase == "definition" and (outcome == HANG or _ends(lambda tell: _define(name, seed))):
            _tell(name, seed, DEFINITION)
            return seed + 1
        how = ""
        if outcome == SIGNAL:
            alone = _ends(lambda tell: _cases(name, range(seed, seed + 1), tell))
            since = "alone too" if alone else f"not alone, but in a run of the cases since {first}"
            how = f"{_ending(status)} ({since}) {_tail(said)}"
        _tell(name, seed, outcome, how, _described(name, seed))
        return seed + 1


def _fork(run, said) -> tuple[int, int]:
    """A child that runs `run(tell)`; its id, and the end of the pipe that what it tells is read from."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    status = 1
    try:
        os.close(reading)
        os.dup2(said.fileno(), 2)
        _bound_memory()
        run(lambda *event: os.write(writing, (json.dumps(event) + "\n").encode()))
        status = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def _bound_memory() -> None:
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        return  # whose shadow is larger than any memory
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _cases(name: str, seeds: range, tell) -> None:
    import warnings

    import attack_judge

    warnings.simplefilter("ignore")
    for seed in seeds:
        tell("start", seed)
        outcome, why = attack_judge.judge(name, seed, lambda seed=seed: tell("defining", seed))
        shown = "" if outcome in attack_judge.RIGHT else describe(name, seed)
        tell("done", seed, outcome, why, shown)


def describe(name: str, seed: int) -> str:
    import attack_calls
    from attack_hostile import show

    args, changed = attack_calls.case(name, seed)
    return f"hostile: {', '.join('.'.join(map(str, path)) for path in changed)}; {show(args)}"


def _define(name: str, seed: int) -> None:
    """Runs the definition alone: what it does not survive then is its own fault, and not what the op did to the memory."""
    import attack_judge

    with contextlib.suppress(Exception):
        attack_judge.define(name, seed)


def _ends(run) -> bool:
    """Whether a process of its own does not survive this."""
    with tempfile.TemporaryFile() as said:
        pid, pipe = _fork(run, said)
        for _ in _events(pid, pipe):
            pass
        return os.waitpid(pid, 0)[1] != 0


def _described(name: str, seed: int) -> str:
    with tempfile.TemporaryFile() as said:
        pid, pipe = _fork(lambda tell: tell(describe(name, seed)), said)
        told = [event[0] for event in _events(pid, pipe)]
        os.waitpid(pid, 0)
        return told[0] if told else ""


def _events(pid: int, pipe: int):
    """What a child tells, until it ends; one that is silent for too long is ended."""
    left = b""
    with os.fdopen(pipe, "rb", buffering=0) as stream:
        while True:
            ready, _, _ = select.select([stream], [], [], LIMIT_S)
            if not ready:
                os.kill(pid, signal.SIGKILL)
                return
            data = stream.read(1 << 16)
            if not data:
                return
            *lines, left = (left + data).split(b"\n")
            yield from map(json.loads, lines)


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit status {os.waitstatus_to_exitcode(status)}"


def _tail(said) -> str:
    """The last that the child wrote to its error stream, of a sanitizer's report the line that says what it is."""
    said.seek(0)
    lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "ERROR:" in line or "runtime error" in line or line.strip().startswith("#")]
    return " | ".join([line.strip()[:160] for line in told[:8]] + [line[:800] for line in lines[-2:] if line not in told])


def _tell(name: str, seed: int, outcome: str, why: str = "", shown: str = "") -> None:
    print(json.dumps({"op": name, "seed": seed, "outcome": outcome, "why": why, "shown": shown}), flush=True)


# The driver -----------------------------------------------------------------------------------------------------------


class Tally:
    """What came of an op's cases."""

    def __init__(self) -> None:
        self.counts: collections.Counter = collections.Counter()
        self.told: dict[str, list[dict]] = collections.defaultdict(list)  # failures by outcome

    def add(self, event: dict) -> None:
        outcome = event["outcome"]
        self.counts[outcome] += 1
        if outcome in FAILURES + (DEFINITION,) and len(self.told[outcome]) < KEPT:
            self.told[outcome].append(event)

    @property
    def failures(self) -> list[dict]:
        return [event for outcome in FAILURES for event in self.told[outcome]]


def attack(
    names: list[str], cases: int, workers: int = 2, first: int = 0, share: int = 2000, planted: bool = False
) -> dict[str, Tally]:
    """Runs the cases ``first`` to ``first + cases`` of each op, in shares that the workers take in turn.

    planted: the ops are faulty ones, of attack_planted, to see whether that is noticed.
    """
    shares: queue.Queue = queue.Queue()
    for name in names:
        for start in range(first, first + cases, share):
            shares.put((name, start, min(share, first + cases - start)))
    tallies = {name: Tally() for name in names}
    lock, broken = threading.Lock(), []

    def drive() -> None:
        worker = subprocess.Popen(
            [sys.executable, __file__, "--work"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment(planted),
        )  # fmt: skip
        try:
            while True:
                try:
                    name, start, count = shares.get_nowait()
                except queue.Empty:
                    return
                worker.stdin.write(f"{name} {start} {count}\n")
                worker.stdin.flush()
                for line in worker.stdout:
                    event = json.loads(line)
                    if "end" in event:
                        break
                    with lock:
                        tallies[name].add(event)
                else:
                    broken.append(f"a worker ended with {worker.wait()} in {name}, cases from {start}")
                    return
        finally:
            worker.stdin.close()
            worker.wait()

    threads = [threading.Thread(target=drive) for _ in range(min(workers, shares.qsize()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if broken:
        raise RuntimeError("; ".join(broken))
    return tallies


def _environment(planted: bool) -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    if planted:
        env |= {"ZFCORE_ATTACK_PLANTED": "1", "ZFCORE_ATTACK_LIMIT_S": "0.5"}
    if "asan" in env.get("LD_PRELOAD", ""):
        env["ASAN_OPTIONS"] = f"{env.get('ASAN_OPTIONS', '')}:max_allocation_size_mb={MEMORY >> 20}".lstrip(":")
    return env


def table(tallies: dict[str, Tally]) -> str:
    """The counts in Markdown."""
    rows = [("op", "cases", *COLUMNS)]
    for name, tally in tallies.items():
        rows.append((f"`{name}`", f"{sum(tally.counts.values()):,}", *(f"{tally.counts[c]:,}" for c in COLUMNS)))
    total = sum((tally.counts for tally in tallies.values()), collections.Counter())
    rows.append(("all", f"{sum(total.values()):,}", *(f"{total[c]:,}" for c in COLUMNS)))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def causes(tallies: dict[str, Tally]) -> dict[tuple[str, str, str], list[dict]]:
    """The failures that were kept, by op, outcome, and what was said of them, numbers left out."""
    found: dict[tuple[str, str, str], list[dict]] = collections.defaultdict(list)
    for name, tally in tallies.items():
        for event in tally.failures:
            why = event["why"] if event["outcome"] not in (SIGNAL, HANG) else event["why"].split("(")[0]
            if place := re.search(r"csrc/\w+\.\w+:\d+", event["why"]):  # which a sanitizer names
                found[name, event["outcome"], place[0]].append(event)
                continue
            said = re.sub(r"[(\[][-0-9, ]*[)\]]|-?\d[\d.e+-]*", "N", why)[:120]
            if event["outcome"] not in ("bare", "refused"):
                said += f" <- {_hostile(event)}"
            found[name, event["outcome"], said].append(event)
    return found


def _hostile(event: dict) -> str:
    """Which arguments were hostile, by name."""
    told = event["shown"].removeprefix("hostile: ").split(";")[0]
    return ", ".join(sorted({re.sub(r"\.\d+", "", path) for path in told.split(", ")}))


def report(tallies: dict[str, Tally]) -> str:
    """Every cause with how often it was kept, and its first case, to be run again."""
    return "\n".join(
        f"{name} {outcome} x{len(events)}: {said}\n    --op {name} --seed {events[0]['seed']}: {events[0]['why'][:600]}\n"
        f"    {events[0]['shown'][:1200]}"
        for (name, outcome, said), events in sorted(causes(tallies).items())
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=int, default=int(os.environ.get("ZFCORE_ATTACK", 20000)), help="of each op")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first")
    parser.add_argument("--op", action="append", help="only of this one; may be given again")
    parser.add_argument("--seed", type=int, help="run this case alone, in this process")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", type=Path, help="write the table there too")
    args = parser.parse_args()
    if args.work:
        work()
        return 0
    if args.seed is not None:
        import attack_judge

        print(describe(args.op[0], args.seed), flush=True)
        print(*attack_judge.judge(args.op[0], args.seed))
        return 0
    if not args.op:
        from attack_calls import OPS

        args.op = list(OPS)
    began = time.monotonic()
    tallies = attack(args.op, args.cases, args.workers, args.first)
    print(report(tallies))
    counts = table(tallies)
    print(f"\n{counts}\n\n{time.monotonic() - began:.0f} s. " + "; ".join(f"{k}: {v}" for k, v in NOTES.items()))
    if args.table:
        args.table.write_text(counts + "\n")
    return 1 if any(tally.failures for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
