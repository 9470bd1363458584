"""The samples that every test of the ops uses: dtypes, layouts, windows and values, from one seed."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, replace

import oracle
import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = (
    "contiguous",
    "channels_last",
    "sliced",
    "transposed",
    "expanded",
    "offset",
    "stepped",
    "permuted",
)
VALUES = ("normal", "ties", "special")
OVERLAPS = ("sum", "last")


@dataclass(frozen=True)
class Sample:
    """One input of the ops. The pooled map and the filter are made from it by the tests."""

    seed: int
    dtype: torch.dtype
    layout: str
    size: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool
    values: str
    overlap: str
    # The convolution of the fused op.
    conv_kernel: tuple[int, int]
    conv_stride: tuple[int, int]
    conv_padding: tuple[int, int]
    conv_dilation: tuple[int, int]
    output_padding: tuple[int, int]
    groups: int
    out_channels: int

    @property
    def window(self) -> tuple:
        return self.kernel, self.stride, self.padding, self.dilation

    @property
    def pool(self) -> tuple:
        return *self.window, self.ceil_mode

    @property
    def conv(self) -> dict:
        return dict(
            stride=self.conv_stride,
            padding=self.conv_padding,
            dilation=self.conv_dilation,
            groups=self.groups,
            output_padding=self.output_padding,
        )

    def generator(self, salt: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 31 + salt)

    def x(self) -> torch.Tensor:
        """The map to pool, in the sample's layout."""
        return lay_out(draw(self.size, self.dtype, self.values, self.generator()), self.layout)

    @property
    def pooled(self) -> tuple[int, ...]:
        return oracle.pooled_size(self.size[2:], self.pool)

    @property
    def smallest(self) -> tuple[int, ...]:
        """The size that an op unpools to when it is given none."""
        return oracle.unpooled_size(self.pooled, self.window)

    def switches(self, size=None) -> torch.Tensor:
        """Switches from pooling a map of ``size``, or of the sample's, in a layout of their own."""
        if size is None:
            _, switches, _ = oracle.pool(self.x(), *self.pool)
        else:
            x = draw((*self.size[:2], *size), torch.float64, "ties", self.generator(3))
            _, switches, _ = oracle.pool(x, *self.window, False)
        return lay_out(switches, self.other_layout(1))

    def y(self) -> torch.Tensor:
        """A pooled map of both signs, of special values where x has them."""
        values = draw((*self.size[:2], *self.pooled), self.dtype, self.values, self.generator(1))
        return lay_out(values, self.layout)

    def weight(self) -> torch.Tensor:
        shape = (self.size[1], self.out_channels, *self.conv_kernel)
        return lay_out(draw(shape, self.dtype, "normal", self.generator(2)), self.other_layout(3))

    def other_layout(self, step: int) -> str:
        """A layout for another argument, so that layouts meet in pairs; expanding would change values."""
        layout = LAYOUTS[(LAYOUTS.index(self.layout) + step + self.seed) % len(LAYOUTS)]
        return "sliced" if layout == "expanded" else layout


def draw(shape, dtype, values, generator) -> torch.Tensor:
    """A contiguous tensor: normal numbers, or small integers with ties and both zeros, or with NaN, inf."""
    if values == "normal":
        return torch.randn(shape, generator=generator).to(dtype)
    x = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    x = torch.where(torch.rand(shape, generator=generator) < 0.2, -0.0, x)
    if values == "special":
        kind = torch.rand(shape, generator=generator)
        x = torch.where(kind < 0.06, torch.nan, x)
        x = torch.where(kind > 0.97, torch.inf, x)
        x = torch.where((kind > 0.5) & (kind < 0.75), -torch.inf, x)
    return x.to(dtype)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x in another layout; "expanded" repeats the first channel, and so changes them."""
    n, c, h, w = x.shape
    if layout == "contiguous":
        return x
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        whole = x.new_zeros(n, c + 2, h + 3, w + 2)
        part = whole[:, 1:-1, 2:-1, 1:-1]
    elif layout == "transposed":
        part = x.new_zeros(n, c, w, h).transpose(2, 3)
    elif layout == "expanded":
        return x[:, :1].contiguous().expand(n, c, h, w)
    elif layout == "offset":
        part = x.new_zeros(x.numel() + 7)[7:].view(x.shape)
    elif layout == "stepped":
        part = x.new_zeros(n, c, h, 2 * w)[..., ::2]
    elif layout == "permuted":
        part = x.new_zeros(w, h, n, c).permute(2, 3, 1, 0)
    return part.copy_(x)


@functools.cache
def table(count: int, *, seed: int = 0, tiny: bool = False, **fixed) -> tuple[Sample, ...]:
    """``count`` samples; ``fixed`` fields are kept. Equal arguments give equal samples.

    ``tiny`` samples have few enough values to differentiate by each of them.
    """
    samples = []
    rng = random.Random(f"{seed} {sorted(map(str, fixed.items()))}")
    for number in range(count):
        while True:
            sample = replace(_tiny(rng, number) if tiny else _random(rng, number), **fixed)
            if oracle.fits(sample.size[2:], sample.pool) and _conv_fits(sample):
                break
        samples.append(sample)
    return tuple(samples)


def _random(rng: random.Random, number: int) -> Sample:
    # Channel counts on both sides of a vector's width; one sample in twelve is large enough for blocks.
    large = number % 12 == 11
    channels = rng.choice((32, 48, 65) if large else (1, 2, 3, 4, 8, 9, 17))
    rows, columns = (
        (rng.randint(13, 20), rng.randint(13, 20)) if large else (rng.randint(1, 11), rng.randint(1, 11))
    )
    kernel = _pair(rng, 1, 4)
    conv_stride, conv_dilation = _pair(rng, 1, 3), _pair(rng, 1, 2)
    groups = rng.choice([g for g in (1, 1, 1, 2, 3, channels) if channels % g == 0])
    return Sample(
        seed=number,
        dtype=rng.choice(DTYPES),
        layout=rng.choice(LAYOUTS),
        size=(rng.choice((1, 2) if large else (0, 1, 1, 2, 2, 3)), channels, rows, columns),
        kernel=kernel,
        stride=kernel if rng.random() < 0.3 else _pair(rng, 1, 4),
        padding=tuple(rng.randint(0, k // 2) for k in kernel),
        dilation=(1, 1) if rng.random() < 0.6 else _pair(rng, 1, 3),
        ceil_mode=rng.random() < 0.4,
        values=rng.choice(VALUES),
        overlap=rng.choice(OVERLAPS),
        conv_kernel=_pair(rng, 1, 5),
        conv_stride=conv_stride,
        conv_padding=_pair(rng, 0, 2),
        conv_dilation=conv_dilation,
        output_padding=tuple(
            rng.randrange(max(s, d)) for s, d in zip(conv_stride, conv_dilation, strict=True)
        ),
        groups=groups,
        out_channels=rng.choice((1, 2, 3, 5, 8, 12)),
    )


def _tiny(rng: random.Random, number: int) -> Sample:
    n, channels = rng.choice(((1, 1), (1, 2), (2, 1)))
    return replace(
        _random(rng, number),
        size=(n, channels, rng.randint(1, 5), rng.randint(1, 4)),
        values="normal",
        conv_kernel=_pair(rng, 1, 2),
        out_channels=1,
        groups=rng.choice((1, channels)),
    )


def _pair(rng: random.Random, low: int, high: int) -> tuple[int, int]:
    first = rng.randint(low, high)
    return first, first if rng.random() < 0.6 else rng.randint(low, high)


def _conv_fits(sample: Sample) -> bool:
    """Whether the fused op has a result when it is given no size."""
    smallest = sample.smallest
    if not oracle.fits(smallest, (*sample.window, False)):
        return False
    if oracle.pooled_size(smallest, (*sample.window, False)) != sample.pooled:
        return False
    return min(oracle.transposed_size(smallest, sample.conv_kernel, sample.conv)) >= 1
