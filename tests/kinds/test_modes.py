"""Modes of torch's that surround a call: the same bits as without, on every path."""

import contextlib
import copy

import pytest
import torch
from shared_networks import IMAGES, Unread, network
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import zfcore

pytestmark = pytest.mark.filterwarnings("ignore:zfcore. (the dense path|plain forwards)", "ignore:Anomaly Detection")


def pieces(model, layer):
    return torch.cat([p.pixels for p in zfcore.iter_projections(model, IMAGES, layer, batch_size=3)])


def occlude(model, **options):
    return zfcore.occlusion_map(model, IMAGES, box=4, **{"stride": 4} | options)


# Of the network that is read, and of the one that is not.
READ = {
    "project": lambda m: zfcore.deconv_project(m, IMAGES, "7", strict=True).pixels,
    "first layer": lambda m: zfcore.deconv_project(m, IMAGES, "0", strict=True).pixels,
    "guided, last": lambda m: zfcore.deconv_project(m, IMAGES, "7", rule="guided", overlap="last").pixels,
    "iterate": lambda m: pieces(m, "7"),
    "occlude": lambda m: occlude(m).scores,
    "chosen unit": lambda m: occlude(m, feature=("5", None), strict=True).activation,
    "unit": lambda m: occlude(m, feature=("5", 2)).activation,
    "adaptive": lambda m: occlude(m, stride=1, mode="adaptive", feature=("5", None)).scores,
    "heat map": lambda m: occlude(m).heatmap(),
}
NOT_READ = {
    "dense path": lambda m: zfcore.deconv_project(m, IMAGES, "net.4").pixels,
    "iterate, dense path": lambda m: pieces(m, "net.4"),
    "forwards": lambda m: occlude(m, feature=("net.5", None)).scores,
    "adaptive forwards": lambda m: occlude(m, stride=1, mode="adaptive", feature=("net.5", [1, 2])).activation,
}


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def switched(switch, value, before):
    switch(value)
    try:
        yield
    finally:
        switch(before)


MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "device": lambda: torch.device("meta"),
    "default device": lambda: switched(torch.set_default_device, "meta", None),
    "float64": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "float16": lambda: switched(torch.set_default_dtype, torch.float16, torch.float32),
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "dispatch mode": Dispatch,
    "function mode": Functions,
    "profiler": torch.profiler.profile,
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    "no hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none here"),
    "denormal": lambda: switched(torch.set_flush_denormal, True, False),
    "one thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "dual level": torch.autograd.forward_ad.dual_level,
}


def state():
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.get_default_device(),
        torch.get_num_threads(), torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def results(model):
    found = {name: call(model) for name, call in READ.items()}
    return found | {name: call(Unread(model)) for name, call in NOT_READ.items()}


@pytest.fixture(scope="module")
def wanted():
    return results(network().eval())


def check(found, wanted):
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype and torch.equal(value, wanted[name]), name
        # These two are made of results in the mode.
        assert not value.is_inference() or name.startswith("iterate") or name == "heat map"


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_around_a_call_changes_nothing(mode, wanted):
    model = network().eval()
    with MODES[mode]():
        before = state()
        found = results(model)
        assert state() == before
    check(found, wanted)


def test_a_counter_of_operations_asks_for_gradients(wanted):
    """Its hooks do, so that the dense path runs."""
    model = network().eval()
    with FlopCounterMode(display=False):
        found = {"project": zfcore.deconv_project(model, IMAGES, "7").pixels, "occlude": occlude(model).scores}
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("around", (contextlib.nullcontext, torch.inference_mode))
@pytest.mark.parametrize("made", ("in inference mode", "compiled"))
def test_models_of_other_modes(made, around, wanted):
    if made == "compiled":
        model = torch.compile(network().eval(), backend="eager")
        found = {name: call(model) for name, call in READ.items()}
    else:
        with torch.inference_mode():
            model = copy.deepcopy(network().eval())
        with around():
            found = results(model)
    check(found, wanted)


def test_a_generator_may_be_drawn_from_in_another_mode():
    whole = zfcore.deconv_project(network().eval(), IMAGES, "7").pixels.flatten(0, 1)
    parts = zfcore.iter_projections(network().eval(), IMAGES, "7", batch_size=3)
    first = next(parts).pixels
    with torch.inference_mode(), torch.device("meta"):
        second = next(parts).pixels
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.cat([first, second]), whole[:6])
