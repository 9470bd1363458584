"""The Triton kernels against the float64 reference, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest

CHECKS = {
    "interpreted.py": (
        "drawn_convolutions", "convolution_edges", "each_channel_by_itself", "boxes", "full_layers", "halves", "others",
        "functions", "engine",
    ),
    "interpreted_steps.py": ("drawn_steps", "more_drawn_steps", "edges", "networks_layers", "the_fused_op", "projections"),
    "interpreted_pool.py": ("drawn_pools", "networks_pools", "edges", "far_apart"),
}  # fmt: skip
EVERY = [(script, name) for script, names in CHECKS.items() for name in names]


@pytest.fixture(scope="module")
def running(start):
    """All checks' processes, side by side."""
    processes = {(script, name): start(script, name, interpreted=True) for script, name in EVERY}
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("check", EVERY, ids=lambda check: check[1])
def test_in_the_interpreter(running, check):
    _, errors = running[check].communicate(timeout=600)
    assert running[check].returncode == 0, errors
