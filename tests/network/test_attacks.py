"""Models that would be read wrongly by a reader that takes more for granted than it sees."""

from __future__ import annotations

import functools
import math
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zfcore
from zfcore.errors import UnsupportedOperation
from zfcore.network import read_network

SHAPE = (3, 8, 8)


class Net(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, self.conv(x))


def computed(network, images):
    return network.returned(network.forward(images, lambda stage, inputs: stage.run(*inputs)))


def same(model, counts=(1, 2, 7)):
    """What is read computes what the model does."""
    network = read_network(model.eval(), SHAPE)
    with torch.no_grad():
        for count in counts:
            images = torch.randn(count, *SHAPE)
            got, wanted = computed(network, images), model(images)
            torch.testing.assert_close(got, wanted)
    return network


def refused(model, match, **options):
    with pytest.raises(UnsupportedOperation, match=match):
        read_network(model.eval(), SHAPE, **options)


# ---- The number of images ----------------------------------------------------------------------------------


@functools.lru_cache
def _remembered(count):
    return 2.0 if count == 1 else 1.0


@torch.jit.script
def _scripted(x: torch.Tensor):
    if x.size(0) == 1:
        return x * 2
    return x


COUNTED = {
    "two": lambda m, x: x * 2 if x.shape[0] == 2 else x,
    "two by len": lambda m, x: x * 2 if len(x) == 2 else x,
    "more than eight": lambda m, x: x * 2 if x.shape[0] > 8 else x,
    "more than can be tried": lambda m, x: x * 2 if x.shape[0] > 1000 else x,
    "odd": lambda m, x: x * 2 if x.shape[0] % 2 else x,
    "three at most": lambda m, x: x * min(x.shape[0], 3),
    "eights": lambda m, x: x * (1 + x.shape[0] // 8),
    "half": lambda m, x: x * int(x.shape[0] * 0.5),
    "bits": lambda m, x: x * x.shape[0].bit_length(),
    "in common with four": lambda m, x: x * math.gcd(x.shape[0], 4),
    "in a table": lambda m, x: x * {1: 2.0}.get(x.shape[0], 1.0),
    "its shape in a table": lambda m, x: x * {(1, 4, 8, 8): 2.0}.get(x.shape, 1.0),
    "remembered": lambda m, x: x * _remembered(x.shape[0]),
    "to numpy": lambda m, x: x * float(np.prod(x.shape)),
    "of ones": lambda m, x: x / torch.ones_like(x[:, :1]).sum(),
    "of strides": lambda m, x: x * x.transpose(0, 1).contiguous().stride(0),
    "torch.cond": lambda m, x: torch.cond(x.shape[0] > 2, lambda v: v * 2, lambda v: v * 3, (x,)),
    "in a script": lambda m, x: _scripted(x),
    "beside a map": lambda m, x: {"map": x, "images": x.shape[0]},
    "beside a map, by len": lambda m, x: {"map": x, "images": len(x)},
    "a constant beside a map": lambda m, x: (x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_number_of_images_in_any_form_is_seen(name):
    refused(Net(COUNTED[name]), "depends on the number of images")


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.view(x.shape[0], -1),
        lambda m, x: x * 2 if isinstance(x.shape, torch.Size) else x,
        lambda m, x: x * 2 if x.shape[0] > 0 and x.shape == (x * 1).shape else x,
        lambda m, x: (x, torch.ones(2)),
    ],
)
def test_the_number_of_images_may_be_used(function):
    same(Net(function))


# ---- Expressions -------------------------------------------------------------------------------------------


def test_maps_with_the_images_second_are_read_in_time_that_their_number_gives():
    def branching(m, x):
        y = x.permute(1, 0, 2, 3)
        for _ in range(40):  # 2 ** 40 ways through
            y = (y + y.sigmoid()) / 2
        return y.permute(1, 0, 2, 3)

    start = time.perf_counter()
    same(Net(branching))
    assert time.perf_counter() - start < 20


def test_maps_with_the_images_second_may_be_thousands():
    def deep(m, x):
        y = x.permute(1, 0, 2, 3)
        for _ in range(1500):
            y = y.sigmoid()
        return y.permute(1, 0, 2, 3)

    same(Net(deep))


# ---- What a dispatch mode does not see, and what rules take for granted -----------------------------------------


def _jacobian(m, x):
    return x + torch.autograd.functional.jacobian(lambda v: (v**2).sum(), x)


UNSEEN = {
    "numbers of a list": (lambda m, x: x * torch.tensor([1.0, x.mean()])[1], "Tensor.tensor"),
    "a function of Python's": (lambda m, x: x.apply_(lambda v: v * 2), "apply_"),
    "gradients inside": (_jacobian, "asks for a gradient inside its forward"),
    "bits": (lambda m, x: x.view(torch.int32).float(), "view.dtype"),
    "statistics": (
        lambda m, x: x * F.batch_norm(m.head.weight, m.mean, m.var, training=True).mean(), "updates statistics"),
    "lists": (lambda m, x: torch._foreach_mul_([x * 1], 2.0), "_foreach_mul_"),
    "nothing of the images": (lambda m, x: m.head.weight * 2, "not computed from the images"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
def test_what_cannot_be_seen_is_refused_and_changes_nothing(name):
    function, match = UNSEEN[name]
    model = Net(function, mean=nn.Buffer(torch.zeros(4)), var=nn.Buffer(torch.ones(4)))
    before = [each.clone() for each in model.buffers()]
    refused(model, match)
    assert all(map(torch.equal, model.buffers(), before))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.abs() ** x,
        lambda m, x: 2**x,
        lambda m, x: (x * torch.ones(4, 1, 1, dtype=torch.float64) * 1.1).float(),
        lambda m, x: x * 2 if torch.is_grad_enabled() else x,
        lambda m, x: x * m.head.weight[0].expand_as(x) + torch.ones(4, 1, 1, dtype=torch.int64).type_as(x),
    ],
)
def test_dtypes_modes_and_shapes_of_others_are_followed(function):
    same(Net(function))


def test_a_failure_that_the_model_catches_is_not_a_way_to_go():
    def caught(m, x):
        try:
            return torch.ops.aten.mul.Tensor(x, torch.ones(2, 1, 1))
        except RuntimeError:
            return x

    model = Net(caught)
    with pytest.raises(Exception, match="does not fit|cannot be followed"):
        read_network(model.eval(), SHAPE)


def test_generators_of_the_model_are_where_they_were():
    def drawn(m, x):
        return x + torch.rand(4, 1, 1, generator=m.torch) + m.numpy.random() + m.python.random()

    own = {"torch": torch.Generator(), "numpy": np.random.default_rng(0), "python": random.Random(0)}
    model = Net(drawn, **own)
    before = own["torch"].get_state(), own["numpy"].bit_generator.state, own["python"].getstate()
    refused(model, "random numbers")
    assert torch.equal(own["torch"].get_state(), before[0])
    assert (own["numpy"].bit_generator.state, own["python"].getstate()) == before[1:]


# ---- Threads -----------------------------------------------------------------------------------------------


def _in_a_thread(m, x):
    made = []
    thread = threading.Thread(target=lambda: made.append(F.relu(x)))
    thread.start()
    thread.join()
    return made[0] + x


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_work_in_other_threads_is_seen():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        refused(Net(_in_a_thread), "in another thread|cannot be followed")
        refused(Net(lambda m, x: pool.submit(m.head, x).result() + m.head(x)), "calls Conv2d in another thread")


def test_a_lock_of_the_model_does_not_meet_one_of_the_reader():
    lock = threading.RLock()

    def locked(m, x):
        with lock:
            return F.relu(x)

    model = Net(locked).eval()

    def inside():
        for _ in range(30):
            with lock:
                read_network(model, SHAPE)

    threads = [threading.Thread(target=each, daemon=True) for each in (inside, lambda: [same(model) for _ in range(30)])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert nn.Module._call_impl.__module__ == "torch.nn.modules.module" and threading.Thread.start.__module__ == "threading"


# ---- Tensors and functions of the model's own kinds --------------------------------------------------------


class Doubled(torch.Tensor):
    """Twice what it wraps, without memory of its own."""

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype)

    def __init__(self, inside):
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inside)

        def plain(leaf):
            return leaf.inside * 2 if isinstance(leaf, cls) else leaf

        return function(*torch.utils._pytree.tree_map(plain, args), **torch.utils._pytree.tree_map(plain, kwargs or {}))


class Tripling(torch.Tensor):
    """Convolutions with it are three times as large."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        made = super().__torch_function__(function, types, args, kwargs or {})
        return made * 3 if function in (F.conv2d, torch.conv2d) else made


def test_weights_of_a_class_with_other_functions():
    model = Net(lambda m, x: F.relu(m.head(x)))
    model.head.weight = nn.Parameter(model.head.weight.detach().as_subclass(Tripling), requires_grad=False)
    same(model)
    zfcore.deconv_project(model.eval(), torch.randn(2, *SHAPE), layer="head", strict=True)


def test_weights_without_memory_are_left_to_torch():
    model, twice = (Net(lambda m, x: F.relu(m.head(x))).eval() for _ in range(2))
    twice.load_state_dict(model.state_dict())
    twice.head.weight.data *= 2
    model.head.weight = nn.Parameter(Doubled(model.head.weight.detach()), requires_grad=False)
    refused(model, r"'head' \(Conv2d\) reads a tensor that is a Doubled, which computes in a way of its own")
    images = torch.randn(2, *SHAPE)
    with pytest.warns(UserWarning, match="the dense path runs this network: 'head'"):
        found = zfcore.deconv_project(model, images, layer="head")
    torch.testing.assert_close(found.pixels, zfcore.deconv_project(twice, images, layer="head").pixels)


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.relu_()

    @staticmethod
    def backward(ctx, g):
        return g * 3


class Set(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.data * x.shape[1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx, g):
        return g * 7


@pytest.mark.parametrize("own, slope", [(Dirty, 3.0), (Set, 7.0)])
def test_custom_functions_leave_what_they_are_given(own, slope):
    model = Net(lambda m, x: own.apply(x * 1)).eval()
    network = read_network(model, SHAPE, gradient=True)
    images = torch.randn(2, *SHAPE, requires_grad=True)
    values = {}

    def compute(stage, inputs):
        values[stage] = stage.run(*inputs)
        before[stage] = values[stage].detach().clone()
        return values[stage]

    before = {}
    got = network.forward(images, compute)
    torch.testing.assert_close(got, model(images))
    assert all(torch.equal(values[stage], before[stage]) for stage in values)
    (ours,) = torch.autograd.grad(got.sum(), images)
    (wanted,) = torch.autograd.grad((model.conv(images) * slope).sum(), images)
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("function", [lambda m, x: x * 2 if x.grad_fn is not None else x, lambda m, x: x * x.is_leaf])
def test_what_autograd_would_say_of_a_map(function):
    same(Net(function))
    refused(Net(function), "asks whether a gradient is followed", gradient=True)


def test_memory_that_is_written_part_by_part():
    def filled(m, x):
        y = torch.empty(x.shape[0], 8, 8, 8).fill_(1)
        y = torch.empty_like(y)  # where there were ones, or anything
        y[:, :4] = x
        y[:, 4:] = x * 2
        return y

    same(Net(filled))


def test_an_exported_program_is_read_without_an_example():
    images = torch.randn(2, *SHAPE)
    program = torch.export.export(Net(lambda m, x: F.relu(m.head(x))).eval(), (images,)).module()
    network = read_network(program, SHAPE)
    torch.testing.assert_close(computed(network, images), program(images))
