"""Every op against a float64 oracle, over dtypes, layouts, windows and values. Switches are compared exactly.

Each test takes one dtype and layout through all backends of this machine: the oracle costs more than they.
"""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from running import on_gpu_too, present, running_on
from samples import DTYPES, LAYOUTS, table

import zfcore.ops as ops

# 4 dtypes x 8 layouts x 48: 1,536 samples an op and backend.
SAMPLES = 48

pytestmark = on_gpu_too

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def on_each_backend(op, *tensors, **kwargs):
    """The op's results on every backend, brought to the CPU."""
    for name in present():
        if name == "cuda" and op is ops.unpool_relu_conv_transpose2d:
            continue  # each window is a kernel there, which is compiled first: tests/triton has those of networks
        with running_on(name) as backend:
            out = op(*(x.to(backend.device) for x in tensors), **kwargs)
            yield name, out.cpu() if isinstance(out, torch.Tensor) else tuple(x.cpu() for x in out)


@by_layout
@by_dtype
def test_max_pool2d_with_switches(dtype, layout):
    for sample in table(SAMPLES, dtype=dtype, layout=layout):
        x = sample.x()
        expected_y, expected_switches, _ = oracle.pool(x, *sample.pool)
        arguments = dict(zip(ops.PoolParams._fields, sample.pool, strict=True))
        for name, (y, switches) in on_each_backend(ops.max_pool2d_with_switches, x, **arguments):
            assert oracle.same(switches, expected_switches), (name, sample)
            assert oracle.same(y, expected_y), (name, sample)


def window_arguments(sample):
    return dict(zip(ops.PoolParams._fields[:4], sample.window, strict=True), overlap=sample.overlap)


@by_layout
@by_dtype
@pytest.mark.parametrize("op", ["unpool2d", "unpool_relu2d"])
def test_unpool(op, dtype, layout):
    for sample in table(SAMPLES, dtype=dtype, layout=layout):
        y, switches, size = sample.y(), sample.switches(), sample.size[2:]
        exact = oracle.unpool(y, switches, size, sample.window, sample.overlap)
        if op == "unpool_relu2d":
            exact = oracle.relu(exact)
        # A zero that one window brought, or none, has its sign; a sum of several zeros may have either.
        alone = (exact == 0) & (oracle.naming(switches, size, sample.window) <= 1)
        arguments = window_arguments(sample)
        for name, out in on_each_backend(getattr(ops, op), y, switches, output_size=size, **arguments):
            assert_summed(out, exact, y, (name, sample))
            assert torch.equal(torch.signbit(out[alone]), torch.signbit(exact[alone])), (name, sample)


def assert_summed(actual, exact, y, case):
    """A sum of a few numbers of actual's dtype, each step rounded, or in a half type only the last one."""
    half = actual.dtype in (torch.float16, torch.bfloat16)
    step = torch.finfo(actual.dtype).eps
    largest = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0
    # A float32 sum of half numbers, rounded to the nearest: half a step, and what float32 lost before.
    limit = 0.5 * step * exact.abs() + 4e-6 * largest if half else 4 * step * largest
    assert torch.equal(actual.isnan(), exact.isnan()), case
    infinite = exact.isinf()
    assert torch.equal(actual[infinite].double(), exact[infinite]), case
    finite = exact.isfinite()
    error = (actual.double() - exact).abs()
    assert (error <= limit)[finite].all(), case


@by_layout
@by_dtype
def test_pool_gather2d(dtype, layout):
    for sample in table(SAMPLES, dtype=dtype, layout=layout):
        x, switches = sample.x(), sample.switches()
        expected = oracle.gather(x, switches, sample.window, sample.overlap)
        for name, out in on_each_backend(ops.pool_gather2d, x, switches, **window_arguments(sample)):
            assert oracle.same(out, expected), (name, sample)


def finite(y):
    """What becomes of NaN and inf in the fused op is an edge case of its own."""
    return torch.where(y.isfinite(), y, 3.0)


def assert_as_good_as_torch(results, y, switches, weight, unpooled, conv, sample):
    """At most twice as far from float64 as torch's unfused path, but for one last bit."""
    u = oracle.relu(oracle.unpool(y, switches, unpooled, sample.window, sample.overlap))
    exact = F.conv_transpose2d(u, weight.double(), None, **conv)
    limit = 0.0
    if exact.numel() and sample.dtype is torch.float64:
        # Both are float64 sums, in orders of their own.
        terms = F.conv_transpose2d(u.abs(), weight.abs(), None, **conv)
        limit = 4 * torch.finfo(torch.float64).eps * terms.max()
    elif exact.numel():
        # Half types as torch does them at best, in float32 and rounded once: its own kernels take minutes.
        in_torch = F.conv_transpose2d(u.float(), weight.float(), None, **conv).to(sample.dtype)
        last_bit = torch.finfo(sample.dtype).eps * exact.abs().max()
        limit = 2 * (in_torch.double() - exact).abs().max() + last_bit
    for name, z in results:
        assert z.dtype == sample.dtype and z.shape == exact.shape, (name, sample)
        assert ((z.double() - exact).abs() <= limit).all(), (name, sample)


@by_layout
@by_dtype
def test_unpool_relu_conv_transpose2d(dtype, layout):
    for sample in table(SAMPLES, dtype=dtype, layout=layout):
        y, switches, weight = finite(sample.y()), sample.switches(sample.smallest), sample.weight()
        results = on_each_backend(
            ops.unpool_relu_conv_transpose2d,
            y,
            switches,
            weight,
            pool=sample.pool,
            conv=sample.conv,
            overlap=sample.overlap,
        )
        assert_as_good_as_torch(results, y, switches, weight, sample.smallest, sample.conv, sample)


@by_dtype
def test_fused_step_of_a_given_size(dtype):
    """output_size is the result's; the unpooled map's size follows from it."""
    for sample in table(40, seed=1, dtype=dtype):
        y, switches, weight = finite(sample.y()), sample.switches(), sample.weight()
        unpooled = sample.size[2:]
        bare = dict(sample.conv, output_padding=(0, 0))
        least = oracle.transposed_size(unpooled, sample.conv_kernel, bare)
        for extra in range(min(sample.conv_stride)):
            size = tuple(length + extra for length in least)
            if min(size) < 1:
                continue
            results = on_each_backend(
                ops.unpool_relu_conv_transpose2d,
                y,
                switches,
                weight,
                pool=sample.pool,
                conv=bare,
                output_size=size,
                overlap=sample.overlap,
            )
            conv = dict(bare, output_padding=(extra, extra))
            assert_as_good_as_torch(results, y, switches, weight, unpooled, conv, sample)


def test_round_trip_is_what_torch_gives(backend):
    """Where windows do not overlap, pooling and unpooling are max_pool2d and max_unpool2d."""
    checked = 0
    for sample in table(400, seed=2, values="normal", dtype=torch.float32, dilation=(1, 1)):
        if sample.size[0] == 0 or any(s < k for s, k in zip(sample.stride, sample.kernel, strict=True)):
            continue
        x = sample.x().contiguous()
        expected_y, index = F.max_pool2d(x, *sample.pool, return_indices=True)
        expected = F.max_unpool2d(expected_y, index, *sample.window[:3], sample.size[2:])
        y, switches = ops.max_pool2d_with_switches(x.to(backend.device), *sample.pool)
        out = ops.unpool2d(y, switches, *sample.window, output_size=x.shape[2:])
        assert torch.equal(y.cpu(), expected_y)
        assert torch.equal(out.cpu(), expected)
        checked += 1
    assert checked >= 40
