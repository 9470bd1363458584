"""conv_boxes: on every backend the definition's numbers, and on the CPU the bits of the two ops that it stands for."""

from __future__ import annotations

import random

import changes
import pytest
import torch
from running import present, running_on

from zfcore import reference
from zfcore.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from zfcore.ops.conv_boxes import conv_boxes
from zfcore.ops.conv_delta import ConvChange, Limits, Places, conv_delta, delta_filters
from zfcore.ops.paste_boxes import paste_boxes


class Drawn:
    """Boxes on pictures, in patches that hold what a window reaches; some of them larger than their patch."""

    def __init__(self, seed: int, dtype=torch.float32):
        choose = random.Random(seed)
        torch.manual_seed(seed)
        size = choose.randint(5, 16), choose.randint(5, 16)
        kernel = choose.choice([(1, 1), (3, 3), (5, 2), (7, 7)])
        window = kernel, (choose.randint(1, 3), choose.randint(1, 3)), (kernel[0] // 2, kernel[1] // 2), (1, 1)
        above = changes.window_size(size, window)
        groups = choose.choice([1, 1, 1, 2])
        channels, outputs = groups * choose.choice([1, 3, 4]), groups * choose.choice([1, 7, 16])
        images, batch = choose.randint(1, 3), choose.choice([1, 2, 7])
        self.patch = tuple(choose.randint(1, n) for n in size)
        origin = torch.tensor([[choose.randint(0, n - m) for n, m in zip(size, self.patch)] for _ in range(batch)])
        first = origin + torch.randint(-2, 3, (batch, 2))
        self.boxes = torch.cat((first, first + torch.randint(0, 9, (batch, 2))), 1)
        image = torch.randint(0, images, (batch,))
        self.places = Places(image, origin, torch.zeros_like(origin), above)
        layout = choose.choice(changes.LAYOUTS[:4])
        self.change = changes.lay_out(torch.randn(images, channels, *size).to(dtype), layout)
        self.weight = torch.randn(outputs, channels // groups, *kernel).to(dtype)
        self.scale = torch.randn(outputs).to(dtype) if seed % 2 else None
        self.clean = torch.randn(images, outputs, *above).to(dtype) if seed % 3 else None
        self.step = ConvChange(window, groups, size, above, choose.choice([Limits(), Limits(0.1, 0.7)]))

    def run(self, out=None):
        filters = delta_filters(self.weight, self.scale, groups=self.step.groups)
        return conv_boxes(self.change, self.boxes, self.patch, filters, self.step, self.places, self.clean, out)

    def wanted(self):
        wide = [changes.cast(x, torch.float64) for x in (self.change, self.weight, self.clean, self.scale)]
        change, weight, clean, scale = wide
        return reference.conv_boxes(change, self.boxes, self.patch, weight, self.step, self.places, clean, scale)


@pytest.mark.parametrize("name", present())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_definition(name, dtype):
    with running_on(name):
        for seed in range(40):
            case = Drawn(seed, dtype)
            about = 0.0 if case.clean is None else float(case.clean.abs().max())
            changes.close(case.run(), case.wanted(), dtype, about)


def test_the_bits_of_patches_that_are_laid_out():
    """Of fill - images, as the engine asked for it, in a result that is given as well."""
    for seed in range(20):
        case = Drawn(seed)
        images = torch.randn_like(case.change)
        fill = torch.full((), 0.3).expand(images.shape)
        delta = paste_boxes(images, fill, case.boxes, case.places._replace(size=case.patch))
        filters = delta_filters(case.weight, case.scale, groups=case.step.groups)
        want = conv_delta(delta, filters, case.step, case.places, case.clean)
        case.change = torch.sub(fill, images).contiguous(memory_format=torch.channels_last)
        assert changes.same_bits(case.run(), want)
        out = torch.full_like(want, torch.nan)
        assert case.run(out) is out and changes.same_bits(out, want)


def test_what_is_under_no_box_plays_no_part():
    """No number there is read; one under a box reaches what sees it, of its own picture only."""
    case = next(c for c in map(Drawn, range(100)) if len(c.change) == 3 and len(c.boxes) == 7 and c.run().any())
    whole, case.change = case.run(), case.change.clone()
    case.change[...] = case.change.where(covered(case), torch.nan)
    assert changes.same_bits(case.run(), whole)
    lost = int(case.places.image[0])
    case.change[lost] = torch.nan
    others = case.places.image != lost
    assert changes.same_bits(case.run()[others], whole[others])
    assert torch.equal(case.run().isnan(), case.wanted().isnan())


def covered(case: Drawn) -> torch.Tensor:
    """Of the pictures, what any box covers."""
    found = torch.zeros(case.change.shape, dtype=torch.bool)
    for image, (y0, x0, y1, x1) in zip(case.places.image.tolist(), case.boxes.clamp(min=0).tolist(), strict=True):
        found[image, :, y0:y1, x0:x1] = True
    return found


def test_no_boxes():
    case = Drawn(1)
    case.places, case.boxes = Places(*(x[:0] for x in case.places[:3]), case.places.size), case.boxes[:0]
    assert case.run().shape == (0, len(case.weight), *case.step.above)


@pytest.mark.parametrize(
    "field, value, error, message",
    [
        ("change", lambda c: c.change.half(), DtypeError, "change of torch.float16"),
        ("change", lambda c: c.change[0], DtypeError, "expected float32 or float64"),
        ("change", lambda c: c.change.double(), ShapeError, "expected the changes' torch.float64"),
        ("change", lambda c: c.change[:, :0], ShapeError, "expected none of 0"),
        ("patch", lambda c: (0, 3), ArgumentError, r"patch=\(0, 3\): expected at least 1"),
        ("boxes", lambda c: c.boxes[:, :3], ShapeError, "boxes of torch.int64"),
        ("boxes", lambda c: c.boxes.int(), ShapeError, "boxes of torch.int32"),
        ("boxes", lambda c: c.boxes.to("meta"), DeviceError, "boxes on meta"),
        ("weight", lambda c: c.weight[:, :, :2], ShapeError, "filters of"),
        ("clean", lambda c: c.clean[:, :, 1:], ShapeError, "clean of"),
        ("clean", lambda c: c.clean.double(), ShapeError, "clean of torch.float64"),
        ("clean", lambda c: c.clean[:0], ShapeError, "clean of"),
    ],
)
def test_refusals(field, value, error, message):
    case = next(c for c in map(Drawn, range(100)) if c.clean is not None and c.weight.size(2) == 3)
    setattr(case, field, value(case))
    with pytest.raises(error, match=message):
        case.run()


@pytest.mark.parametrize("field, value", [("image", 9), ("image", -1), ("origin", 99), ("origin", -1), ("origin", 2**62)])
def test_patches_that_are_in_no_picture_are_refused(field, value):
    case = Drawn(1)
    case.places = case.places._replace(**{field: torch.full_like(getattr(case.places, field), value)})
    with pytest.raises(ValueError, match="patch 0 is not inside its picture"):
        case.run()
