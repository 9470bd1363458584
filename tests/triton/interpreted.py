"""Checks of the Triton kernels in Triton's interpreter: python interpreted.py NAME, with TRITON_INTERPRET=1."""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from zfcore import occlusion, occlusion_map, reference, use_backend
from zfcore.errors import BackendUnavailable, DtypeError
from zfcore.kernels import conv_boxes as boxes_kernel
from zfcore.kernels import conv_delta as conv_kernel
from zfcore.kernels import conv_delta_depthwise as depthwise_kernel
from zfcore.kernels import lrn_delta as lrn_kernel
from zfcore.kernels import pointwise_delta as pointwise_kernel
from zfcore.kernels import pool_delta as pool_kernel
from zfcore.kernels import relu_delta as relu_kernel
from zfcore.ops import _library
from zfcore.ops.conv_boxes import conv_boxes
from zfcore.ops.conv_delta import conv_delta, delta_filters
from zfcore.ops.lrn_delta import lrn_delta
from zfcore.ops.paste_boxes import paste_boxes
from zfcore.ops.pointwise_delta import pointwise_delta
from zfcore.ops.pool_delta import pool_delta
from zfcore.ops.relu_delta import relu_delta
from zfcore.reference._params import ConvChange, Limits, Lrn, Places
from zfcore.reference.pointwise_delta import FUNCTIONS

TOLERANCE = 1e-5  # of float32, relative to the largest magnitude of the result


@dataclass
class Drawn:
    """A convolution of changes of some patches."""

    delta: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor | None
    clean: torch.Tensor | None
    step: ConvChange
    places: Places

    def expected(self) -> torch.Tensor:
        wide = [None if x is None else x.double() for x in (self.clean, self.scale)]
        return reference.conv_delta(self.delta.double(), self.weight.double(), self.step, self.places, *wide)

    def got(self, some: slice = slice(None), out=None) -> torch.Tensor:
        places = Places(*(x[some] for x in self.places[:3]), self.places.size)
        filters = delta_filters(self.weight, self.scale, groups=self.step.groups)
        return conv_delta(self.delta[some], filters, self.step, places, self.clean, out)


def draw(seed: int, groups: int = 0) -> Drawn:
    """groups: of one channel each, which every fourth time has two filters."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    channels, units = groups, groups * (2 if seed % 4 == 3 else 1)
    if not groups:
        groups = rng.choice([1, 1, 1, 2, 3])
        channels, units = groups * rng.choice([1, 2, 3, 5, 16, 20]), groups * rng.choice([1, 4, 7, 16, 33])
    window = tuple(tuple(rng.randint(*span) for _ in "yx") for span in ((1, 4), (1, 3), (0, 2), (1, 2)))
    kernel, stride, padding, dilation = window
    size = [rng.randint(8, 14) for _ in "yx"]
    if seed % 7 == 6 and channels != groups:  # a full layer
        groups, window = 1, (tuple(size), (1, 1), (0, 0), (1, 1))
        kernel, stride, padding, dilation = window
    above = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, *window)]
    batch, images = rng.randint(1, 4), 2
    patch = [rng.randint(1, n) for n in size]
    origin = torch.stack([torch.randint(0, n - m + 1, (batch,)) for n, m in zip(size, patch)], 1)
    out_origin, out_size = torch.zeros_like(origin), []
    for axis in (0, 1):
        k, s, p, d = (pair[axis] for pair in window)
        first = (-((d * (k - 1) - p - origin[:, axis]) // s)).clamp(0, above[axis] - 1)
        last = ((origin[:, axis] + patch[axis] - 1 + p) // s).clamp(max=above[axis] - 1)
        out_size.append(max(1, int((last - first).max()) + 1))
        out_origin[:, axis] = torch.minimum(first, torch.tensor(above[axis] - out_size[axis]))
    delta = torch.randn(batch, channels, *patch).relu() * (torch.rand(batch, channels, *patch) > 0.3)
    return Drawn(
        delta,
        torch.randn(units, channels // groups, *kernel),
        torch.randn(units) if seed % 2 else None,
        torch.randn(images, units, *above) if seed % 3 else None,
        ConvChange(
            window, groups, tuple(size), tuple(above), rng.choice([Limits(), Limits(0.1), Limits(0.0, 1.0)])
        ),
        Places(torch.randint(0, images, (batch,)), origin, out_origin, tuple(out_size)),
    )


def assert_close(got, expected, label, tolerance=TOLERANCE):
    error = (got - expected).abs().max() / expected.abs().max().clamp(1e-3)
    assert error < tolerance, (label, float(error))
    assert got.is_contiguous(memory_format=torch.channels_last), label


def drawn_convolutions():
    for seed in range(21):
        case = draw(seed)
        assert_close(case.got(), case.expected(), seed)


def each_channel_by_itself():
    """Depthwise filters, whose kernel is another; with two filters a channel it is conv_delta's."""
    launched = []
    own = depthwise_kernel.conv_delta_depthwise
    depthwise_kernel.conv_delta_depthwise = lambda *a: launched.append(1) or own(*a)
    for seed in range(60, 72):
        case = draw(seed, groups=random.Random(seed).choice([2, 5, 16, 40]))
        assert_close(case.got(), case.expected(), seed)
        assert bool(launched) == (seed % 4 != 3), seed
        launched.clear()
    case = draw(61, groups=5)
    whole, (_, _, height, width) = case.got(), case.got().shape
    depthwise_kernel.launches.__globals__["LARGEST"] = 1024 + 2 * height * width  # two patches a launch
    assert torch.equal(case.got(), whole)
    depthwise_kernel.launches.__globals__["LARGEST"] = 2**31 - 1
    case.delta[0] = torch.nan
    assert torch.equal(case.got().isnan(), case.expected().isnan())


def boxes():
    """What boxes cover, read in place: boxes cut at the edges of patches and of pictures, and places that are none."""
    for seed in range(14):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        case = draw(seed if seed % 7 != 6 else seed + 1)
        size, patch = case.step.map, tuple(case.delta.shape[2:])
        batch, images = len(case.delta), 2
        change = torch.randn(images, case.delta.size(1), *size)
        ends = []
        for axis in (0, 1):
            first = case.places.origin[:, axis] + torch.randint(-2, patch[axis], (batch,))
            ends.append((first, first + torch.randint(0, patch[axis] + 3, (batch,))))
        (y0, y1), (x0, x1) = ends
        covered = torch.stack((y0, x0, y1, x1), 1)
        if seed == 3:
            covered[0] = torch.tensor([-(2**63), -(2**63), 2**63 - 1, 2**63 - 1])
        precision = rng.choice(["exact", "tf32"])
        filters = delta_filters(case.weight, case.scale, groups=case.step.groups, precision=precision)
        wide = [None if x is None else x.double() for x in (case.clean, case.scale)]
        expected = reference.conv_boxes(
            change.double(), covered, patch, case.weight.double(), case.step, case.places, *wide
        )

        def got(change=change, places=case.places, covered=covered, filters=filters):
            return conv_boxes(change, covered, patch, filters, case.step, places, case.clean)

        whole = got()
        assert_close(whole, expected, seed)
        # The bits are conv_delta's of the same patches.
        with use_backend("cpu"):
            nothing = torch.zeros(()).expand(change.shape)
            delta = paste_boxes(nothing, change, covered, case.places._replace(size=patch))
        assert torch.equal(conv_delta(delta, filters, case.step, case.places, case.clean), whole), seed

        # What is under no box is not looked at.
        holes = torch.full_like(change, torch.nan)
        for b, (top, left, bottom, right) in enumerate(covered.clamp(-100, 100).tolist()):
            n = int(case.places.image[b])
            rows, columns = slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0))
            holes[n, :, rows, columns] = change[n, :, rows, columns]
        assert torch.equal(got(holes), whole), seed

        narrow = delta_filters(case.weight, case.scale, groups=case.step.groups, precision="bf16")
        with use_backend("reference"):
            expected = got(filters=narrow).double()
        assert_close(got(filters=narrow), expected, (seed, "bf16"))

    # A patch of no picture, or outside of its own, reads nothing: it changes nothing, or has no clean map to change.
    for name, bad in (("image", 2), ("image", -1), ("origin", 10**12), ("origin", -(10**12)), ("origin", -(2**63))):
        value = getattr(case.places, name).clone()
        value[0] = bad
        result = got(places=case.places._replace(**{name: value}))
        assert torch.equal(result[1:], whole[1:]), name
        if name == "image" and case.clean is not None:
            assert result[0].isnan().all()
        else:
            assert not result[0].any(), name
    empty = Places(*(x[:0] for x in case.places[:3]), case.places.size)
    assert got(places=empty, covered=covered[:0]).shape == (0, *whole.shape[1:])


def convolution_edges():
    # Bits do not depend on the batch, nor on how a launch is cut.
    case = next(c for c in map(draw, range(100, 200)) if len(c.delta) == 4 and c.clean is not None)
    whole = case.got()
    assert torch.equal(whole[2:3], case.got(slice(2, 3)))
    shape, kernel = whole.shape, case.step.window[0]
    least = max((case.delta.size(3) + kernel[1] * 2 + 1) * shape[1], 2048)  # refuses what does not fit
    largest, conv_kernel.LARGEST = conv_kernel.LARGEST, max(1024 + 2 * shape[2] * shape[3] * 2, least)
    assert torch.equal(whole, case.got())
    conv_kernel.LARGEST = largest

    # Results in memory with gaps; nothing else is written.
    memory = torch.full((shape[0], shape[2] + 1, shape[3] + 2, shape[1] + 3), -7.0)
    out = memory[:, : shape[2], : shape[3], : shape[1]].permute(0, 3, 1, 2)
    assert case.got(out=out) is out and torch.equal(out, whole)
    out.fill_(-7)
    assert (memory == -7).all()

    # Any layout of what is read.
    case.delta = case.delta.repeat_interleave(2, 3)[..., ::2]
    case.clean = case.clean.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(whole, case.got())

    # No patches; no number stays where it is.
    assert case.got(slice(0, 0)).shape == (0, *shape[1:])
    case.delta = case.delta.clone()
    case.delta[1] = torch.nan
    got = case.got()
    assert torch.equal(got[[0, 2, 3]], whole[[0, 2, 3]])
    assert torch.equal(got.isnan(), case.expected().isnan())

    # A place outside of the clean maps is not read, and gives no number.
    case.delta[1] = 0
    for name, bad in (("image", 9), ("image", -1), ("out_origin", 10**12), ("out_origin", -(10**12))):
        getattr(case.places, name)[1] = bad
        with use_backend("triton"):
            got = conv_kernel_of(case)
        assert got[1].isnan().all() and torch.equal(got[[0, 2, 3]], whole[[0, 2, 3]]), name
        getattr(case.places, name)[1] = 0

    # What the kernels cannot take is said.
    with_double = draw(3)
    try:
        delta_filters(with_double.weight.double(), None, groups=with_double.step.groups)
        raise AssertionError("float64 was taken")
    except DtypeError as error:
        assert "take float32" in str(error)
    with use_backend("cpu"):
        packed = delta_filters(with_double.weight, None, groups=with_double.step.groups)
    own = delta_filters(with_double.weight, None, groups=with_double.step.groups)
    results = [conv_delta(with_double.delta, f, with_double.step, with_double.places) for f in (packed, own)]
    assert torch.equal(*results), "filters that were made ready for the CPU"
    from zfcore.ops import unpool2d

    try:
        unpool2d(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 2)
        raise AssertionError("there is no such kernel")
    except BackendUnavailable as error:
        assert "no kernel for unpool2d" in str(error)


def conv_kernel_of(case: Drawn) -> torch.Tensor:
    """The kernel without the op, which looks at the places first where they are on the CPU."""
    filters = delta_filters(case.weight, case.scale, groups=case.step.groups)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (case.delta, case.clean)]
    out = torch.empty(len(case.delta), len(case.weight), *case.places.size).contiguous(
        memory_format=torch.channels_last
    )
    return conv_kernel.conv_delta(
        last[0], filters.packed, case.step.window, case.step.groups, *case.places[:3], out, last[1], *case.step.rectifier
    )


def full_layers():
    """Whole maps under filters as large: the library's product, where it is as exact as was asked."""
    multiplied, launched = [], []
    mm, launch = torch.mm, conv_kernel.conv_delta
    torch.mm = lambda *a, **k: multiplied.append(1) or mm(*a, **k)
    conv_kernel.conv_delta = lambda *a, **k: launched.append(1) or launch(*a, **k)
    for seed in range(6):
        torch.manual_seed(seed)
        size, channels, units, batch = ((1, 1), (3, 2))[seed % 2], 5, (4, 37)[seed % 2], 4
        zero, window = torch.zeros(batch, 2, dtype=torch.int64), (size, (1, 1), (0, 0), (1, 1))
        case = Drawn(
            torch.randn(batch, channels, *size),
            torch.randn(units, channels, *size),
            torch.randn(units) if seed < 3 else None,
            torch.randn(2, units, 1, 1) if seed % 3 else None,
            ConvChange(window, 1, size, (1, 1), Limits(0.0, 1.0)),
            Places(torch.randint(0, 2, (batch,)), zero, zero, (1, 1)),
        )
        memory = torch.full((batch, 1, 1, units + 3), -7.0)  # results with gaps
        out = memory[..., :units].permute(0, 3, 1, 2)
        assert case.got(out=out) is out
        assert_close(out.contiguous(memory_format=torch.channels_last), case.expected(), seed)
        assert (memory[..., units:] == -7).all() and multiplied and not launched
        multiplied.clear()
        for precision, flag in (("exact", "tf32"), ("tf32", "ieee")):
            matmul = torch.backends.cuda.matmul
            before, matmul.fp32_precision = matmul.fp32_precision, flag
            filters = delta_filters(case.weight, case.scale, precision=precision)
            got = conv_delta(case.delta, filters, case.step, case.places, case.clean)
            matmul.fp32_precision = before
            assert_close(got, case.expected(), (seed, precision))
            assert launched and not multiplied
            launched.clear()
    # A part of the map is none of the library's.
    case.delta, case.step = case.delta[:, :, :2], case.step._replace(map=(3, 2))
    assert_close(case.got(), case.expected(), "part")
    assert launched and not multiplied
    torch.mm, conv_kernel.conv_delta = mm, launch


def halves():
    """bf16 and f16 patches and filters: products in float32, one rounding of what is stored."""
    for seed, dtype in ((31, torch.bfloat16), (32, torch.bfloat16), (33, torch.float16), (34, torch.float16)):
        case = draw(seed)
        case.scale = None
        case.delta = case.delta.to(dtype).contiguous(memory_format=torch.channels_last)
        weight = case.weight.to(dtype)
        clean = case.clean
        case.weight = weight
        out = torch.empty(len(case.delta), len(weight), *case.places.size).contiguous(
            memory_format=torch.channels_last
        )
        if clean is not None:
            clean = clean.contiguous(memory_format=torch.channels_last)
        packed = weight.permute(0, 2, 3, 1).contiguous()
        conv_kernel.conv_delta(
            case.delta, packed, case.step.window, case.step.groups, *case.places[:3], out, clean, *case.step.rectifier
        )
        assert_close(out, case.expected(), (seed, dtype))


    for seed in (41, 43, 47):  # the op asked to round to bf16
        case = draw(seed)
        filters = delta_filters(case.weight, case.scale, groups=case.step.groups, precision="bf16")
        got = conv_delta(case.delta, filters, case.step, case.places, case.clean)
        with use_backend("reference"):
            expected = conv_delta(case.delta, filters, case.step, case.places, case.clean)
        assert_close(got, expected.double(), (seed, "bf16"))


def others():
    """pool_delta, lrn_delta and relu_delta."""
    for seed in range(12):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        channels, size = rng.choice([1, 3, 16, 17, 70]), [rng.randint(8, 13) for _ in "yx"]
        batch, images, patch = rng.randint(1, 3), 2, [rng.randint(1, n) for n in size]
        origin = torch.stack([torch.randint(0, n - m + 1, (batch,)) for n, m in zip(size, patch)], 1)
        image = torch.randint(0, images, (batch,))
        x = torch.randn(images, channels, *size)
        delta = torch.randn(batch, channels, *patch)
        if seed % 3 == 2:
            x[0, 0, 2, 3], delta[0, -1, 0, 0] = torch.nan, torch.nan
            x[1, 0, :4, :4] = -torch.inf
        wide, places = x.double(), Places(image, origin, origin, tuple(patch))

        rectifier = rng.choice([Limits(), Limits(0.1), Limits(0.0, 1.0)])
        expected = reference.relu_delta(delta.double(), wide, rectifier, places)
        agree(relu_delta(delta, x, rectifier, places), expected, (seed, "relu"))
        own = torch.empty(batch, *patch, channels).permute(0, 3, 1, 2).copy_(delta)
        agree(relu_delta(own, x, rectifier, places, own), expected, (seed, "relu in place"))

        lrn = Lrn(rng.choice([1, 4, 5]), 0.1, rng.choice([0.75, 0.5, 1.0]), 2.0)
        y = F.local_response_norm(x, *lrn)
        expected = reference.lrn_delta(delta.double(), wide, y.double(), lrn, places)
        agree(lrn_delta(delta, x, y, lrn, places), expected, (seed, "lrn"))

        window = rng.choice(
            [((3, 3), (2, 2), (0, 0), (1, 1)), ((2, 3), (2, 1), (1, 1), (1, 2)), ((3, 2), (1, 3), (1, 0), (2, 1))]
        )
        y = F.max_pool2d(x, *window)
        above = Places(image, origin, torch.zeros_like(origin), tuple(y.shape[2:]))
        expected = reference.pool_delta(delta.double(), wide, y.double(), window, above)
        agree(pool_delta(delta, x, y, window, above), expected, (seed, "pool"))
        part = Places(image, origin, torch.ones_like(origin), (y.size(2) - 1, y.size(3) - 1))
        for kernel in (pool_kernel, relu_kernel, lrn_kernel):  # cut into launches of one patch or two
            kernel.LARGEST = 1024 + 2 * part.size[0] * part.size[1]
        agree(pool_delta(delta, x, y, window, part), expected[:, :, 1:, 1:], (seed, "part of pool"))
        for kernel in (pool_kernel, relu_kernel, lrn_kernel):
            kernel.LARGEST = 2**31 - 1


def functions():
    """pointwise_delta, each function: drawn patches, values far out, values that are no numbers, places that are none."""
    for seed, name in enumerate(FUNCTIONS):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        function = (name, rng.choice([0.5, 1.0, 2.0]), rng.choice([1.0, 20.0]))
        channels, size = rng.choice([1, 3, 17, 70]), [rng.randint(8, 13) for _ in "yx"]
        batch, images, patch = 5, 2, [rng.randint(2, n) for n in size]
        origin = torch.stack([torch.randint(0, n - m + 1, (batch,)) for n, m in zip(size, patch)], 1)
        places = Places(torch.randint(0, images, (batch,)), origin, origin, tuple(patch))
        x, delta = torch.randn(images, channels, *size) * 2, torch.randn(batch, channels, *patch)
        if name == "sqrt":
            x, delta = x.abs(), delta.abs()
        delta[:, :, 0] = 0
        got = pointwise_delta(delta, x, function, places)
        agree(got, reference.pointwise_delta(delta.double(), x.double(), function, places), (name, "drawn"))
        assert not got[:, :, 0].any(), name
        own = torch.empty(batch, *patch, channels).permute(0, 3, 1, 2).copy_(delta)
        assert torch.equal(pointwise_delta(own, x, function, places, own), got), name

        pointwise_kernel.launches.__globals__["LARGEST"] = 1024 + 2 * patch[0] * patch[1]  # two patches a launch
        assert torch.equal(pointwise_delta(delta, x, function, places), got), name
        pointwise_kernel.launches.__globals__["LARGEST"] = 2**31 - 1

        for x, delta in ((x * 12, delta * 12), (x, delta)):
            x[0, 0, :4, :4], x[1, 0, 2:, 2:] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0]), -torch.inf
            delta[0, -1, 0, 0], delta[1, -1, 1, 1], delta[2, 0, 1, 1] = torch.nan, torch.inf, -torch.inf
            maps = (delta, x) if name == "exp" else (delta.double(), x.double())  # exp overflows as its type does
            expected = reference.pointwise_delta(*maps, function, places).double()
            agree(pointwise_delta(delta, x, function, places), expected, (name, "special"))

        beyond = places._replace(image=places.image.clone(), origin=places.origin.clone())
        beyond.image[0], beyond.origin[1, 0] = images, size[0] - 1
        with_holes = pointwise_kernel.pointwise_delta(
            delta.contiguous(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last),
            beyond.image, beyond.origin, torch.empty_like(own), *function,
        )  # fmt: skip
        assert with_holes[0].isnan().all() and with_holes[1, :, 1:].isnan().all(), name


def agree(got, expected, label):
    """No number where the reference gives none, and close elsewhere; infinities are the same."""
    assert torch.equal(got.isnan(), expected.isnan()), label
    assert torch.equal(got.isinf(), expected.isinf()) and torch.equal(got[got.isinf()].double(), expected[got.isinf()])
    finite = expected.isfinite()
    assert_close(got.where(finite, 0).contiguous(memory_format=torch.channels_last), expected.where(finite, 0), label)


def engine():
    """A small network's occlusion map: the engine's, which takes Triton where it has a kernel, and the reference's."""
    _library._BY_DEVICE["cpu"] = ("triton", "cpu")  # as for tensors on a GPU
    occlusion.pays = lambda precision, device: True
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, 2, padding=1),
        torch.nn.ReLU(),
        torch.nn.LocalResponseNorm(5),
        torch.nn.MaxPool2d(3, 2),
        torch.nn.Conv2d(8, 6, 3, padding=1, groups=2),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.Conv2d(6, 6, 3, padding=1, groups=6),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 7 * 7, 5),
    ).eval()
    images = torch.randn(1, 3, 33, 33)
    calls = []
    for module in (boxes_kernel, conv_kernel, depthwise_kernel):
        name = module.__name__.rsplit(".", 1)[1]
        launch = getattr(module, name)
        setattr(module, name, lambda *a, name=name, launch=launch, **k: calls.append(name) or launch(*a, **k))
    options = {"box": 9, "stride": 8, "feature": ("4", 1)}
    with use_backend("reference"):
        expected = occlusion_map(copy.deepcopy(model).double(), images.double(), **options)
    for precision, tolerance in (("exact", 1e-5), ("tf32", 2e-3), ("bf16", 2e-2)):
        got = occlusion_map(model, images, precision=precision, **options)
        assert set(calls) == {"conv_boxes", "conv_delta", "conv_delta_depthwise"}, calls
        calls.clear()
        for name in ("scores", "activation", "clean"):
            ours, wanted = getattr(got, name).double(), getattr(expected, name)
            assert (ours - wanted).abs().max() <= tolerance * wanted.abs().max(), (precision, name)
        assert torch.equal(got.labels, expected.labels)
        assert torch.equal(got.clean, occlusion_map(model, images, box=33, stride=33).clean)  # clean maps are exact
        calls.clear()


EVERY = drawn_convolutions, convolution_edges, each_channel_by_itself, boxes, full_layers, halves, others, functions, engine
CHECKS = {check.__name__: check for check in EVERY}

if __name__ == "__main__":
    check = CHECKS[sys.argv[1]]
    if check is engine:
        engine()
    else:
        with use_backend("triton"):
            check()
