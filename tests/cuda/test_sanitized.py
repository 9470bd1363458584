"""The bodies again, under AddressSanitizer and UBSan: no access outside a tensor, no overflow of an index."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import driver
import pytest


def runtime(name: str) -> str:
    """The compiler's copy of a runtime library, or an empty string."""
    command = [driver.compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if Path(path).is_absolute() else ""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs sanitized.py with further arguments on a sanitized driver."""
    if driver.compiler() is None:
        pytest.skip("no C++ compiler: neither CXX nor g++ is there to build the host driver with")
    asan, stdcxx = runtime("libasan.so"), runtime("libstdc++.so")
    if not asan or not stdcxx:
        pytest.skip("the C++ compiler has no libasan.so to load into Python")
    # Unoptimised: the checks are the same, and the optimiser takes half a minute over them.
    flags = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    library = driver.build(tmp_path_factory.mktemp("sanitized"), *flags)
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{asan} {stdcxx}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's and torch's own
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("sanitized.py")

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, script, library, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)

    return run


def test_no_report(run):
    done = run()
    assert done.returncode == 0 and done.stdout.strip() == "clean", done.stderr[-4000:]


def test_a_read_past_a_tensor_is_caught(run):
    done = run("planted")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-4000:]
    assert "MaxPool" in done.stderr
