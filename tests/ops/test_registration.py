"""The ops as torch knows them: schemas, fake kernels, torch.compile, fx, function modes."""

from __future__ import annotations

import oracle
import pytest
import torch
from samples import LAYOUTS, table
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import zfcore.ops as ops

registered = torch.ops.zfcore

samples = table(32, tiny=True, dtype=torch.float32, seed=6)
mixed = table(96, seed=7)


def arguments(op, sample, requires_grad):
    """The arguments of the registered op, which are more explicit than the public function's."""
    x, y, weight = sample.x(), sample.y(), sample.weight()
    switches = sample.switches()
    tensors = {
        "max_pool2d_with_switches": (x,),
        "unpool2d": (y, switches),
        "unpool_relu2d": (y, switches),
        "pool_gather2d": (x, switches),
        "unpool_relu_conv_transpose2d": (y, sample.switches(sample.smallest), weight),
    }[op]
    size = list(sample.size[2:])
    conv = sample.conv
    rest = {
        "max_pool2d_with_switches": (*sample.pool,),
        "unpool2d": (*sample.window, size, sample.overlap),
        "unpool_relu2d": (*sample.window, size, sample.overlap),
        "pool_gather2d": (*sample.window, sample.overlap),
        "unpool_relu_conv_transpose2d": (
            *sample.window,
            conv["stride"],
            conv["padding"],
            conv["dilation"],
            conv["groups"],
            list(sample.smallest),
            list(oracle.transposed_size(sample.smallest, sample.conv_kernel, conv)),
            sample.overlap,
        ),
    }[op]
    return *(t.requires_grad_(requires_grad and t.is_floating_point()) for t in tensors), *rest


OPS = (
    "max_pool2d_with_switches",
    "unpool2d",
    "unpool_relu2d",
    "pool_gather2d",
    "unpool_relu_conv_transpose2d",
)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    """The schema tells the truth, the fake kernel agrees, and autograd is registered where it belongs."""
    for number, sample in enumerate(samples):
        opcheck(getattr(registered, op).default, arguments(op, sample, requires_grad=number % 4 == 0))


@pytest.mark.parametrize("op", OPS)
def test_fake_kernels_agree_in_shape_and_layout(backend, op):
    """Sizes, strides and dtypes of the fake kernel are the kernel's, in every layout."""
    with torch._subclasses.FakeTensorMode() as mode:
        pass
    for sample in mixed:
        tensors = arguments(op, sample, requires_grad=False)
        real = getattr(registered, op)(*(t.to(backend.device) if torch.is_tensor(t) else t for t in tensors))
        with mode:
            fake = getattr(registered, op)(
                *(mode.from_tensor(t.to(backend.device)) if torch.is_tensor(t) else t for t in tensors)
            )
        for a, b in zip(*((r,) if torch.is_tensor(r) else r for r in (real, fake)), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, sample
            assert a.stride() == b.stride() or a.numel() == 0, sample


def network(x, weight, pool, conv, overlap):
    """All five ops, as a network would chain them."""
    y, switches = ops.max_pool2d_with_switches(x, *pool)
    size = x.shape[-2:]
    return (
        y,
        switches,
        ops.unpool2d(y, switches, *pool[:4], output_size=size, overlap=overlap),
        ops.unpool_relu2d(y, switches, *pool[:4], output_size=size, overlap=overlap),
        ops.pool_gather2d(x, switches, *pool[:4], overlap=overlap),
        step(y, switches, weight, pool, conv, size, overlap),
    )


def step(y, switches, weight, pool, conv, size, overlap):
    """The fused op whose unpooled map has this size."""
    full = [
        (size[a] - 1) * conv["stride"][a]
        - 2 * conv["padding"][a]
        + conv["dilation"][a] * (weight.shape[2 + a] - 1)
        + 1
        for a in (0, 1)
    ]
    return ops.unpool_relu_conv_transpose2d(
        y, switches, weight, pool=pool, conv=conv, output_size=full, overlap=overlap
    )


def compiled_samples(count, seed):
    for sample in table(4 * count, seed=seed):
        conv = dict(sample.conv, output_padding=(0, 0))
        if min(oracle.transposed_size(sample.size[2:], sample.conv_kernel, conv)) >= 1:
            yield sample, conv
            count -= 1
        if count == 0:
            return


def assert_same(actual, expected, case):
    for a, b in zip(actual, expected, strict=True):
        assert oracle.same(a, b) and a.stride() == b.stride(), case


def test_compiled_equals_eager():
    """Bit for bit, NaN and -inf included, without a graph break: 30 inputs of each of the five ops."""
    for sample, conv in compiled_samples(30, seed=8):
        torch._dynamo.reset()
        case = sample.x(), sample.weight(), sample.pool, conv, sample.overlap
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False)
        assert_same(compiled(*case), network(*case), sample)


def test_inductor_equals_eager():
    for sample, conv in compiled_samples(2, seed=9):
        torch._dynamo.reset()
        case = sample.x(), sample.weight(), sample.pool, conv, sample.overlap
        compiled = torch.compile(network, fullgraph=True, dynamic=False)
        assert_same(compiled(*case), network(*case), sample)


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_few_recompiles_over_shapes(ceil_mode):
    """Ten shapes, and at most two recompiles."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    pool, conv = (3, 2, 1, 1, ceil_mode), dict(stride=(2, 2), padding=(1, 1), dilation=(1, 1))
    pool = tuple(p if isinstance(p, bool) else (p, p) for p in pool)
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=True)
    weight = torch.randn(4, 3, 3, 3)
    for number in range(10):
        x = torch.randn(2 + number % 3, 4, 9 + number, 8 + 2 * number)
        assert_same(compiled(x, weight, pool, conv, "sum"), network(x, weight, pool, conv, "sum"), number)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_gradients(compiler):
    """Forward and backward in one graph."""
    torch._dynamo.reset()
    pool, conv = ((3, 3), (2, 2), (0, 0), (1, 1), False), dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    x, weight = torch.randn(2, 4, 9, 9, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)

    def loss(x, weight):
        y, _, *results = network(x, weight, pool, conv, "sum")
        return sum((r * r).sum() for r in (y, *results))

    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    for actual, wanted in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_compiled_autocast():
    torch._dynamo.reset()
    pool, conv = ((2, 2), (2, 2), (0, 0), (1, 1), False), dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    case = torch.randn(2, 4, 8, 8), torch.randn(4, 3, 3, 3), pool, conv, "sum"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = network(*case)
        actual = torch.compile(network, backend="aot_eager", fullgraph=True)(*case)
    assert [r.dtype for r in expected] == [torch.float32, torch.uint8, *[torch.float32] * 3, torch.bfloat16]
    assert_same(actual, expected, "autocast")


def test_fx_traces_the_public_functions():
    def model(x, weight):
        y, switches = ops.max_pool2d_with_switches(x, 3, 2)
        u = ops.unpool_relu2d(y, switches, 3, 2, output_size=x.shape[-2:])
        g = ops.pool_gather2d(u, switches, 3, 2)
        pool = torch.nn.MaxPool2d(3, 2)
        return u, ops.unpool_relu_conv_transpose2d(g, switches, weight, pool=pool, output_size=(11, 11))

    traced = torch.fx.symbolic_trace(model)
    assert {node.target for node in traced.graph.nodes if node.op == "call_function"} >= {
        ops.max_pool2d_with_switches,
        ops.unpool_relu2d,
        ops.pool_gather2d,
        ops.unpool_relu_conv_transpose2d,
    }
    case = torch.randn(2, 3, 9, 9), torch.randn(3, 2, 3, 3)
    assert_same(traced(*case), model(*case), "fx")


def test_function_modes_see_the_public_functions():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x, weight = torch.randn(1, 2, 6, 6), torch.randn(2, 3, 3, 3)
    with Mode():
        y, switches = ops.max_pool2d_with_switches(x, 2)
        ops.unpool2d(y, switches, 2)
        ops.unpool_relu2d(y, switches, 2)
        ops.pool_gather2d(x, switches, 2)
        ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=2)
    assert seen == [getattr(ops, op) for op in OPS]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_calls_equal_dispatched_ones(backend, layout):
    """Plain eager calls skip the dispatcher, others take it: the results are one."""
    sample = table(8, seed=10, layout=layout, values="ties", dtype=torch.float32)[1]
    x = sample.x().to(backend.device)
    plain = ops.max_pool2d_with_switches(x, *sample.pool)
    dispatched = registered.max_pool2d_with_switches(x, *sample.pool)
    assert_same([t.cpu() for t in plain], [t.cpu() for t in dispatched], sample)


def test_tensors_that_only_the_dispatcher_understands():
    """A lazily negated tensor, and one of zeros without memory."""
    x = torch.randn(1, 1, 4, 4, dtype=torch.complex64)
    negated = x.conj().imag
    assert negated.is_neg()
    y, switches = ops.max_pool2d_with_switches(negated, 2)
    assert_same((y, switches), ops.max_pool2d_with_switches(negated.resolve_neg(), 2), "negated")
    nothing = torch._efficientzerotensor((1, 1, 4, 4))
    y, switches = ops.max_pool2d_with_switches(nothing, 2)
    assert not y.any() and not switches.any()
