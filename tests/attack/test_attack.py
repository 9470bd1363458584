"""Hostile calls of the overloads and of the engine's ops: an answer that the definition gives too, or a typed error.

ZFCORE_FUZZ_EXAMPLES sets how many calls each op meets; `make attack` runs many more.
"""

from __future__ import annotations

import os

import attack_calls
import attack_planted
import attack_run
import pytest

EXAMPLES = int(os.environ.get("ZFCORE_FUZZ_EXAMPLES", 200))
CASES = 17  # of a planted fault; two of them are good calls


@pytest.fixture(scope="module")
def tallies():
    return attack_run.attack(list(attack_calls.OPS), EXAMPLES)


@pytest.mark.parametrize("name", attack_calls.OPS)
def test_a_hostile_call_is_right_or_refused(tallies, name):
    tally = tallies[name]
    assert not tally.failures, attack_run.report({name: tally})
    assert sum(tally.counts.values()) == EXAMPLES
    # A suite that meets nothing but refusals, or never one, proves nothing.
    assert min(tally.counts["answer"], tally.counts["typed"] + tally.counts["schema"]) >= EXAMPLES // 20


@pytest.fixture(scope="module")
def planted():
    return attack_run.attack(list(attack_planted.FAULTS), CASES, planted=True)


@pytest.mark.parametrize("name", attack_planted.FAULTS)
def test_the_attack_notices(planted, name):
    """A fault of each kind, planted: a check that cannot fail proves nothing."""
    tally, outcome = planted[name], attack_planted.FAULTS[name][1]
    assert sum(tally.counts.values()) == CASES
    assert tally.counts[outcome], tally.counts
    event = tally.told[outcome][0]
    assert event["shown"].startswith("hostile: ") and "x=" in event["shown"]
