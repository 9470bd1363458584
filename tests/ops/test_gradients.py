"""First and second derivatives against finite differences in float64, with and without overlap."""

from __future__ import annotations

import oracle
import pytest
import torch
from running import running_on
from samples import table
from torch.autograd import gradcheck, gradgradcheck

import zfcore.ops as ops

CONFIGS, PARTS = 200, 10

samples = table(CONFIGS, tiny=True, dtype=torch.float64, seed=3)


def pool_case(sample, x, y, switches, weight):
    return lambda x: ops.max_pool2d_with_switches(x, *sample.pool)[0], (x,)


def unpool_case(op):
    def case(sample, x, y, switches, weight):
        size = sample.size[2:]
        return lambda y: op(y, switches, *sample.window, output_size=size, overlap=sample.overlap), (y,)

    return case


def gather_case(sample, x, y, switches, weight):
    return lambda x: ops.pool_gather2d(x, switches, *sample.window, overlap=sample.overlap), (x,)


def step_case(sample, x, y, switches, weight):
    switches = sample.switches(sample.smallest)
    arguments = dict(pool=sample.pool, conv=sample.conv, overlap=sample.overlap)
    return lambda y, weight: ops.unpool_relu_conv_transpose2d(y, switches, weight, **arguments), (y, weight)


CASES = {
    "max_pool2d_with_switches": pool_case,
    "unpool2d": unpool_case(ops.unpool2d),
    "unpool_relu2d": unpool_case(ops.unpool_relu2d),
    "pool_gather2d": gather_case,
    "unpool_relu_conv_transpose2d": step_case,
}


def differentiable(x):
    """A leaf without repeated memory, which finite differences write to."""
    kept = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    return torch.empty_like(x, memory_format=kept).copy_(x).requires_grad_()


def check(op, sample):
    x, y, weight = (differentiable(t) for t in (sample.x(), sample.y(), sample.weight()))
    function, inputs = CASES[op](sample, x, y, sample.switches(), weight)
    assert gradcheck(function, inputs), sample
    # The whole first derivative, and the second along random directions.
    assert gradgradcheck(function, inputs, fast_mode=True), sample


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("op", CASES)
def test_gradients(op, part):
    for sample in samples[part::PARTS]:
        check(op, sample)


def test_the_samples_overlap_and_do_not():
    """Among the samples are windows that share a maximum, in both modes, and windows that cannot."""
    shared = {"sum": 0, "last": 0}
    for sample in samples:
        count = oracle.naming(sample.switches(), sample.size[2:], sample.window)
        shared[sample.overlap] += bool((count > 1).any())
    assert shared["sum"] >= 10 and shared["last"] >= 10
    assert sum(shared.values()) <= CONFIGS - 50


@pytest.mark.parametrize("op", CASES)
def test_gradients_of_the_reference(op):
    with running_on("reference"):
        for sample in samples[::20]:
            check(op, sample)


def test_gradients_of_the_strict_step():
    for sample in samples[:10]:
        y, weight = differentiable(sample.y()), differentiable(sample.weight())
        switches = sample.switches(sample.smallest)
        arguments = dict(pool=sample.pool, conv=sample.conv, overlap=sample.overlap)

        def strict(y, weight, switches=switches, arguments=arguments):
            return ops.unpool_relu_conv_transpose2d(y, switches, weight, strict_nan=True, **arguments)

        assert gradcheck(strict, (y, weight)), sample


def test_an_expanded_gradient_is_read_as_it_is(backend):
    """sum().backward() hands over a gradient of one number with stride 0."""
    x = torch.randn(2, 9, 7, 7, device=backend.device, requires_grad=True)
    weight = torch.randn(9, 3, 3, 3, device=backend.device, requires_grad=True)
    y, switches = ops.max_pool2d_with_switches(x, 3, 2)
    (grad,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(grad, ops.unpool2d(torch.ones_like(y), switches, 3, 2, output_size=(7, 7)))
    z = ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=(3, 2))
    expanded = torch.autograd.grad(z.sum(), (y, weight), retain_graph=True)
    dense = torch.autograd.grad(z, (y, weight), torch.ones_like(z))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_gradients_equal_torchs_where_torch_is_right(backend):
    """Max-pooling's own gradient, which adds over overlapping windows, in every dtype."""
    for sample in table(100, seed=4, values="normal"):
        x = differentiable(sample.x()).detach().to(backend.device).requires_grad_()
        y, _ = ops.max_pool2d_with_switches(x, *sample.pool)
        cotangent = torch.randint(-8, 9, y.shape, generator=sample.generator(5)).to(y)  # sums are exact
        (grad,) = torch.autograd.grad(y, x, cotangent)
        same = x.detach().double().requires_grad_()
        expected = torch.nn.functional.max_pool2d(same, *sample.pool)
        if sample.size[0]:
            (wanted,) = torch.autograd.grad(expected, same, cotangent.double())
            assert torch.equal(grad.double(), wanted), sample


def test_only_what_needs_a_gradient_gets_one(backend):
    y = torch.rand(1, 2, 3, 3, device=backend.device)
    switches = torch.zeros(1, 2, 3, 3, dtype=torch.uint8, device=backend.device)
    weight = torch.randn(2, 3, 3, 3, device=backend.device)
    for of_y, of_weight in ((True, False), (False, True)):
        y.requires_grad_(of_y)
        weight.requires_grad_(of_weight)
        z = ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=2)
        y.grad = weight.grad = None
        z.sum().backward()
        assert (y.grad is not None) == of_y and (weight.grad is not None) == of_weight


def test_nan_passes_the_relu_with_its_gradient(backend):
    y = torch.tensor([[[[float("nan"), -1.0], [2.0, -0.0]]]], device=backend.device, requires_grad=True)
    switches = torch.zeros(1, 1, 2, 2, dtype=torch.uint8, device=backend.device)
    ops.unpool_relu2d(y, switches, 2).sum().backward()
    by_torch = y.detach().clone().requires_grad_()
    torch.relu(by_torch).sum().backward()
    assert torch.equal(y.grad, by_torch.grad)
