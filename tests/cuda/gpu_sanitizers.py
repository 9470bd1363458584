"""compute-sanitizer's four tools on every kernel of a GPU: python gpu_sanitizers.py [--seconds 150]

First each tool on a planted bug, which it must report, and on the same program without the bug, which it must not: a
check that cannot fail proves nothing. Then each on gpu_suite.py, all four beside one another. Needs a GPU, nvcc and
compute-sanitizer; TRITON_CACHE_DIR keeps what the suite compiles from run to run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
REPORTED = 99  # the exit status of a tool that has something to report
OPTIONS = ("--error-exitcode", str(REPORTED), "--print-limit", "20")
# Calls of the driver that may fail, as torch's own look for functions that this driver lacks, are no memory errors; one
# that must not ends the suite.
SUITE_OPTIONS = {"memcheck": ("--report-api-errors", "no")}
# Each tensor its own memory, so that what lies past one is nobody's.
ENVIRONMENT = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


class Runs:
    """Runs that share `seconds`. Each has a process group, so that what it started ends with it: `end` ends all."""

    def __init__(self, seconds: float):
        self.until = time.monotonic() + seconds
        self.running: list[subprocess.Popen] = []

    def start(self, command: list, log: Path) -> subprocess.Popen:
        command = [str(part) for part in command]
        with log.open("w") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "env": ENVIRONMENT, "start_new_session": True}
            process = subprocess.Popen(command, **options)
        self.running.append(process)
        return process

    def wait(self, process: subprocess.Popen) -> int | str:
        """Its exit status, or that it did not end in time."""
        try:
            return process.wait(max(0.0, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "did not end in time"

    def end(self) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def build_planted(folder: Path, architecture: str) -> Path:
    program = folder / "planted"
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-lineinfo", "-o", program, HERE / "planted.cu"]
    subprocess.run(command, check=True)
    return program


def check(runs: Runs, architecture: str) -> list[str]:
    """The runs that did not end as they must."""
    failures = []

    def judge(what: str, status: int | str, wanted: int, log: Path) -> None:
        good = status == wanted
        print(f"{what}: {'as it must be' if good else f'status {status}, expected {wanted}'}", flush=True)
        if not good:
            failures.append(what)
            print(log.read_text(errors="replace")[-6000:], flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suite = [sys.executable, HERE / "gpu_suite.py"]
        # Once without a tool: the answers are right, and Triton's kernels are compiled.
        plain = runs.start([*suite, "--far"], folder / "plain.log")
        planted = build_planted(folder, architecture)
        for tool in TOOLS:
            for kind, wanted in ((), REPORTED), (("clean",), 0):
                log = folder / "planted.log"
                process = runs.start(["compute-sanitizer", "--tool", tool, *OPTIONS, planted, tool, *kind], log)
                judge(f"{tool} on {'the clean program' if kind else 'the planted bug'}", runs.wait(process), wanted, log)
        judge("the suite without a tool", runs.wait(plain), 0, folder / "plain.log")
        running = {}
        for tool in TOOLS:
            more = ["--far"] if tool == "memcheck" else []
            command = ["compute-sanitizer", "--tool", tool, *OPTIONS, *SUITE_OPTIONS.get(tool, ()), *suite, *more]
            running[tool] = runs.start(command, folder / f"{tool}.log")
        for tool, process in running.items():
            judge(f"{tool} on the suite", runs.wait(process), 0, folder / f"{tool}.log")
    return failures


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150, help="for everything (150)")
    parser.add_argument("--architecture", default="native", help="of the GPU, for nvcc (native)")
    options = parser.parse_args(arguments)
    missing = [name for name in ("compute-sanitizer", "nvcc") if shutil.which(name) is None]
    if missing:
        print(f"not on PATH: {', '.join(missing)}")
        return 1
    runs = Runs(options.seconds)
    try:
        failures = check(runs, options.architecture)
    finally:
        runs.end()
    print(f"sanitizers: {len(failures)} of {3 * len(TOOLS) + 1} runs failed" if failures else "sanitizers: all is well")
    return int(bool(failures))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is ended first
    sys.exit(main(sys.argv[1:]))
