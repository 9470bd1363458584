"""Fixtures of the tests of the incremental engine."""

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
    """The engine on changes alone, also where values or forwards would be counted as less work."""
    divide = Sweep.divide
    monkeypatch.setattr(Sweep, "divide", lambda self, changes: (divide(self, len(self.steps))[0], float("inf")))
    return runs
