"""Checks of the deconvnet's Triton kernel in Triton's interpreter: python interpreted_steps.py NAME, TRITON_INTERPRET=1."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

import steps  # noqa: E402
from steps import Sample, close  # noqa: E402
from zfcore import deconv_project, ops, reference, use_backend  # noqa: E402
from zfcore.kernels import deconv_step as kernel  # noqa: E402
from zfcore.kernels._places import Config  # noqa: E402
from zfcore.ops import _library  # noqa: E402
from zfcore.reference._params import StepParams  # noqa: E402

kernel.APART = Config(128, 32, 32, 4, 1)  # the interpreter's time is that of its programs, whatever is in one
_library._BY_DEVICE["cpu"] = ("triton", "cpu")  # as for tensors on a GPU
calls = []
launch = kernel.deconv_step
kernel.deconv_step = lambda *a, **k: calls.append(1) or launch(*a, **k)


def draw(seed: int) -> Sample:
    with use_backend("cpu"):  # switches, which are soon there
        return steps.draw(seed)


def pooled(maps: torch.Tensor, pool: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    with use_backend("cpu"):
        return ops.max_pool2d_with_switches(maps, *pool)


def expected(sample: Sample) -> torch.Tensor:
    return sample.run(reference.deconv_step, torch.float64)


def drawn_steps():
    done = 0
    for seed in range(60):
        sample = draw(seed).part(slice(0, 2))
        want = expected(sample)
        if want[:, 0].numel() * sample.weight[0, 0].numel() > 4000:  # the interpreter takes its time
            continue
        close(sample.run(), want, sample.signal.dtype)
        done += 1
    assert done >= 20


def more_drawn_steps():
    """Of multiples of 16, whose tiles are others."""
    done = 0
    for seed in range(100, 400):
        sample = draw(seed).part(slice(0, 2))
        units, channels = sample.signal.size(1), sample.weight.size(1)
        if units // sample.step.groups % 16 or channels % 16 or sample.signal.dtype == torch.float64:
            continue
        close(sample.run(), expected(sample), sample.signal.dtype)
        done += 1
        if done == 10:
            return
    raise AssertionError("too few of them are drawn")


def edges():
    # The bits do not depend on the batch, on layouts, or on how a launch is cut.
    drawn = (s for s in map(draw, range(400, 500)) if len(s.signal) == 7 and s.switches is not None)
    sample = min(drawn, key=lambda s: s.run(reference.deconv_step).numel() * s.weight[0, 0].numel())
    whole = sample.run()
    assert torch.equal(sample.part(slice(2, 4)).run(), whole[2:4])
    out = torch.full(whole.shape, 7.0, dtype=whole.dtype)
    assert sample.run(out=out) is out and torch.equal(out, whole)
    wide = torch.full((*whole.shape[:2], whole.shape[2] + 2, whole.shape[3] + 3), -7.0, dtype=whole.dtype)
    part = wide[:, :, 1:-1, 2:-1]
    sample.run(out=part)
    assert torch.equal(part, whole)
    part.fill_(-7)
    assert (wide == -7).all(), "memory outside the result was written"
    largest, kernel.LARGEST = kernel.LARGEST, 1024 + whole[0].numel() * 3
    assert torch.equal(sample.run(), whole)
    kernel.LARGEST = largest
    assert sample.part(slice(0, 0)).run().shape == (0, *whole.shape[1:])

    # Filters that are not finite: an exact zero times them is zero. What is no number in a signal stays.
    odd = replace(draw(4), scale=None)
    odd = replace(odd, weight=odd.weight.clone(), signal=odd.signal.clone()).part(slice(0, 2))
    odd.weight[0, 0, 0, 0], odd.weight[1, 0, 0, -1] = torch.inf, torch.nan
    close(odd.run(), expected(odd), odd.signal.dtype)
    odd.weight.nan_to_num_(1, 1)
    odd.signal[0, 0, 0, 0], odd.signal[1, -1, -1, -1] = torch.nan, torch.inf
    close(odd.run(), expected(odd), odd.signal.dtype)

    large = steps.too_large_for_half()
    assert expected(large).max() == 40000
    close(large.run(), expected(large), torch.float16)

    # Any byte as a switch, any index: nothing is read that is not there, and such patches give zeros.
    wild = replace(sample, switches=torch.randint(0, 256, sample.switches.shape, dtype=torch.uint8))
    assert wild.run().shape == whole.shape
    bad = replace(sample, image=sample.image.clone(), origin=sample.origin.clone())
    bad.image[1], bad.image[2], bad.origin[4], bad.origin[5] = 10**9, -1, 2**62, -(2**62)
    got = straight(bad)
    assert not got[[1, 2, 4, 5]].any() and torch.equal(got[[0, 3, 6]], whole[[0, 3, 6]])


def straight(sample: Sample) -> torch.Tensor:
    """Past the checks that the op makes of indices on the CPU."""
    last = {"memory_format": torch.channels_last}
    step, scale = sample.step, sample.scale
    weight = sample.weight if scale is None else sample.weight * scale[:, None, None, None]
    size = step.reach(tuple(sample.signal.shape[2:]))[1] if sample.frame is None else sample.frame[1]
    out = torch.empty(len(sample.signal), weight.size(1) * step.groups, *size, dtype=weight.dtype).contiguous(**last)
    return launch(
        sample.signal.contiguous(**last), weight.permute(2, 3, 0, 1).contiguous(), torch.tensor([True]), sample.image,
        sample.origin, out, step.conv, step.groups, step.map, step.below, step.pool, sample.switches.contiguous(**last),
        None if sample.passes is None else sample.passes.contiguous(**last), step.rectify, step.overlap == "last",
        step.whole, None if sample.frame is None else sample.frame[0],
    )  # fmt: skip


def networks_layers():
    """The shapes of ZFNet's and ResNet's steps: overlapping pools of both kinds, dilation, no pool."""
    for pool, conv in (
        (((3, 3), (2, 2), (1, 1), (1, 1)), ((5, 5), (2, 2), (0, 0), (1, 1))),
        (((3, 3), (2, 2), (0, 0), (1, 1)), ((7, 7), (2, 2), (3, 3), (1, 1))),
        (((3, 3), (1, 1), (1, 1), (1, 1)), ((1, 1), (1, 1), (0, 0), (1, 1))),
        (None, ((3, 3), (1, 1), (2, 2), (2, 2))),
    ):
        maps = torch.randn(2, 32, 15, 15).round()
        switches, own = None, maps
        if pool is not None:
            own, switches = pooled(maps, pool)
        below = tuple((15 - 1) * s - 2 * p + d * (k - 1) + 1 for k, s, p, d in zip(*conv))
        below = tuple(n[0] if isinstance(n, tuple) else n for n in below)
        for overlap in ("sum", "last"):
            sample = Sample(
                own[:, :, :4, 1:5].contiguous(),
                torch.randn(32, 16, *conv[0]),
                StepParams(pool, conv, 1, (15, 15), below, False, True, overlap),
                torch.tensor([1, 0]),
                torch.tensor([[0, 1], [2, -1]]),
                switches,
                None,
                None,
                None,
            )
            close(sample.run(), expected(sample), torch.float32)


def the_fused_op():
    """unpool_relu_conv_transpose2d, whose unpooled maps are whole: layouts, dtypes, groups and its gradient."""
    conv = {"stride": 2, "padding": (2, 1), "groups": 2, "output_padding": 1}
    pool = (3, 2, 1)
    for dtype, layout, overlap in (
        (torch.float32, torch.channels_last, "sum"),
        (torch.float32, torch.contiguous_format, "last"),
        (torch.bfloat16, torch.contiguous_format, "sum"),
    ):
        y, switches = pooled(torch.randn(2, 8, 9, 11), pool)
        y, weight = y.to(dtype).contiguous(memory_format=layout), torch.randn(8, 20, 3, 2).to(dtype)
        count = len(calls)
        z = ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=pool, conv=conv, overlap=overlap)
        assert len(calls) == count + 1
        wide = y.double(), switches, weight.double()
        with use_backend("reference"):
            want = ops.unpool_relu_conv_transpose2d(*wide, pool=pool, conv=conv, overlap=overlap)
        close(z, want, dtype)
        assert z.is_contiguous(memory_format=layout)
    y, weight = y.float().requires_grad_(), weight.float().requires_grad_()
    ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=pool, conv=conv).sum().backward()
    assert y.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0


def projections():
    """A small network's projections: the engine's, with Triton's step, and the CPU's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 5, 2, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 2, 1),
        torch.nn.Conv2d(16, 16, 3, padding=1),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 8, 2),
    ).eval()
    images = torch.randn(1, 3, 19, 19)
    for options in ({"crop": True}, {"rule": "guided", "overlap": "last", "units": [2]}):
        calls.clear()
        ours = deconv_project(model, images, "7", **{"units": [0, 5], **options})
        assert len(calls) >= 3, "the engine did not run on Triton"
        with use_backend("reference"):
            theirs = deconv_project(model.double(), images.double(), "7", **{"units": [0, 5], **options})
        model.float()
        assert torch.equal(ours.boxes, theirs.boxes)
        error = (ours.pixels.double() - theirs.pixels).abs().max()
        assert error <= 1e-5 * theirs.pixels.abs().max(), (options, error)


CHECKS = {check.__name__: check for check in (drawn_steps, more_drawn_steps, edges, networks_layers, the_fused_op, projections)}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
    assert calls, "the kernel did not run"
