"""Damaged weights files: an error that is named, or a network whose shapes are its own; never a signal.

A few hundred files a kind; ZFCORE_ATTACK=1 tries 20,000. Each kind runs in a process of its own.
"""

import io
import os
import random
import signal
import struct
import zipfile

import forked
import pytest
import safetensors.torch
import torch
from torch import nn

from zfcore.errors import WeightsError
from zfcore.models import load_weights

COUNTS = [
    300,
    pytest.param(
        20_000, marks=pytest.mark.skipif(not os.environ.get("ZFCORE_ATTACK"), reason="set ZFCORE_ATTACK=1")
    ),
]


class Net(nn.Module):
    """Small, with what loading has code for: a counter, tied weights, a hook, extra state."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))


def safetensors_file(state):
    """With no checksum, so that damage gets past it."""
    return safetensors.torch.save({name: value.clone() for name, value in state.items()}, {"note": "a"})


def zipped(state):
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "epoch": 3}, buffer)
    return buffer.getvalue()


def legacy(state):
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def damaged(data, pick):
    """A copy with one to three changes: cut, flipped, replaced, inserted, removed, repeated."""
    for _ in range(pick.choice((1, 1, 2, 3))):
        at = pick.randrange(len(data) + 1)
        length = pick.choice((1, 1, 2, 4, 8, 40))
        noise = pick.choice((bytes(length), b"\xff" * length, pick.randbytes(length), struct.pack("<q", 2**62)))
        data = pick.choice(
            (
                data[:at],
                data[:at] + noise + data[at + len(noise) :],
                data[:at] + noise + data[at:],
                data[:at] + data[at + length :],
                data[:at] + data[max(0, at - length) : at] + data[at:],
                data[:at] + bytes(each ^ 1 << pick.randrange(8) for each in data[at : at + 1]) + data[at + 1 :],
            )
        )
    return data


def damaged_header(data, pick):
    """Of safetensors: damage within the header, its length put right."""
    length = struct.unpack("<Q", data[:8])[0]
    header = damaged(data[8 : 8 + length], pick)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def damaged_pickle(data, pick):
    """Of a zip: damage within one record, the archive whole."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    records = {name: archive.read(name) for name in archive.namelist()}
    hit = pick.choice([name for name in records if name.endswith("data.pkl")] * 5 + list(records))
    records[hit] = damaged(records[hit], pick)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as changed:
        for name, content in records.items():
            changed.writestr(name, content)
    return buffer.getvalue()


def attack(path, make, damage, count):
    """The files, one after the other, where a failure leaves the last of them. Returns what went wrong."""
    torch.manual_seed(1)
    source, model, pick = Net(), Net(), random.Random(3)
    data = make(source.state_dict())
    shapes = [value.shape for value in model.state_dict().values()]
    for number in range(count):
        before = [value.clone() for value in model.state_dict().values()]
        path.write_bytes(damage(data, pick))
        signal.alarm(10)
        try:
            load_weights(model, path, strict=bool(number % 2))
        except WeightsError:
            after = list(model.state_dict().values())
            if not all(map(same_bits, before, after)):
                return f"file {number}: an error, and the network changed"
        if [value.shape for value in model.state_dict().values()] != shapes:
            return f"file {number}: the network's shapes changed"
    return ""


def same_bits(first, second):
    return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (first, second)))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("suffix", "make", "damage"),
    [
        (".safetensors", safetensors_file, damaged),
        (".safetensors", safetensors_file, damaged_header),
        (".pth", zipped, damaged),
        (".pth", zipped, damaged_pickle),
        (".pth", legacy, damaged),
    ],
    ids=["safetensors", "safetensors header", "pth", "pth record", "legacy pth"],
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_loaded(tmp_path, suffix, make, damage, count):
    file = tmp_path / f"net{suffix}"
    assert forked.outcome(tmp_path / "said", lambda: attack(file, make, damage, count)) == ""
