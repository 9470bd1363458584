"""A worker: each row of the table in a forked process of its own, which may end in any way."""

from __future__ import annotations

import copy
import importlib
import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import scenes  # noqa: E402
from kinds_of_tensors import KINDS, VALUES  # noqa: E402

import zfcore  # noqa: E402
from zfcore.errors import ZfcoreError  # noqa: E402



CALLS = ("project", "first", "occlude")  # the projection of the output, of the first layer; an occlusion map
DEEP = ("project", "occlude")  # what reads the upper layers
PLACES = {
    "images": CALLS, "0.weight": CALLS, "0.bias": CALLS, "1.running_mean": DEEP, "1.weight": DEEP, "4.weight": DEEP,
    "7.weight": CALLS, "7.bias": DEEP,
}  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 5 * 5, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[1].running_mean.uniform_(-0.2, 0.2)
        model[1].weight.uniform_(0.5, 1.5)
    return model.requires_grad_(False)


IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def placed(place: str, make) -> tuple[nn.Module, torch.Tensor]:
    """The network and its images, the tensor at a place made by `make`."""
    model, images = network(), IMAGES
    if place == "images":
        return model, make(images.clone())
    name, _, attribute = place.rpartition(".")
    module = model.get_submodule(name)
    held = module._buffers if attribute in module._buffers else module._parameters
    t = make(held[attribute].detach().clone())
    if held is module._parameters and not isinstance(t, nn.Parameter):
        try:
            t = nn.Parameter(t, requires_grad=t.requires_grad)
        except Exception:  # torch makes none of this kind
            pass
    held[attribute] = t
    return model, images


def analysed(call: str, model: nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], str, str]:
    if call == "project":
        p = zfcore.deconv_project(model, images, "", [1, 3])
        return [p.pixels, p.activations, p.positions], p.path, p.reason
    if call == "first":
        p = zfcore.deconv_project(model, images, "0", [1, 3])
        return [p.pixels, p.activations, p.positions], p.path, p.reason
    o = zfcore.occlusion_map(model, images, targets=1, box=4, stride=4, score="logit", feature=("5", 2))
    return [o.scores, o.clean, o.labels, o.activation], o.path, o.reason


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> str:
    for each, other in zip(found, wanted, strict=True):
        if type(each) is not torch.Tensor:
            return f"a {type(each).__name__}"
        try:
            torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-5, equal_nan=True)
        except AssertionError as error:
            return " ".join(str(error).split())
    return ""


def row(call: str, place: str, kind: str) -> dict:
    said = {}
    try:
        model, images = placed(place, KINDS[kind])
    except Exception as error:
        return {"made": f"{type(error).__name__}: {error}"[:300]}
    wanted = None
    try:
        wanted = analysed(call, *placed(place, VALUES.get(kind, lambda t: t)))[0]
    except Exception as error:
        said["values"] = f"{type(error).__name__}: {error}"[:300]
    try:
        with torch.no_grad():
            said["torch"] = type(copy.copy(model)(images.clone() if place != "images" else images)).__name__
    except Exception as error:
        said["torch"] = f"{type(error).__name__}: {error}"[:200]
    before = torch.get_default_dtype(), torch.get_num_threads()
    try:
        found, path, reason = analysed(call, model, images)
    except ZfcoreError as error:
        return said | {"refused": type(error).__name__, "words": str(error)}
    except Exception as error:
        return said | {"bare": type(error).__name__, "words": str(error), "trace": traceback.format_exc()[-1500:]}
    assert before == (torch.get_default_dtype(), torch.get_num_threads())
    return said | {"differs": same(found, wanted) if wanted is not None else "no values", "path": path, "reason": reason}


def forked(work, limit: float = 10) -> dict:
    """What `work` returns, done in a child; or how the child ended."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(int(limit))
        try:
            said = work()
        except BaseException:
            said = {"broken": traceback.format_exc()[-1500:]}
        os.write(write, json.dumps(said).encode()[:60000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    if status:
        return {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else {"exit": status}
    return json.loads(said)


def scene(name: str) -> dict:
    try:
        return {"said": scenes.SCENES[name](network(), IMAGES)}
    except Exception:
        return {"said": traceback.format_exc()[-1500:]}


def main(part: int, parts: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for kind in ("plain", "halves", "freed"):  # imports and first times, which no row has to wait for
        for call in CALLS:
            row(call, "images", kind)
            row(call, "7.weight", kind)
    importlib.import_module("torch.distributed.tensor")
    for kind in ("two", "masked", "fake"):
        KINDS[kind](torch.ones(2, 3))
    table = [("scene", name, "") for name in scenes.SCENES]
    table += [(call, place, kind) for kind in KINDS for place, calls in PLACES.items() for call in calls]
    for call, place, kind in table[part::parts]:
        said = forked(lambda: scene(place) if call == "scene" else row(call, place, kind))
        print(json.dumps([[call, place, kind], said]), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
