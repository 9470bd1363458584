"""Checks of pooling's Triton kernel in Triton's interpreter: python interpreted_pool.py NAME, TRITON_INTERPRET=1."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

import oracle  # noqa: E402
import samples  # noqa: E402
from zfcore import ops, reference, use_backend  # noqa: E402
from zfcore.kernels import max_pool2d_with_switches as kernel  # noqa: E402

FAR = 2**31 + 8  # elements
calls = []
launch = kernel.max_pool2d_with_switches
kernel.max_pool2d_with_switches = lambda *a: calls.append(1) or launch(*a)


def check(x: torch.Tensor, pool: tuple, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The op's result in every detail: values, switches, and how they are laid out."""
    with use_backend("triton"):
        ours = ops.max_pool2d_with_switches(x, *pool)
    with use_backend("cpu"):
        laid_out = ops.max_pool2d_with_switches(x, *pool)
    for got, want, like in zip(ours, expected, laid_out, strict=True):
        assert oracle.same(got, want), (x.dtype, x.shape, x.stride(), pool)
        assert got.stride() == like.stride(), (x.shape, x.stride(), pool)


def drawn_pools():
    """The samples of the op's own tests: every dtype in every layout, and windows of every kind."""
    for dtype in samples.DTYPES:
        for layout in samples.LAYOUTS:
            for sample in samples.table(4, dtype=dtype, layout=layout):
                check(sample.x(), sample.pool, oracle.pool(sample.x(), *sample.pool)[:2])


def networks_pools():
    """Channels last in multiples of 16, special values, and windows of more taps than are unrolled."""
    for dtype in samples.DTYPES:
        x = samples.draw((1, 32, 11, 12), dtype, "special", torch.Generator().manual_seed(0))
        for pool in ((3, 2, 1, 1, True), ((5, 4), 2, (2, 1), (1, 2), False)):
            expected = reference.max_pool2d_with_switches(x, *pool)
            for layout in ("channels_last", "contiguous", "sliced"):
                check(samples.lay_out(x, layout), pool, expected)
            apart = x.new_zeros(1, 11, 12, 34).permute(0, 3, 1, 2)[:, 1:-1].copy_(x)  # what starts at no multiple of 16
            check(apart, pool, expected)


def edges():
    x = samples.draw((3, 32, 9, 9), torch.float32, "ties", torch.Generator().manual_seed(1))
    expected = reference.max_pool2d_with_switches(x, 3, 2, 1)
    full = torch.full_like(x, -torch.inf)
    check(full, (3, 2, 1), reference.max_pool2d_with_switches(full, 3, 2, 1))
    check(x[:0], (3, 2, 1), tuple(r[:0] for r in expected))
    check(x[1], (3, 2, 1), tuple(r[1] for r in expected))
    # However a launch is cut, and in 64 bits: the same.
    for name, value in (("IMAGES", 2), ("LARGEST", 800)):
        kept = getattr(kernel, name)
        setattr(kernel, name, value)
        for layout in ("contiguous", "channels_last"):
            check(samples.lay_out(x, layout), (3, 2, 1), expected)
        setattr(kernel, name, kept)
    # No other byte is written.
    whole_y, whole_switches = torch.full((3, 32, 5, 5), 7.0), torch.full((3, 32, 5, 5), 7, dtype=torch.uint8)
    launch(x[1:2], whole_y[1:2], whole_switches[1:2], ((3, 3), (2, 2), (1, 1), (1, 1)))
    for whole, want in zip((whole_y, whole_switches), expected, strict=True):
        assert torch.equal(whole[1], want[1]) and (whole[::2] == 7).all()


def far_apart():
    """Values 2**31 elements apart along each axis, in memory of which only the touched pages exist."""
    x = samples.draw((2, 3, 4, 4), torch.bfloat16, "ties", torch.Generator().manual_seed(2))
    expected = reference.max_pool2d_with_switches(x, 2)
    for axis in range(4):
        strides = list(x.stride())
        strides[axis] = -(-FAR // (x.size(axis) - 1))
        memory = torch.empty(FAR + 2 * x.numel() * x.size(axis), dtype=x.dtype)
        apart = memory.as_strided(x.shape, strides).copy_(x)
        y, switches = torch.empty_like(expected[0]), torch.empty_like(expected[1])
        kernel.max_pool2d_with_switches(apart, y, switches, ((2, 2), (2, 2), (0, 0), (1, 1)))
        assert oracle.same(y, expected[0]) and torch.equal(switches, expected[1]), axis


CHECKS = {check.__name__: check for check in (drawn_pools, networks_pools, edges, far_apart)}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
    assert calls, "the kernel did not run"
