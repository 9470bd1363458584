"""Networks drawn at random: what the reader, the projections and the occlusion maps make of them is what the model computes.

ZFCORE_FUZZ=full tries 20,000, a number as many. A failure names its seed and prints the network.
"""

from __future__ import annotations

import processes

DEFAULT, FULL = 2000, 20000


def ended(case, place, how):
    return f"seed {case[0]}, {place}: {how}", None


def parts(seed: int) -> list[str]:
    """The values of every network; of some the rest, which takes longer."""
    return ["values", "slopes", *(["projections"] if seed % 4 == 1 else []), *(["occlusion"] if seed % 8 == 2 else [])]


def test_random_networks():
    count = processes.size(DEFAULT, FULL)
    failures = processes.run("check_networks.py", [[seed, parts(seed)] for seed in range(count)], ended)
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures[:20])
