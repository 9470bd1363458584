"""The same bits every time, at any number of threads, whatever the memory held before."""

from __future__ import annotations

import oracle
import pytest
import torch
from samples import table

import zfcore.ops as ops

samples = table(48, seed=11)
# Work enough for several threads, with a channel count that is no multiple of a vector among them.
LARGE = [
    ((3, 37, 45, 41), ((3, 3), (2, 2), (1, 1), (1, 1))),
    ((2, 96, 30, 30), ((3, 3), (2, 2), (0, 0), (1, 1))),
    ((1, 16, 64, 64), ((2, 2), (2, 2), (0, 0), (1, 1))),
]


def all_ops(x, weight, window, conv, overlap):
    y, switches = ops.max_pool2d_with_switches(x, *window)
    size = x.shape[2:]
    return [
        y,
        switches,
        ops.unpool2d(y, switches, *window, output_size=size, overlap=overlap),
        ops.unpool_relu2d(y, switches, *window, output_size=size, overlap=overlap),
        ops.pool_gather2d(x, switches, *window, overlap=overlap),
        ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=window, conv=conv, overlap=overlap),
    ]


def large_cases(backend):
    device = backend.device
    # The reference runs on torch's own threads: one case shows that they change nothing here.
    for size, window in LARGE[:1] if backend.name == "reference" else LARGE:
        # A map of the size that unpooling gives by itself, so that all ops agree on it.
        height, width = oracle.unpooled_size(oracle.pooled_size(size[2:], (*window, False)), window)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(size, device=device).contiguous(memory_format=memory_format)
            weight = torch.randn(size[1], 24, 5, 5, device=device)
            yield x[:, :, :height, :width], weight, window, {"stride": 2, "padding": 1}


def same_bits(a, b):
    return all(oracle.same(first.cpu(), second.cpu()) for first, second in zip(a, b, strict=True))


@pytest.mark.parametrize("overlap", ["sum", "last"])
def test_threads_change_no_bit(backend, threads, overlap):
    for x, weight, window, conv in large_cases(backend):
        threads(1)
        one = all_ops(x, weight, window, conv, overlap)
        for count in (2, 3):
            threads(count)
            assert same_bits(all_ops(x, weight, window, conv, overlap), one), (count, x.shape)


def test_threads_change_no_bit_of_a_gradient(backend, threads):
    for x, _, window, _ in large_cases(backend):
        results = []
        for count in (1, 2, 4):
            threads(count)
            leaf = x.detach().clone().requires_grad_()
            y, switches = ops.max_pool2d_with_switches(leaf, *window)
            z = ops.unpool2d(y, switches, *window, output_size=x.shape[2:])
            results.append(torch.autograd.grad((z * z).sum(), leaf))
        assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_repeats_are_equal(backend):
    """250 runs of each op."""
    x, weight = (
        torch.randn(1, 19, 11, 11, device=backend.device),
        torch.randn(19, 5, 3, 3, device=backend.device),
    )
    window = (3, 3), (2, 2), (0, 0), (1, 1)
    first = all_ops(x, weight, window, {}, "sum")
    for _ in range(250):
        assert same_bits(all_ops(x, weight, window, {}, "sum"), first)


@pytest.fixture
def poison():
    """torch.empty hands out NaN, and the largest byte, and torch refuses what is not deterministic."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.uint8) == 255).all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def test_every_byte_of_a_result_is_written(backend, poison):
    """Results do not depend on what their memory held, and no op is refused as not deterministic."""
    for number, sample in enumerate(samples):
        if sample.values == "special":
            continue
        x, y, weight = (t.to(backend.device) for t in (sample.x(), sample.y(), sample.weight()))
        switches = sample.switches().to(backend.device)
        size = sample.size[2:]
        z_switches = sample.switches(sample.smallest).to(backend.device)
        pooled, found = ops.max_pool2d_with_switches(x, *sample.pool)
        assert (found < sample.kernel[0] * sample.kernel[1]).all(), sample
        results = [
            pooled,
            ops.unpool2d(y, switches, *sample.window, output_size=size, overlap=sample.overlap),
            ops.unpool_relu2d(y, switches, *sample.window, output_size=size, overlap=sample.overlap),
            ops.pool_gather2d(x, switches, *sample.window, overlap=sample.overlap),
        ]
        if backend.name != "cuda" or number % 8 == 0:  # each window is a kernel there, which is compiled first
            fused = {"pool": sample.pool, "conv": sample.conv, "overlap": sample.overlap}
            results.append(ops.unpool_relu_conv_transpose2d(y, z_switches, weight, **fused))
        for result in results:
            assert not result.isnan().any(), sample


def test_the_batch_does_not_matter(backend):
    """An image gives the same bits alone and in a batch."""
    x, weight = (
        torch.randn(5, 19, 11, 11, device=backend.device),
        torch.randn(19, 5, 3, 3, device=backend.device),
    )
    window = (3, 3), (2, 2), (0, 0), (1, 1)
    batch = all_ops(x, weight, window, {}, "sum")
    for number in range(5):
        alone = all_ops(x[number : number + 1], weight, window, {}, "sum")
        assert same_bits([r[number : number + 1] for r in batch[:-1]], alone[:-1])
        if backend.name != "reference":  # whose convolution is torch's
            assert same_bits([batch[-1][number : number + 1]], alone[-1:])
