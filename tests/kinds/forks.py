"""Forked children of a process whose threads have worked, or work: each call ends, with the parent's values."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings

import numpy
import torch
from shared_networks import Unread
from torch import nn

import zfcore

LIMIT = 10  # seconds


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3), nn.SiLU(),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(144, 12),
    ).eval()  # fmt: skip


MODEL = network()
UNREAD = Unread(MODEL)
IMAGES = torch.rand(4, 3, 96, 96)
DOUBLE = IMAGES.double()
BOX = {"box": 24, "stride": 24}

# Their results are compared as numpy's arrays: torch's own functions would wait for threads themselves.
CALLS = {
    "deconv_project": lambda: zfcore.deconv_project(MODEL, IMAGES, "4", [1, 3]).pixels,
    "whole maps": lambda: zfcore.deconv_project(MODEL, IMAGES, "8", [1]).pixels,
    "first layer": lambda: zfcore.deconv_project(MODEL, IMAGES, "0").pixels,
    "other dtype": lambda: zfcore.deconv_project(MODEL, DOUBLE, "4", [1]).pixels,
    "iter_projections": lambda: next(zfcore.iter_projections(MODEL, IMAGES, "4", [1, 3])).pixels,
    "occlusion_map": lambda: zfcore.occlusion_map(MODEL, IMAGES, feature=("5", None), **BOX).scores,
    "forwards": lambda: zfcore.occlusion_map(UNREAD, IMAGES, feature=("net.5", None), **BOX).scores,
    "adaptive": lambda: zfcore.occlusion_map(MODEL, IMAGES, box=24, stride=8, mode="adaptive").scores,
    "heatmap": lambda: zfcore.occlusion_map(MODEL, IMAGES, **BOX).heatmap(),
    "progress": lambda: zfcore.deconv_project(MODEL, IMAGES, "4", [1], progress=True).pixels,
    "dense path": lambda: zfcore.deconv_project(UNREAD, IMAGES, "net.4", [1]).pixels,
}


def child(call, wanted: numpy.ndarray) -> str:
    """What is wrong with a call in a forked process."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        signal.alarm(LIMIT)  # ends a child that waits for what is not there
        code = 3
        try:
            threads = torch.get_num_threads()
            found = call().numpy()
            same = numpy.allclose(found, wanted, rtol=1e-5, atol=1e-5)
            left = torch.get_num_threads() == threads
            code = 0 if same and left else 1 if left else 2
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return "" if status == 0 else f"status {status} after {time.monotonic() - started:.1f} s"


def main(number: int, busy: bool) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    nn.functional.conv2d(torch.rand(8, 16, 128, 128), torch.rand(16, 16, 3, 3))  # starts torch's threads
    wanted = {name: call().numpy() for name, call in CALLS.items()}
    stop = threading.Event()

    def work(calls):
        while not stop.is_set():
            for call in calls:
                call()

    names = list(CALLS)
    threads = [
        threading.Thread(target=work, args=([CALLS[name] for name in part],)) for part in (names[:5], names[5:10])
    ]
    for thread in threads if busy else ():
        thread.start()
    failed = 0
    try:
        for name, call in CALLS.items():
            for again in range(number):
                if said := child(call, wanted[name]):
                    failed += 1
                    print(name, again, said, flush=True)
    finally:
        stop.set()
    for thread in threads if busy else ():
        thread.join()
    print("failed", failed, flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] == ["busy"])
