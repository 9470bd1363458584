"""What the tests of the kernels' bodies check of a sample, and samples that reach every variant."""

from __future__ import annotations

import itertools
import random

import oracle
import samples
import torch
from driver import Output
from zfcore import reference
from zfcore.reference._params import Places

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
