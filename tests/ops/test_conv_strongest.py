"""conv_strongest against its definition in float64: drawn geometries, layouts, odd values, ties."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from running import present, running_on

from zfcore import reference
from zfcore.errors import ArgumentError, DtypeError, ShapeError, UnitNotFound
from zfcore.ops.conv_strongest import conv_strongest

NAN, INF = torch.nan, torch.inf
TOLERANCE = 1e-5
KERNELS = [name for name in present() if name.startswith("cpu")]


@pytest.fixture(params=KERNELS)
def kernel(request):
    with running_on(request.param):
        yield


@pytest.fixture(params=["reference", *KERNELS])
def backend(request):
    with running_on(request.param):
        yield


def draw(seed):
    """The arguments of a call, float32."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    units = choose.choice([1, 3, 8, 15, 16, 17, 24, 33, 48, 50, 64, 96])
    channels = choose.choice([1, 2, 3, 3, 3, 5, 64])
    kernel = choose.choice([1, 2, 3, 5, 7]), choose.choice([1, 2, 3, 4, 7])
    stride = choose.choice([1, 2, 4]), choose.choice([1, 2, 3, 9])
    dilation = choose.choice([1, 1, 2, 5]), choose.choice([1, 1, 3])
    padding = tuple(choose.randint(0, k + 1) for k in kernel)
    uneven = choose.choice([0, 0, 1]), choose.choice([0, 0, 1])  # more at the end, as padding="same" may have
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    height, width = (n + choose.choice([0, 1, 4, 19, 40]) for n in least)
    size = tuple(
        (n + 2 * p + more - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d, more in zip(
            (height, width), kernel, stride, padding, dilation, uneven, strict=True
        )
    )
    images = torch.randn(choose.choice([1, 1, 2, 5]), channels, height, width)
    weight = torch.randn(units, channels, *kernel)
    bias = choose.choice([None, torch.randn(units) * 4])
    chosen = choose.choice([torch.arange(units), torch.randint(0, units, (choose.randint(1, 40),))])
    return images, weight, bias, chosen, (kernel, stride, padding, dilation), size


def double(arguments):
    return tuple(
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
    )


def maps_of(arguments):
    """[N, U, Oh, Ow] float64, and by how much rounding may be off."""
    images, weight, bias, units, (kernel, stride, padding, dilation), size = double(arguments)
    seen = [(o - 1) * s + d * (k - 1) + 1 for o, k, s, d in zip(size, kernel, stride, dilation, strict=True)]
    height, width = images.shape[2:]
    (top, left), (down, right) = padding, (max(p, s) for p, s in zip(padding, seen, strict=True))
    padded = images.new_zeros((*images.shape[:2], height + top + down, width + left + right))
    padded[:, :, top : top + height, left : left + width] = images
    maps = F.conv2d(padded[:, :, : seen[0], : seen[1]], weight, bias, stride, 0, dilation)
    assert tuple(maps.shape[2:]) == tuple(size)
    return maps[:, units], TOLERANCE * maps.nan_to_num(0, 0, 0).abs().max()


def check(arguments):
    """The value is the largest, to rounding, and stands where the index says."""
    index, value = conv_strongest(*arguments)
    maps, room = maps_of(arguments)
    maps = maps.flatten(2)
    assert index.dtype == torch.int64 and value.dtype == torch.float32
    assert index.shape == value.shape == maps.shape[:2]
    assert (value - maps.amax(-1)).abs().max() <= room
    assert (value - maps.gather(-1, index.unsqueeze(-1)).squeeze(-1)).abs().max() <= room


@pytest.mark.parametrize("seeds", [range(i, i + 50) for i in range(0, 300, 50)], ids=lambda r: str(r.start))
def test_equals_the_definition(seeds, backend):
    for seed in seeds:
        check(draw(seed))


@pytest.mark.parametrize("seed", range(300, 330))
def test_the_bits_do_not_depend_on_threads_batch_or_layout(seed, threads, kernel):
    images, weight, bias, units, *rest = draw(seed)
    index, value = conv_strongest(images, weight, bias, units, *rest)

    def same(images, weight=weight, bias=bias, part=slice(None)):
        again = conv_strongest(images, weight, bias, units, *rest)
        return torch.equal(again[0], index[part]) and torch.equal(again[1], value[part])

    large = torch.full((len(images), images.size(1) + 1, images.size(2) * 2, images.size(3) * 3), NAN)
    large[:, 1:, ::2, 1::3] = images
    layouts = [
        images,
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        large[:, 1:, ::2, 1::3],
    ]
    for count in (1, 2, 3):
        threads(count)
        for layout in layouts:
            assert same(layout)
    assert same(images, weight.contiguous(memory_format=torch.channels_last))
    if bias is not None:
        assert same(images, bias=torch.stack((bias, bias), 1)[:, 0])
    assert same(images[-1:], part=slice(len(images) - 1, None))


def test_a_picture_as_of_the_first_layers_of_networks(threads, kernel):
    """Many bands, of more places than a tile is wide; the bits are those of one thread."""
    torch.manual_seed(0)
    threads(1)
    for kernel, stride, padding, units in ((7, 2, 1, 96), (11, 4, 2, 64), (3, 1, 1, 50)):
        conv = ((kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1))
        size = ((112 + 2 * padding - kernel) // stride + 1,) * 2
        weight, bias = torch.randn(units, 3, kernel, kernel), torch.randn(units)
        arguments = torch.randn(2, 3, 112, 112), weight, bias, torch.arange(units), conv, size
        check(arguments)
        one = conv_strongest(*arguments)
        threads(2)
        assert all(map(torch.equal, conv_strongest(*arguments), one))
        threads(1)


def plain(values, units=1):
    """The arguments of a call whose map of each unit is this picture."""
    picture = torch.tensor(values, dtype=torch.float32)[None, None]
    conv = ((1, 1), (1, 1), (0, 0), (1, 1))
    return picture, torch.ones(units, 1, 1, 1), None, torch.arange(units), conv, tuple(picture.shape[2:])


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ([1, 3, 3, 2], 1), ([NAN, 1, NAN, 2], 3), ([NAN] * 4, 0), ([NAN, -INF, -INF, NAN], 1),
        ([-0.0, 0.0, 0, 0], 0), ([-INF] * 4, 0), ([-5, INF, 7, INF], 1), ([NAN, NAN, NAN, -3], 3),
        ([-2, -1, -1, -2], 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 4)])
def test_ties_and_what_is_not_a_number(values, place, shape, backend):
    arguments = plain(torch.tensor(values).view(shape).tolist(), units=19)
    index, value = conv_strongest(*arguments)
    assert (index == place).all()
    assert torch.equal(value.nan_to_num(7), torch.full((1, 19), values[place]).nan_to_num(7))


def test_the_first_of_equals_in_raster_order_whatever_the_bands(threads, kernel):
    for count in (1, 2):
        threads(count)
        for first, second in ((70, 4000), (4000, 70), (3999, 4000), (127, 128), (0, 16383)):
            picture = torch.full((128 * 128,), -1.0)
            picture[[first, second]] = 2.0
            index, value = conv_strongest(*plain(picture.view(128, 128).tolist(), 3))
            assert (index == min(first, second)).all() and (value == 2).all()


@pytest.mark.parametrize("seed", range(330, 342))
@pytest.mark.parametrize("where", ["images", "weight", "bias"])
def test_nan_and_infinity_count_as_in_the_maps(seed, where, backend):
    arguments = list(draw(seed))
    arguments[2] = torch.zeros(len(arguments[1])) if arguments[2] is None else arguments[2]
    spoilt = arguments[["images", "weight", "bias"].index(where)].view(-1)
    for part, value in enumerate((NAN, INF, -INF)):
        spoilt[part * len(spoilt) // 3] = value
    index, value = conv_strongest(*arguments)
    maps, room = maps_of(arguments)
    wanted = reference.strongest(maps, torch.arange(maps.size(1)))
    there = maps.flatten(2).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(value.isnan(), there.isnan())
    odd = there.isinf()
    assert torch.equal(value[odd].double(), there[odd])
    assert torch.equal(index[~there.isfinite()], wanted[~there.isfinite()])
    fine = there.isfinite()
    assert ((value - there)[fine].abs() <= room).all()


def test_many_channels_keep_their_digits(backend):
    torch.manual_seed(0)
    conv = ((3, 3), (1, 1), (1, 1), (1, 1))
    images, weight = torch.rand(1, 1024, 7, 7), torch.rand(16, 1024, 3, 3)
    check((images, weight, None, torch.arange(16), conv, (7, 7)))


def test_autocast_and_gradients_change_nothing():
    images, weight, bias, units, *rest = draw(3)
    bias = torch.zeros(len(weight)) if bias is None else bias
    before = conv_strongest(images, weight, bias, units, *rest)
    parameters = [x.clone().requires_grad_() for x in (images, weight, bias)]
    with torch.autocast("cpu"):
        assert all(map(torch.equal, conv_strongest(*parameters, units, *rest), before))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 8, 8)], ids=["no image", "no unit"])
def test_nothing_to_do(shape):
    conv = ((3, 3), (1, 1), (0, 0), (1, 1))
    units = torch.arange(4 if shape[0] == 0 else 0)
    index, value = conv_strongest(torch.zeros(shape), torch.zeros(4, 3, 3, 3), None, units, conv, (6, 6))
    assert index.shape == value.shape == (shape[0], len(units))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(images=torch.zeros(3, 9, 9)), ShapeError, "expected \\[N, C, H, W\\]"),
        (dict(images=torch.zeros(1, 2, 9, 9)), ShapeError, "expected \\[N, C, H, W\\]"),
        (dict(images=torch.zeros(1, 3, 9, 9).double()), DtypeError, "expected float32"),
        (dict(weight=torch.zeros(4, 3, 3, 3).bfloat16()), DtypeError, "expected float32"),
        (dict(bias=torch.zeros(5)), ShapeError, r"expected \[4\]"),
        (dict(bias=torch.zeros(4).double()), DtypeError, "expected float32"),
        (dict(units=torch.tensor([0.0])), DtypeError, "expected float32 and int64"),
        (dict(units=torch.tensor([[0]])), ShapeError, r"expected \[U\]"),
        (dict(units=torch.tensor([4])), UnitNotFound, "units 4 to 4: expected 0 to 3"),
        (dict(units=torch.tensor([1, -1])), UnitNotFound, "units -1 to 1: expected 0 to 3"),
        (dict(conv=((3, 2), (1, 1), (0, 0), (1, 1))), ShapeError, "expected the weight's kernel"),
        (dict(conv=((3, 3), (1, 0), (0, 0), (1, 1))), ArgumentError, r"conv stride=\(1, 0\): expected at least 1"),
        (dict(conv=((3, 3), (1, 1), (0, -1), (1, 1))), ArgumentError, r"conv padding=\(0, -1\): expected at least 0"),
        (dict(conv=((3, 3), (1, 1), (0, 0), (1, 0))), ArgumentError, r"conv dilation=\(1, 0\): expected at least 1"),
        (dict(size=(0, 7)), ArgumentError, r"size=\(0, 7\): expected at least 1"),
        (dict(size=(7, 9)), ShapeError, "a size it gives"),
    ],
)  # fmt: skip
def test_refusals(change, error, words):
    arguments = dict(
        images=torch.zeros(1, 3, 9, 9), weight=torch.zeros(4, 3, 3, 3), bias=None, units=torch.arange(4),
        conv=((3, 3), (1, 1), (0, 0), (1, 1)), size=(7, 7),
    )  # fmt: skip
    conv_strongest(**arguments)
    with pytest.raises(error, match=words):
        conv_strongest(**{**arguments, **change})
