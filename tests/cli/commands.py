"""What the tests of the command share: a module of factories as a user would have it, pictures, and running it."""

import json
import os

import numpy as np
from PIL import Image

from zfcore import cli

NET = "zfcore_test_networks"
TINY = ("--model", f"{NET}:tiny", "--input-size", "12", "--no-progress", "--device", "cpu")
COARSE = ("--box", "6", "--stride", "3")

NETWORKS = """
import torch
from torch import nn

def tiny(channels=1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(3),
        nn.Flatten(), nn.Linear(54, 5),
    )

def colour():
    return tiny(3)

def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 5))

def probabilities():
    return nn.Sequential(tiny(), nn.Softmax(1))

def sigmoid():
    return nn.Sequential(tiny(), nn.Sigmoid())

def fixed():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(400, 5))

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tiny()

    def forward(self, x):
        return self.net(x) if x.sum() > 0 else self.net(-x)

def narrow():
    return tiny().bfloat16()

class Breaks(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.net = tiny()

    def forward(self, x):
        Breaks.calls += 1
        if Breaks.calls > 1:
            raise KeyError("surprise")
        return self.net(x)

def no_module():
    return 3

def leaves():
    raise SystemExit(3)

class leaves_later(nn.Module):
    def forward(self, x):
        raise SystemExit("SystemExit")
"""


def picture(path, seed=0, size=(12, 12)):
    noise = np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return str(path)


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def document(out):
    with open(os.path.join(out, "results.json")) as file:
        return json.load(file)


def failures(out):
    with open(os.path.join(out, "errors.jsonl")) as file:
        return [json.loads(line) for line in file]
