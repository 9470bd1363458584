"""A model may call any function of torch: reading it gives what the model computes, or says that it does not.

ZFCORE_FUZZ=full tries all functions in all ways, a number as many functions in some ways, picked by a seed.
"""

from __future__ import annotations

import random

import processes
import torch_functions

DEFAULT, WAYS = 600, 12


def ended(case, place, how):
    if place is None:
        return f"{case}: {how}", None
    name, number, what = place
    # Where the model itself ends the process, that is torch's own doing.
    failure = None if what == "model" and "did not end" not in how else f"{name}, call {number}: reading it {how}"
    return failure, [name, number + 1, case[2]]


def test_every_torch_function():
    names = list(torch_functions.functions())
    assert len(names) > 800
    picked = random.Random(0).sample(names, processes.size(DEFAULT, len(names)))
    ways = None if len(picked) == len(names) else WAYS
    failures = processes.run("torch_functions.py", [[name, 0, ways] for name in sorted(picked)], ended)
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures)
