"""Times every configuration of the Triton kernels that are shaped like products, at the layers of ZFNet and VGG16.

    python bench/tune.py [--seconds 80] [--json PATH]

For each layer and precision: which configuration of the kernel's own table is the fastest on this GPU, and which one its rule
takes. A kernel joins with an entry in KERNELS: a module of `zfcore.kernels` whose launcher asks its `config_of` for one of its
`configs`, and calls of ops that launch it.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import calls
import device
import networks
import torch
from timing import timed
from zfcore.models import ZFNet
from zfcore.occlusion import PRECISIONS

ROUNDS = 5
MAX_ERROR = 1e-4  # between configurations, which sum in other orders; relative to the largest magnitude


class Network(NamedTuple):
    """Of which network, and at which boxes; part: rows and columns of the grid that make a batch. layer: to project."""

    model: Callable[[], torch.nn.Module]
    box: int
    stride: int
    part: tuple[int, int]
    layer: str


NETWORKS = {
    "zfnet": Network(ZFNet, 32, 4, (32, 32), "conv5"),
    "vgg16": Network(networks.vgg16_classifier, 32, 16, (10, 12), networks.CONV5_3),
}


def occlusion_calls(network: Network, precision: str) -> list[calls.Call]:
    torch.manual_seed(0)
    model = network.model().eval().to(device.device())
    image = torch.randn(1, 3, 224, 224).to(device.device())
    options = {"box": network.box, "stride": network.stride, "precision": precision}
    found = calls.ready(model, image, batch_size=network.part[0] * network.part[1], **options)
    return calls.of_batch(found, calls.middle(found, *network.part))


def projection_calls(network: Network, precision: str) -> list[calls.Call]:
    """Projections are exact."""
    if precision != "exact":
        return []
    torch.manual_seed(0)
    model = network.model().eval().to(device.device())
    return calls.of_projections(model, torch.randn(2, 3, 224, 224).to(device.device()), network.layer, 256)


KERNELS = {"conv_delta": occlusion_calls, "deconv_step": projection_calls}


def table_for(module: ModuleType, asked: dict) -> tuple:
    """The configurations that the rule chose from when it was asked with these arguments."""
    return module.configs(**{name: asked[name] for name in inspect.signature(module.configs).parameters if name in asked})


def tuned(module: ModuleType, call: calls.Call) -> dict | None:
    """Milliseconds of every configuration for the call, or None where it does not launch the module's kernel."""
    asked: list[dict] = []
    rule = module.config_of

    def noted(*key, **named):
        bound = inspect.signature(rule).bind(*key, **named)
        bound.apply_defaults()
        asked.append(dict(bound.arguments))
        return rule(*key, **named)

    def run():
        return call.op(*call.arguments)

    with mock.patch.object(module, "config_of", noted):
        wanted = run().clone()
    if not asked:
        return None
    times = {}
    for config in table_for(module, asked[0]):
        with mock.patch.object(module, "config_of", lambda *_, config=config, **__: config):
            error = (run() - wanted).abs().max()
            if not error <= MAX_ERROR * wanted.abs().max():
                raise AssertionError(f"{config} at {call.name}: its answer is off by {error:.1e}")
            times[tuple(config)] = 1e3 * statistics.median(timed(run) for _ in range(ROUNDS))
    best, chosen = min(times, key=times.get), tuple(rule(**asked[0]))
    return {
        "layer": call.name, "asked": asked[0], "rule": list(chosen), "best": list(best),
        "rule_over_best": times[chosen] / times[best],
        "milliseconds": [[list(config), value] for config, value in times.items()],
    }  # fmt: skip


def measured(end: float) -> Iterator[dict]:
    """Until the time `end` of the monotonic clock."""
    for name, network in NETWORKS.items():
        for precision in PRECISIONS:
            for kernel, calls_of in KERNELS.items():
                if time.monotonic() > end:
                    return
                module = importlib.import_module(f"zfcore.kernels.{kernel}")
                for call in calls_of(network, precision):
                    if time.monotonic() > end:
                        return
                    result = tuned(module, call)
                    if result is not None:
                        yield {"kernel": kernel, "network": name, **result}


def line(result: dict) -> str:
    return (
        f"{result['kernel']} {result['network']} {result['layer']}: {result['asked']}: rule {result['rule']}, "
        f"best {result['best']}, {result['rule_over_best']:.2f} times as long"
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=80, help="begin no layer after so many (80)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="store what was measured")
    options = parser.parse_args(arguments)
    try:
        device.choose("cuda")
    except RuntimeError as error:
        sys.exit(f"tune: {error}")
    results = []
    for result in measured(time.monotonic() + options.seconds):
        results.append(result)
        print(line(result), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    if not results:
        sys.exit("tune: nothing was measured")


if __name__ == "__main__":
    main(sys.argv[1:])
