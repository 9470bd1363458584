"""Analyses in forked processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FORKS = 100 if os.environ.get("ZFCORE_ATTACK") else 3  # of each call


@pytest.mark.parametrize("parent", ("idle", "busy"))
def test_no_call_in_a_fork_waits_for_what_stayed_behind(parent):
    """busy: two threads of the parent are inside of calls on the same model, and hold what they hold."""
    command = [sys.executable, str(Path(__file__).parent / "forks.py"), str(FORKS), parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 * FORKS)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "failed 0", done.stdout + done.stderr[-2000:]
