"""What the tests of the kernels' bodies check of a sample, and samples that reach every variant."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import oracle
import samples
import torch
from driver import Output
from steps import Sample, close
from zfcore import reference
from zfcore.ops.deconv_step import packed_for_cuda
from zfcore.reference._params import Places, StepParams

# The windows that kernels are compiled for, with the paddings that they allow.
KNOWN = [((3, 3), (2, 2), (p, q)) for p, q in ((0, 0), (1, 1), (0, 1))] + [
    ((2, 2), (2, 2), (p, q)) for p, q in ((0, 0), (1, 1), (1, 0))
]
SIZES = [
    (1, 8, 13, 13),
    (2, 16, 6, 9),
    (1, 4, 27, 5),
    (3, 24, 2, 3),
    (1, 64, 7, 14),
    (2, 12, 10, 16),
    (1, 3, 9, 8),
]
MAPS = ("contiguous", "channels_last", "sliced", "permuted")


def known_samples():
    """Samples of the compiled windows: every dtype in four layouts, some channels no multiple of a vector."""
    made = []
    for number, (dtype, layout, (kernel, stride, padding)) in enumerate(
        itertools.product(samples.DTYPES, MAPS, KNOWN)
    ):
        made += samples.table(
            1,
            seed=1000 + number,
            dtype=dtype,
            layout=layout,
            size=SIZES[number % len(SIZES)],
            kernel=kernel,
            stride=stride,
            padding=padding,
            dilation=(1, 1),
        )
    return made


def strides_of(shape, layout):
    """Strides of a result: dense as torch lays it out, or with gaps."""
    like = torch.empty(shape, device="meta")
    if layout == "channels_last":
        return like.contiguous(memory_format=torch.channels_last).stride()
    if layout == "gaps":
        n, c, h, w = shape
        return (c * (h + 1) * (w + 3), (h + 1) * (w + 3), w + 3, 1)
    return like.stride()


def result_layout(sample) -> str:
    """Results lie as the ops make them, and one in five with gaps."""
    if sample.seed % 5 == 4:
        return "gaps"
    return "channels_last" if sample.layout == "channels_last" else "contiguous"


def unpooled_sizes(sample):
    """Sizes that the sample's pooled map unpools to: its own and the smallest."""
    return sorted({sample.size[2:], sample.smallest})


def pasted(seed, dtype, layout, patch=None):
    """Pictures, fill, boxes and places: boxes reach past their patches, and past the pictures."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    images, channels, size = rng.randint(1, 3), rng.choice([1, 2, 3, 4, 8]), (rng.randint(4, 20), rng.randint(4, 20))
    pictures = samples.lay_out(samples.draw((images, channels, *size), dtype, "special", generator), layout)
    fill = torch.randn((images, channels, *size), generator=generator).to(dtype)
    if seed % 2:
        fill = fill[:, :, :1, :1].expand(fill.shape)
    patch = patch or (rng.randint(1, size[0]), rng.randint(1, size[1]))
    count = rng.choice([1, 2, 7])
    origin = torch.tensor([[rng.randint(0, max(0, n - m)) for n, m in zip(size, patch)] for _ in range(count)])
    first = torch.tensor([[rng.randint(-3, n + 1) for n in size] for _ in range(count)])
    boxes = torch.cat((first, first + torch.randint(0, 12, (count, 2), generator=generator)), 1)
    image = torch.randint(0, images, (count,), generator=generator)
    return pictures, fill, boxes, Places(image, origin, origin, patch)


def check_paste(driver, pictures, fill, boxes, places, layout):
    """layout: of the result, as `strides_of` has it, or "dense" for one that takes 16 bytes at a time."""
    expected = reference.paste_boxes(pictures, fill, boxes, places)
    b, c, h, w = shape = expected.shape
    strides = {"dense": (c * h * w, 1, w * c, c), "gaps": ((c + 1) * (h + 1) * w, 1, w * (c + 1), c + 1)}.get(layout)
    reports = set()
    for backwards in (False, True):
        out = Output(shape, pictures.dtype, strides or strides_of(shape, layout))
        indices = [x.contiguous() for x in (places.image, places.origin, boxes)]
        reports.add(driver.paste_boxes(pictures, fill, out.tensor, *indices, backwards))
        assert oracle.same(out.check(), expected), (shape, layout)
    (report,) = reports
    return report


@dataclass(repr=False)
class Step(Sample):
    """The arguments of a `deconv_step` to few channels, and how its result lies."""

    name: str
    layout: str

    def __repr__(self):
        return f"{self.name}: {self.signal.dtype} {tuple(self.signal.shape)} to {self.weight.size(1)}, {self.step}"

    def expected(self):
        """The reference's result in float64."""
        return self.run(reference.deconv_step, torch.float64)

    def assert_close(self, ours, expected):
        close(ours, expected, self.signal.dtype, STEP_TOLERANCE, self)

    def check(self, driver, limit=64 * 1024, expected=None):
        expected = self.expected() if expected is None else expected
        packed, reports, results = packed_for_cuda(self.weight, self.scale), set(), []
        for backwards in (False, True):
            out = Output(expected.shape, self.signal.dtype, strides_of(expected.shape, self.layout))
            reports.add(
                driver.deconv_step(
                    self.signal, packed, self.step, self.image, self.origin, self.switches, self.passes,
                    None if self.frame is None else self.frame[0], out.tensor, limit, backwards,
                )
            )  # fmt: skip
            results.append(out.check())
            self.assert_close(results[-1], expected)
        assert oracle.same(*results), self
        (report,) = reports
        assert report.shared_bytes <= limit
        return report


STEP_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CONVS = {"7x7/2": ((7, 7), (2, 2)), "3x3/1": ((3, 3), (1, 1))}
STEP_POOLS = {"3x3/2": ((3, 3), (2, 2)), "2x2/2": ((2, 2), (2, 2)), "none": None}


def drawn_step(seed, conv=None, pool=None, dtype=None, channels=None, special=False, **fixed):
    """Patches, maps and frames overlap every border in one sample or another.

    conv, pool: one of CONVS and STEP_POOLS, or None for windows that are drawn too. fixed: further fields of the step.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = dtype or rng.choice(samples.DTYPES)
    filters = rng.choice([1, 2, 4, 5, 8, 12, 36, 40])
    channels = channels or rng.choice([1, 2, 3, 3, 4])
    if conv is None:
        kernel = rng.choice([1, 3, 5]), rng.choice([1, 2, 3, 4])
        stride, spread = (rng.choice([1, 2, 3]), rng.choice([1, 2, 5])), (rng.choice([1, 2]), rng.choice([1, 1, 2, 3]))
    else:
        (kernel, stride), spread = CONVS[conv], (1, 1)
    padding = tuple(rng.randint(0, d * (k - 1)) for k, d in zip(kernel, spread, strict=True))
    conv = (kernel, stride, padding, spread)
    below = tuple(rng.randint(d * (k - 1) + 6, 40) for k, d in zip(kernel, spread, strict=True))
    size = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(below, *conv, strict=True))
    if pool is None:
        window = rng.choice([1, 2, 3]), rng.choice([2, 3, 5])
        pool = (window, (rng.choice([1, 2, 3]), rng.choice([1, 2])), None, (rng.choice([1, 1, 2]), 1))
    else:
        pool = STEP_POOLS[pool] and (*STEP_POOLS[pool], None, (1, 1))
    if pool and any(n < d * (k - 1) + 1 for n, k, d in zip(size, pool[0], pool[3], strict=True)):
        pool = None
    own, switches = size, None
    if pool:
        pool = (*pool[:2], tuple(rng.randint(0, k // 2) for k in pool[0]), pool[3])
        maps = torch.randn((3, filters, *size), generator=generator).round()
        _, switches, _ = oracle.pool(maps, *pool, False)
        own = tuple(switches.shape[2:])
    batch = rng.choice([1, 2, 5])
    patch = rng.choice([own, tuple(rng.randint(1, n) for n in own)])
    origin = torch.stack([torch.randint(1 - m, n, (batch,), generator=generator) for m, n in zip(patch, own)], 1)
    origin[0] = torch.randint(-2, 2, (2,), generator=generator)
    whole = fixed.pop("whole", rng.random() < 0.4)
    frame = None
    if whole and rng.random() < 0.5:
        frame = torch.randint(-9, 9, (batch, 2), generator=generator), (rng.randint(1, 40), rng.randint(1, 40))
    passes = torch.rand((3, filters, *size), generator=generator) < 0.6 if rng.random() < 0.4 else None
    layout = rng.choice(["channels_last", "channels_last", "contiguous", "sliced"])
    lay_out = lambda x: None if x is None else samples.lay_out(x, layout)  # noqa: E731
    weight = torch.randn((filters, channels, *kernel), generator=generator).to(dtype)
    if special:
        weight.view(-1)[rng.randrange(3) :: weight.numel() // 3 + 1] = rng.choice([torch.inf, -torch.inf, torch.nan])
    signal = samples.draw((batch, filters, *patch), dtype, "special" if special else "normal", generator)
    step = StepParams(
        pool, conv, 1, size, below, whole, rng.random() < 0.7, fixed.pop("overlap", rng.choice(samples.OVERLAPS))
    )
    return Step(
        lay_out(signal),
        weight,
        step._replace(**fixed),
        torch.randint(0, 3, (batch,), generator=generator),
        origin,
        lay_out(switches),
        lay_out(passes),
        torch.randn(filters, generator=generator).to(dtype) if rng.random() < 0.3 and not special else None,
        frame,
        name=f"seed {seed}{' of special values' * special}",
        layout=rng.choice(["contiguous", "channels_last", "gaps"]),
    )


def check_pool(driver, sample):
    x = sample.x()
    expected_y, expected_switches, _ = oracle.pool(x, *sample.pool)
    reports = set()
    for backwards in (False, True):
        layout = result_layout(sample)
        y = Output(expected_y.shape, x.dtype, strides_of(expected_y.shape, layout))
        switches = Output(expected_y.shape, torch.uint8, strides_of(expected_y.shape, layout))
        reports.add(driver.max_pool2d_with_switches(x, y.tensor, switches.tensor, sample.window, backwards))
        assert oracle.same(y.check(), expected_y), sample
        assert torch.equal(switches.check(), expected_switches), sample
    (report,) = reports
    return report


def check_unpool(driver, sample, size, relu, overlap):
    switches = sample.switches(None if size == sample.size[2:] else size)
    y = sample.y()
    op = reference.unpool_relu2d if relu else reference.unpool2d
    expected = op(y, switches, *sample.window, size, overlap)
    reports = set()
    for backwards in (False, True):
        out = Output(expected.shape, y.dtype, strides_of(expected.shape, result_layout(sample)))
        bad = torch.zeros(1, dtype=torch.int32)
        arguments = (y, switches, out.tensor, sample.window, relu, overlap)
        reports.add(driver.unpool_relu2d(*arguments, bad if backwards else None, backwards))
        assert oracle.same(out.check(), expected), (sample, size, relu, overlap)
        assert not bad.item(), (sample, size)
    (report,) = reports
    return report


def check_gather(driver, sample, overlap):
    x, switches = sample.x(), sample.switches()
    expected = oracle.gather(x, switches, sample.window, overlap)
    reports = set()
    for backwards in (False, True):
        out = Output(expected.shape, x.dtype, strides_of(expected.shape, result_layout(sample)))
        bad = torch.zeros(1, dtype=torch.int32)
        reports.add(driver.pool_gather2d(x, switches, out.tensor, sample.window, overlap, bad, backwards))
        assert oracle.same(out.check(), expected), (sample, overlap)
        assert not bad.item(), sample
    (report,) = reports
    return report
