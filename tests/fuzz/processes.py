"""Cases in processes of their own: one that dies or hangs has failed its case, and another goes on after it.

A worker is a script that calls `serve`: it reads a JSON case a line and answers with its failures, a JSON list. Before
what may end the process it says what it is at, with `at`.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).parent


def size(default: int, full: int) -> int:
    """How many cases ZFCORE_FUZZ asks for: a number, "full", or nothing for the default."""
    asked = os.environ.get("ZFCORE_FUZZ", "")
    return full if asked == "full" else min(int(asked), full) if asked else default


# ---- A worker's side -----------------------------------------------------------------------------------------

_answers = None


def at(place: object) -> None:
    """What the worker does now."""
    _answers.write(json.dumps({"at": place}) + "\n")
    _answers.flush()


def serve(work: Callable[[object], list[str]]) -> None:
    global _answers
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no answer
    for line in sys.stdin:
        failures = work(json.loads(line))
        _answers.write(json.dumps({"failures": failures}) + "\n")
        _answers.flush()


# ---- The test's side -----------------------------------------------------------------------------------------


class Worker:
    def __init__(self, script: str, limit: float):
        self.script, self.limit = script, limit
        self.said = tempfile.TemporaryFile(mode="w+")
        self.process = None

    def start(self) -> None:
        one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / self.script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said,
            text=True, env={**os.environ, **one},
        )  # fmt: skip

    def stop(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.kill()
            self.process.wait()
            self.process = None

    def ask(self, case: object) -> tuple[list[str] | None, object, str]:
        """(failures, or None where the process ended; what it was at; how it ended)."""
        if self.process is None:
            self.start()
        late = threading.Event()

        def end() -> None:
            late.set()
            self.process.kill()

        place, timer = None, threading.Timer(self.limit, end)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(case) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                answer = json.loads(line)
                if "failures" in answer:
                    return answer["failures"], place, ""
                place = answer["at"]
        except BrokenPipeError:
            pass  # it ended before it read the case, which the next line tells
        finally:
            timer.cancel()
        code = self.process.wait()
        how = f"did not end in {self.limit} s" if late.is_set() else f"ended with {code}"
        self.said.seek(0)
        tail = self.said.read()[-1500:]
        self.said.truncate(0)
        self.stop()
        return None, place, f"{how}\n{tail}"


def run(
    script: str,
    cases: Iterable[object],
    ended: Callable[[object, object, str], tuple[str | None, object | None]],
    limit: float = 60,
    workers: int | None = None,
) -> list[str]:
    """The failures of all cases.

    ended: of a case whose process ended, what it was at and how: the failure, if it is one, and the case to go on with.
    """
    waiting: queue.Queue = queue.Queue()
    for case in cases:
        waiting.put(case)
    failures: list[str] = []

    def work() -> None:
        worker = Worker(script, limit)
        try:
            while True:
                try:
                    case = waiting.get_nowait()
                except queue.Empty:
                    return
                while case is not None:
                    found, place, how = worker.ask(case)
                    if found is not None:
                        failures.extend(found)
                        break
                    failure, case = ended(case, place, how)
                    if failure is not None:
                        failures.append(failure)
        finally:
            worker.stop()

    threads = [threading.Thread(target=work) for _ in range(workers or min(2, os.cpu_count() or 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures
