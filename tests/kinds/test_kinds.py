"""Every kind of tensor that torch has, as images, weights, biases and buffers: analysed, or refused by name.

The rows run in processes of their own: what ends one fails no other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from kinds_of_tensors import KINDS  # noqa: E402
from rows import PLACES  # noqa: E402
from scenes import SCENES  # noqa: E402

WORKERS = 2

# Kinds that torch computes with and the analyses do not, in every place that they read.
REFUSED = {
    "shrunk": "the rest of which was freed",  # torch reads what lies behind
    "two": "a TwoTensor",
    "wrapper": "a Wrapper",
    "logging": "a Logging",
    "meta": "on the meta device",
    "functional": "a tensor of a transform of torch.func",
}
# The same, in single places.
REFUSED_AT = {
    ("images", "halves"): "a Halves",  # the images are seen by more than the model
    ("images", "mkldnn"): "torch._mkldnn",
}
NO_GRADIENT = {("7.weight", "bsr"): "torch.sparse_bsr"}
AT_ONCE = ("meta", "functional", "lazy")  # refused whatever the layer
# Kinds that torch leaves to the model's first operation, and the analyses bring to the model's dtype.
CAST = ("half", "double", "float8")
# Where the engine is left for the dense path, or for plain forwards, since kernels could not find the memory.
LEFT_TO_TORCH = ("halves", "csr", "csc", "bsr")


def run() -> dict[tuple[str, str, str], dict]:
    script = Path(__file__).parent / "rows.py"
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    workers = [
        subprocess.Popen(
            [*command, str(part), str(WORKERS)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **one},
        )
        for part in range(WORKERS)
    ]  # fmt: skip
    found = {}
    for worker in workers:
        out, err = worker.communicate(timeout=600)
        assert worker.returncode == 0, err[-2000:]
        found |= {tuple(row): said for row, said in map(json.loads, out.splitlines())}
    return found


@pytest.fixture(scope="module")
def rows():
    return run()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_tensor(rows, kind, place):
    for call in PLACES[place]:
        said = rows[call, place, kind]
        if "made" in said:
            return  # torch makes no tensor of this kind and shape
        seen = place == "images" or place.startswith("0.") or call != "first" or kind in AT_ONCE
        runs = said.get("torch", "").isidentifier()  # the class of the output
        words = REFUSED.get(kind) or REFUSED_AT.get((place, kind))
        if call == "project":
            words = words or NO_GRADIENT.get((place, kind))
        if seen and (words or not runs and not (place == "images" and kind in CAST)):
            assert "refused" in said, (call, said)
            assert (words or "") in said["words"], (call, said)
            # The place by its name, or what the model makes of it.
            named = (place if place == "images" else f"'{place}'", "returned a", "returns a", "images", "units: 1")
            assert any(each in said["words"] for each in named) or kind == "empty", (call, said)
            continue
        assert said.get("differs") == "", (call, said)
        if kind in LEFT_TO_TORCH and seen and place != "images":
            assert said["path"] == ("forwards" if call == "occlude" else "dense"), (call, said)
            assert "reads a tensor" in said["reason"] or "cannot be followed" in said["reason"], (call, said)


@pytest.mark.parametrize("name", SCENES)
def test_a_scene(rows, name):
    assert rows["scene", name, ""] == {"said": ""}
