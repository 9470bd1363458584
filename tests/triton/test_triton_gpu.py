"""The Triton kernels on a GPU, through zfcore.ops and the engine. Without one every test is skipped, and says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from zfcore import backends, occlusion_map, reference, use_backend
from zfcore.ops.conv_delta import conv_delta, delta_filters
from zfcore.ops.pool_delta import pool_delta
from zfcore.reference._params import ConvChange, Limits, Places

WHY = "" if torch.cuda.is_available() else "torch finds no usable CUDA device"
WHY = WHY or backends()["triton"].reason
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY), reason=WHY or "a GPU is here")]


def patches(channels, units, groups, window, seed, size=(27, 27), patch=(9, 11), batch=200):
    """On the CPU: changes, filters, clean outputs, the step and the places."""
    generator = torch.Generator().manual_seed(seed)
    kernel, stride, padding, dilation = window
    above = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, *window)]
    origin = torch.stack([torch.randint(0, n - m + 1, (batch,), generator=generator) for n, m in zip(size, patch)], 1)
    places = Places(torch.randint(0, 3, (batch,), generator=generator), origin, torch.zeros_like(origin), tuple(above))
    return (
        torch.randn(batch, channels, *patch, generator=generator),
        torch.randn(units, channels // groups, *kernel, generator=generator),
        torch.randn(3, units, *above, generator=generator),
        ConvChange(window, groups, size, tuple(above), Limits(0.1)),
        places,
    )


def on_gpu(places):
    return Places(*(x.cuda() for x in places[:3]), places.size)


GEOMETRIES = [
    (96, 256, 1, ((5, 5), (2, 2), (0, 0), (1, 1))),
    (3, 96, 1, ((7, 7), (2, 2), (1, 1), (1, 1))),
    (64, 96, 2, ((3, 3), (1, 1), (1, 1), (1, 1))),
    (20, 33, 1, ((3, 2), (1, 2), (1, 0), (2, 3))),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv_delta(geometry):
    delta, weight, clean, step, places = patches(*geometry, seed=0)
    expected = reference.conv_delta(delta.double(), weight.double(), step, places, clean.double())
    filters = delta_filters(weight.cuda(), None, groups=step.groups)
    assert filters.packed is not None
    got = conv_delta(delta.cuda(), filters, step, on_gpu(places), clean.cuda())
    assert (got.cpu() - expected).abs().max() < 1e-5 * expected.abs().max()
    for _ in range(50):  # the same bits every time, and for a part of the batch
        assert torch.equal(conv_delta(delta.cuda(), filters, step, on_gpu(places), clean.cuda()), got)
    part = Places(*(x[50:80] for x in on_gpu(places)[:3]), places.size)
    assert torch.equal(conv_delta(delta[50:80].cuda(), filters, step, part, clean.cuda()), got[50:80])


@pytest.mark.parametrize("precision, tolerance", [("tf32", 2e-3), ("bf16", 1e-5)])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv_delta_on_tensor_cores(geometry, precision, tolerance):
    """Products of bf16 are exact in float32; TF32 rounds its factors to 11 bits."""
    from zfcore.kernels.conv_delta import conv_delta as launch

    delta, weight, clean, step, places = patches(*geometry, seed=1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    delta, weight = delta.to(dtype), weight.to(dtype)
    expected = reference.conv_delta(delta.double(), weight.double(), step, places, clean.double())
    last = {"memory_format": torch.channels_last}
    out = torch.empty(expected.shape, device="cuda").contiguous(**last)
    packed = weight.cuda().permute(0, 2, 3, 1).contiguous()
    own = on_gpu(places)[:3]
    launch(
        delta.cuda().contiguous(**last), packed, step.window, step.groups, *own, out, clean.cuda().contiguous(**last),
        *step.rectifier, tf32=precision == "tf32",
    )  # fmt: skip
    assert (out.cpu() - expected).abs().max() < tolerance * expected.abs().max()


def test_pool_delta():
    window = ((3, 3), (2, 2), (1, 1), (1, 1))
    x = torch.randn(3, 96, 27, 27)
    y = F.max_pool2d(x, *window)
    delta, _, _, _, places = patches(96, 1, 1, window, seed=2)
    places = places._replace(size=tuple(y.shape[2:]))
    expected = reference.pool_delta(delta, x, y, window, places)
    got = pool_delta(delta.cuda(), x.cuda(), y.cuda(), window, on_gpu(places))
    assert torch.allclose(got.cpu(), expected, atol=1e-6)


def test_occlusion_map():
    """The engine on the GPU, and the CPU's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 5, 2, padding=1),
        torch.nn.ReLU(),
        torch.nn.LocalResponseNorm(5),
        torch.nn.MaxPool2d(3, 2),
        torch.nn.Conv2d(32, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(64 * 15 * 15, 10),
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    with use_backend("reference"):
        expected = occlusion_map(model.double(), images.double(), box=16, stride=8, feature=("4", None))
    got = occlusion_map(model.float().cuda(), images.cuda(), box=16, stride=8, feature=("4", None))
    for name in ("scores", "activation"):
        a, b = getattr(got, name).double().cpu(), getattr(expected, name)
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name
