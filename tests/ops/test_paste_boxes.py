"""paste_boxes: the native kernel is the reference bit by bit, for any layout, box and patch."""

from __future__ import annotations

import random

import pytest
import samples
import torch
from zfcore import _C, reference, use_backend
from zfcore.errors import DeviceError, DtypeError, ShapeError
from zfcore.ops.paste_boxes import paste_boxes
from zfcore.reference._params import Places


def draw(seed: int, dtype=torch.float32):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    images, channels, size = rng.randint(1, 3), rng.choice([1, 2, 3, 4, 8]), [rng.randint(3, 20) for _ in "yx"]
    pictures = samples.draw((images, channels, *size), dtype, "special", generator)
    pictures = samples.lay_out(pictures, rng.choice(samples.LAYOUTS))
    fill = torch.randn((1, channels, 1, 1), generator=generator).to(dtype).expand(pictures.shape)
    if seed % 3 == 0:
        fill = torch.randn(pictures.shape, generator=generator).to(dtype)
    patch = tuple(rng.randint(1, n) for n in size)
    count = rng.choice([0, 1, 2, 9])
    origin = torch.tensor([[rng.randint(0, n - m) for n, m in zip(size, patch)] for _ in range(count)]).view(-1, 2)
    first = torch.tensor([[rng.randint(-3, n + 1) for n in size] for _ in range(count)]).view(-1, 2)
    sides = torch.tensor([[rng.randint(0, 12) for _ in size] for _ in range(count)]).view(-1, 2)
    image = torch.tensor([rng.randrange(images) for _ in range(count)], dtype=torch.int64)
    boxes = torch.cat((first, first + sides), 1).long()
    return pictures, fill, boxes, Places(image, origin.long(), origin.long(), patch)


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_reference(dtype, isa):
    before = _C.cpu_isa()
    _C.set_cpu_isa(isa)
    try:
        for seed in range(60):
            case = draw(seed, dtype)
            expected = reference.paste_boxes(*case)
            got = paste_boxes(*case)
            assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0)), seed
            assert got.is_contiguous(memory_format=torch.channels_last)
            b, c, h, w = got.shape
            memory = torch.full((b, h, w + 1, c + 2), -7.0, dtype=dtype)
            out = memory[:, :, :w, :c].permute(0, 3, 1, 2)
            assert paste_boxes(*case, out) is out and torch.equal(out.nan_to_num(7.0), got.nan_to_num(7.0)), seed
            out.fill_(-7)
            assert (memory == -7).all(), seed
            with use_backend("reference"):
                assert torch.equal(paste_boxes(*case).nan_to_num(7.0), expected.nan_to_num(7.0))
    finally:
        _C.set_cpu_isa(before)


def test_boxes_that_end_at_the_ends_of_int64():
    pictures, fill, boxes, places = draw(7)
    low, high = -(2**63), 2**63 - 1
    for ends in ((low, low, high, high), (high, low, low, high), (low, high, high, high)):
        boxes = torch.tensor([ends]).expand(len(boxes), 4).contiguous()
        expected = reference.paste_boxes(pictures, fill, boxes, places)
        assert torch.equal(paste_boxes(pictures, fill, boxes, places).nan_to_num(7.0), expected.nan_to_num(7.0)), ends


def test_same_bits_at_any_number_of_threads():
    case = draw(7)
    one = paste_boxes(*case)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(paste_boxes(*case).nan_to_num(7.0), one.nan_to_num(7.0))
    finally:
        torch.set_num_threads(threads)


def test_refusals():
    images, places = torch.zeros(2, 3, 8, 9), Places(*[torch.zeros(1, 2, dtype=torch.int64)] * 3, (4, 4))
    places = places._replace(image=torch.zeros(1, dtype=torch.int64))
    boxes = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(DtypeError, match="images of torch.float16"):
        paste_boxes(images.half(), images.half(), boxes, places)
    with pytest.raises(ShapeError, match=r"fill of torch.float32 \(1, 3, 8, 9\)"):
        paste_boxes(images, images[:1], boxes, places)
    with pytest.raises(ShapeError, match=r"boxes of torch.int64 \(1, 3\): expected int64 \[1, 4\]"):
        paste_boxes(images, images, boxes[:, :3], places)
    with pytest.raises(DeviceError, match="boxes on meta"):
        paste_boxes(images, images, boxes.to("meta"), places)
    with pytest.raises(ShapeError, match="out of torch.float32"):
        paste_boxes(images, images, boxes, places, torch.zeros(1, 3, 5, 5))
    for name, value in (("image", 2), ("image", -1), ("origin", 5), ("origin", -1), ("origin", 2**62)):
        bad = places._replace(**{name: torch.full_like(getattr(places, name), value)})
        with pytest.raises(ValueError, match="patch 0 is not inside its picture"):
            paste_boxes(images, images, boxes, bad)
