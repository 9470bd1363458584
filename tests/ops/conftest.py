"""Fixtures of the op tests."""

from __future__ import annotations

import pytest
import torch
from running import BACKENDS, running_on, why_missing


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The test runs once on each backend."""
    missing = why_missing(request.param)
    if missing:
        pytest.skip(missing)
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
    """The samples are too small to share between threads; that more threads change no bit has tests of its own."""
    threads(1)
