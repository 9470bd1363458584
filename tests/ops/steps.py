"""Drawn steps of the deconvnet, for every backend of deconv_step."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

import torch

from zfcore import ops
from zfcore.ops.deconv_step import deconv_step
from zfcore.reference._params import StepParams

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 4e-3}
IMAGES = 3


@dataclass
class Sample:
    signal: torch.Tensor
    weight: torch.Tensor
    step: StepParams
    image: torch.Tensor
    origin: torch.Tensor
    switches: torch.Tensor | None
    passes: torch.Tensor | None
    scale: torch.Tensor | None
    frame: tuple[torch.Tensor, tuple[int, int]] | None

    def run(self, function=deconv_step, dtype=None, **options):
        cast = (lambda x: x) if dtype is None else (lambda x: None if x is None else x.to(dtype))
        return function(
            cast(self.signal), cast(self.weight), self.step, self.image, self.origin, self.switches,
            self.passes, cast(self.scale), self.frame, **options,
        )  # fmt: skip

    def to(self, device: str) -> Sample:
        def moved(x):
            return x.to(device) if isinstance(x, torch.Tensor) else x

        frame = self.frame and (self.frame[0].to(device), self.frame[1])
        return Sample(**{f.name: moved(getattr(self, f.name)) for f in fields(self) if f.name != "frame"}, frame=frame)

    def part(self, some: slice) -> Sample:
        """Of some patches."""
        frame = self.frame and (self.frame[0][some], self.frame[1])
        own = {"signal": self.signal[some], "image": self.image[some], "origin": self.origin[some], "frame": frame}
        return replace(self, **own)


def draw(seed: int) -> Sample:
    """A geometry whose maps, patches and frames overlap every border in one sample or another."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    channels = choose.choice([1, 2, 5, 8, 33, 64, 96, 160])
    groups = choose.choice([1, 1, 1, 2]) if channels % 2 == 0 else 1
    kernel = choose.choice([1, 2, 3]), choose.choice([2, 3, 5])
    pool = (
        kernel,
        (choose.choice([1, 2, 3]), choose.choice([1, 2, 2])),
        tuple(choose.randint(0, k // 2) for k in kernel),
        (choose.choice([1, 1, 2]), 1),
    )
    filters = choose.choice([1, 3, 5]), choose.choice([1, 2, 3])
    spread = choose.choice([1, 2]), choose.choice([1, 1, 2])
    conv = (
        filters,
        (choose.choice([1, 2]), choose.choice([1, 2])),
        tuple(choose.randint(0, d * (k - 1)) for k, d in zip(filters, spread, strict=True)),
        spread,
    )
    below = choose.randint(18, 34), choose.randint(18, 34)
    size = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(below, *conv, strict=True)
    )
    switches, own = None, size
    if pooled := choose.random() < 0.6:
        values, switches = ops.max_pool2d_with_switches(torch.randn(IMAGES, channels, *size).round(), *pool)
        own = tuple(values.shape[2:])
    whole = choose.random() < 0.4
    batch = choose.choice([1, 2, 7, 40])
    if full := choose.random() < 0.3:
        patch, origin = own, torch.zeros(batch, 2, dtype=torch.int64)
    else:
        patch = choose.randint(1, own[0]), choose.randint(1, own[1])
        origin = torch.stack([torch.randint(-3, n, (batch,)) for n in own], 1)
    dtype = choose.choice([torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16])
    signal = torch.randn(batch, channels, *patch).to(dtype)
    if choose.random() < 0.5:
        signal = signal.contiguous(memory_format=torch.channels_last)
    elif full and choose.random() < 0.5:
        signal = signal.transpose(2, 3).contiguous().transpose(2, 3)
    frame = None
    if whole and choose.random() < 0.5:
        frame = torch.randint(-9, 9, (batch, 2)), (choose.randint(1, 40), choose.randint(1, 40))
    return Sample(
        signal,
        torch.randn(channels, choose.choice([1, 2, 3, 8, 16]), *filters).to(dtype),
        StepParams(
            pool if pooled else None, conv, groups, size, below, whole, choose.random() < 0.6,
            choose.choice(["sum", "last"]),
        ),
        torch.randint(0, IMAGES, (batch,)),
        origin,
        switches,
        torch.rand(IMAGES, channels, *size) < 0.5 if choose.random() < 0.4 else None,
        torch.randn(channels).to(dtype) if choose.random() < 0.3 else None,
        frame,
    )  # fmt: skip


def depthwise(seed: int) -> Sample:
    """As `draw`, one filter a channel and no pool."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    channels = choose.choice([2, 5, 8, 16, 33, 70, 160])
    filters = choose.choice([1, 3, 5, 7]), choose.choice([1, 2, 3, 5])
    spread = choose.choice([1, 1, 2]), choose.choice([1, 1, 2, 3])
    conv = (
        filters,
        (choose.choice([1, 2, 3]), choose.choice([1, 2, 3])),
        tuple(choose.randint(0, d * (k - 1)) for k, d in zip(filters, spread, strict=True)),
        spread,
    )
    below = choose.randint(18, 34), choose.randint(18, 34)
    size = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(below, *conv, strict=True))
    batch, whole = choose.choice([1, 2, 7]), choose.random() < 0.6
    patch, origin = size, torch.zeros(batch, 2, dtype=torch.int64)
    if choose.random() < 0.5:
        patch = choose.randint(1, size[0]), choose.randint(1, size[1])
        origin = torch.stack([torch.randint(-3, n, (batch,)) for n in size], 1)
    dtype = choose.choice([torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16])
    signal = torch.randn(batch, channels, *patch).to(dtype)
    if choose.random() < 0.7:
        signal = signal.contiguous(memory_format=torch.channels_last)
    frame = None
    if whole and choose.random() < 0.3:
        frame = torch.randint(-9, 9, (batch, 2)), (choose.randint(1, 40), choose.randint(1, 40))
    return Sample(
        signal,
        torch.randn(channels, 1, *filters).to(dtype),
        StepParams(None, conv, channels, size, below, whole, choose.random() < 0.6, "sum"),
        torch.randint(0, IMAGES, (batch,)),
        origin,
        None,
        torch.rand(IMAGES, channels, *size) < 0.5 if choose.random() < 0.4 else None,
        torch.randn(channels).to(dtype) if choose.random() < 0.3 else None,
        frame,
    )


def too_large_for_half() -> Sample:
    """Two windows name one place, whose sum no float16 holds; half of it is one."""
    signal, weight = torch.zeros(1, 16, 1, 2).half(), torch.zeros(16, 16, 1, 1).half()
    signal[0, 0], weight[0, 0] = 40000, 0.5
    switches = torch.tensor([8, 6], dtype=torch.uint8).expand(1, 16, 1, 2)
    conv = ((1, 1), (1, 1), (0, 0), (1, 1))
    step = StepParams(((3, 3), (2, 2), (1, 1), (1, 1)), conv, 1, (2, 4), (2, 4), False, True, "sum")
    zero = torch.zeros(1, 2, dtype=torch.int64)
    return Sample(signal, weight, step, zero[0, :1], zero, switches, None, None, None)


def close(ours, wanted, dtype, tolerances=TOLERANCE, what=None):
    assert ours.shape == wanted.shape and ours.dtype == dtype, what
    assert torch.equal(ours.isnan(), wanted.isnan()), what
    finite = wanted.isfinite()
    assert torch.equal(ours[~finite & ~wanted.isnan()].double(), wanted[~finite & ~wanted.isnan()]), what
    if finite.any():
        error = (ours.double() - wanted)[finite].abs().max()
        assert error <= tolerances[dtype] * wanted[finite].abs().max().clamp(min=1e-30), (error, what)
