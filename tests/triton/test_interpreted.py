"""The Triton kernels against the float64 reference, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest

CHECKS = (
    "drawn_convolutions", "convolution_edges", "each_channel_by_itself", "boxes", "full_layers", "halves", "others", "engine"
)  # fmt: skip


@pytest.fixture(scope="module")
def running(start):
    """All checks' processes, side by side."""
    processes = {name: start("interpreted.py", name, interpreted=True) for name in CHECKS}
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(running, name):
    _, errors = running[name].communicate(timeout=600)
    assert running[name].returncode == 0, errors
