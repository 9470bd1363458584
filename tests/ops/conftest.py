"""Fixtures of the op tests."""

from __future__ import annotations

import pytest
import torch
from running import present, running_on


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name for name in present()])
def backend(request):
    """The test runs once on each backend of this machine; test_backends.py says why others are missing."""
    with running_on(request.param) as backend:
        yield backend


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The samples are too small to share between threads, and more threads change no bit, as a test shows."""
    threads(1)
