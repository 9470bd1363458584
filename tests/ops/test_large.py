"""Offsets past 2**31 elements: read far apart in memory that is never touched, and written when asked for."""

from __future__ import annotations

import os

import pytest
import torch

import zfcore.ops as ops

FAR = 2**31 + 8  # elements


def far_apart(x, axis):
    """The values of x, with FAR elements from its first to its last entry along one axis."""
    strides = list(x.stride())
    strides[axis] = -(-FAR // (x.size(axis) - 1))
    memory = torch.empty(FAR + 2 * x.numel() * x.size(axis), dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("axis", range(4), ids=["images", "channels", "rows", "columns"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_values_far_apart(backend, axis, channels_last):
    """Only a few pages of the four gigabytes that a tensor spans are ever used."""
    x = torch.randn(2, 9, 6, 6, dtype=torch.bfloat16, device=backend.device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(9, 3, 3, 3, dtype=torch.bfloat16, device=backend.device)
    y, switches = ops.max_pool2d_with_switches(x, 2)
    far_x, far_y, far_switches = (far_apart(t, axis) for t in (x, y, switches))
    assert far_x.stride(axis) * (x.size(axis) - 1) > 2**31
    for found, wanted in zip(ops.max_pool2d_with_switches(far_x, 2), (y, switches), strict=True):
        assert torch.equal(found, wanted)
    for op in (ops.unpool2d, ops.unpool_relu2d):
        assert torch.equal(op(far_y, far_switches, 2), op(y, switches, 2))
    assert torch.equal(ops.pool_gather2d(far_x, far_switches, 2), y)
    far_z = ops.unpool_relu_conv_transpose2d(far_y, far_switches, far_apart(weight, axis), pool=2)
    z = ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=2)
    torch.testing.assert_close(far_z, z)  # the reference's convolution may follow the layout


# 2**31 elements, and 2**18 more.
WIDTHS = (32768, 32772)
FORMATS = (torch.contiguous_format, torch.channels_last)


def marked(width, memory_format, backend):
    """Zeros but for some places, the first and the last among them, no two in one 2x2 window."""
    x = torch.zeros((1, 4, 16384, width), dtype=torch.bfloat16, device=backend.device)
    x = x.contiguous(memory_format=memory_format)
    places = {(0, 0, 0), (3, 16383, width - 1), (3, 16383, 0), (0, 16383, width - 1), (2, 0, width - 1)}
    generator = torch.Generator().manual_seed(0)
    for c, row, column in torch.randint(0, 2**30, (200, 3), generator=generator).tolist():
        places.add((c % 4, row % 16384 // 2 * 2 + c % 2, column % width // 2 * 2 + row % 2))
    places = sorted({(c, row // 2, column // 2): (c, row, column) for c, row, column in places}.values())
    c, row, column = torch.tensor(places, device=backend.device).T
    values = torch.arange(1.0, len(places) + 1, device=backend.device).bfloat16()
    x[0, c, row, column] = values
    return x, (c, row, column), x[0, c, row, column]


@pytest.fixture
def all_threads(threads):
    threads(os.cpu_count())


@pytest.mark.skipif(
    os.environ.get("ZFCORE_LARGE") != "1",
    reason="writes 12 GB, for minutes: set ZFCORE_LARGE=1 to run it",
)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_both_sides_of_two_to_the_31(backend, all_threads, width, memory_format):
    if backend.name == "reference":
        pytest.skip("the reference makes int64 maps of eight bytes a place")
    x, (c, row, column), values = marked(width, memory_format, backend)
    y, switches = ops.max_pool2d_with_switches(x, 2)
    assert torch.equal(y[0, c, row // 2, column // 2], values)
    assert torch.equal(switches[0, c, row // 2, column // 2].long(), row % 2 * 2 + column % 2)
    assert y.count_nonzero() == len(values)
    assert torch.equal(ops.pool_gather2d(x, switches, 2), y)
    del x
    for op in (ops.unpool2d, ops.unpool_relu2d):
        out = op(y, switches, 2)
        assert torch.equal(out[0, c, row, column], values)
        assert out.count_nonzero() == len(values)
        del out
    weight = torch.eye(4, dtype=torch.bfloat16, device=backend.device).view(4, 4, 1, 1)
    z = ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=2)
    assert torch.equal(z[0, c, row, column], values)
    assert z.count_nonzero() == len(values)
