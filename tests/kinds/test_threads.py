"""Threads that share a model, and calls that an exception ends: as if each were alone."""

import os
import signal
import threading

import pytest
import torch
from shared_networks import IMAGES, Unread, network
from torch import nn

import zfcore
from zfcore import forks
from zfcore.network import guard

pytestmark = pytest.mark.filterwarnings("ignore:zfcore. (the dense path|plain forwards)")


def calls(model):
    unread = Unread(model)
    box = {"box": 4, "stride": 4}
    return [
        lambda: zfcore.deconv_project(model, IMAGES, "7").pixels,
        lambda: zfcore.deconv_project(model, IMAGES, "0", rule="guided").pixels,
        lambda: zfcore.deconv_project(unread, IMAGES, "net.4", [0, 2]).pixels,
        lambda: torch.cat([p.pixels for p in zfcore.iter_projections(model, IMAGES, "5", [1], batch_size=1)]),
        lambda: zfcore.occlusion_map(model, IMAGES, feature=("5", None), **box).activation,
        lambda: zfcore.occlusion_map(unread, IMAGES, feature=("net.5", None), **box).scores,
        lambda: zfcore.occlusion_map(model, IMAGES, box=4, stride=1, mode="adaptive").scores,
        lambda: zfcore.occlusion_map(unread, IMAGES, box=12, stride=1, score="logit").heatmap(),
    ]


def left(model):
    """What a call may not leave behind."""
    return (
        [m.training for m in model.modules()], [len(m._forward_hooks) for m in model.modules()],
        [t.detach().clone() for t in (*model.parameters(), *model.buffers())],
        (dict(guard._holds), dict(guard._keeps), dict(forks._open), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        (nn.Module._call_impl, torch.autograd.Function.apply, threading.Thread.start),
    )  # fmt: skip


def same(before, after):
    for a, b in zip(before, after, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, (x, y)


def test_eight_threads_with_calls_of_all_kinds_on_one_model():
    model = network(inplace=True).train()
    before, wanted = left(model), [call() for call in calls(model)]
    failures = []
    begin = threading.Barrier(8)

    def work(first):
        own = calls(model)
        begin.wait()
        for at in [*range(first, 8), *range(first)]:
            try:
                torch.testing.assert_close(own[at](), wanted[at], rtol=1e-6, atol=1e-6)
            except BaseException as error:
                failures.append((at, error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    same(before, left(model))


class Stop(KeyboardInterrupt):
    pass


# Where contexts begin and end. An exception in there can leave any of Python's half way: the handler comes once more.
ENDS = {"__enter__", "__exit__", "__del__", "close", "restore", "left", "entered", "turn_for", "_let_go", "_release"}


armed = False  # a signal that is late is no concern of what runs then


def stop(signum, frame):
    global armed
    if not armed:
        return
    while frame is not None:
        if frame.f_code.co_name in ENDS:
            signal.setitimer(signal.ITIMER_REAL, 5e-5)
            return
        frame = frame.f_back
    armed = False
    raise Stop


# By chance: about one exception in two thousand comes where something is left behind, as docs/reliability.md says.
@pytest.mark.skipif(os.environ.get("ZFCORE_ATTACK") != "1", reason="depends on chance: ZFCORE_ATTACK=1 runs it")
@pytest.mark.parametrize("which", range(8))
def test_an_interrupt_at_any_time_leaves_the_model_as_it_was(which):
    """An exception of a signal's handler, as of Ctrl-C, at 20 times of a call's work."""
    global armed
    model = network(inplace=True).train()
    call = calls(model)[which]
    before, wanted = left(model), call()

    earlier = signal.signal(signal.SIGALRM, stop)
    try:
        for step in range(1, 21):
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, step * 2e-4)
                call()
                armed = False
            except (Stop, RuntimeError):  # the latter where it came while torch left a mode
                pass
            finally:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, earlier)
    same(before, left(model))
    assert torch.equal(call(), wanted)  # no lock is held either
