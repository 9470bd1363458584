"""Fixtures of the tests of the incremental engine."""

import math

import pytest

from zfcore.engine.sweep import Sweep


@pytest.fixture
def runs(monkeypatch):
    """How many images each run of the engine took."""
    seen, run = [], Sweep.run

    def spy(self, images, *arguments):
        seen.append(len(images))
        return run(self, images, *arguments)

    monkeypatch.setattr(Sweep, "run", spy)
    return seen


@pytest.fixture
def engine(runs, monkeypatch):
    """The engine, also where forwards would be counted as no more work."""
    monkeypatch.setattr(Sweep, "plain_macs", property(lambda self: math.inf))
    return runs
