"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time.

Each in a Python of its own: the interpreter is chosen when a kernel is defined, and what it defines cannot be compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def why_missing() -> str:
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        found = find_spec("zfcore.kernels")
    except ImportError:
        found = None
    return "" if found else "zfcore.kernels is not installed"


@pytest.fixture(scope="session")
def start():
    """start(script, *arguments, interpreted): the script's process."""
    if why_missing():
        pytest.skip(why_missing())

    def start(script: str, *arguments: str, interpreted: bool) -> subprocess.Popen:
        environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, HERE / script, *arguments]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE
        )

    return start
