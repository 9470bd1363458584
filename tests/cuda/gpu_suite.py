"""Every kernel of a GPU on small inputs, each answer checked: what compute-sanitizer watches.

    python gpu_suite.py [--device cuda|cpu] [--far]

Inputs are made and answers are checked on the CPU, so that the GPU runs little but the kernels. On "cpu" the same calls
run the CPU's kernels, which shows that the suite is right. An op that would fall back to the reference has failed.
--far: also maps whose values lie 2**31 elements apart, in 4 GiB.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

import oracle  # noqa: E402
import samples  # noqa: E402
import torch  # noqa: E402
from steps import close as step_is_close  # noqa: E402
from steps import draw  # noqa: E402
from zfcore import ops, reference, use_backend  # noqa: E402
from zfcore.ops.conv_boxes import conv_boxes  # noqa: E402
from zfcore.ops.conv_delta import PRECISIONS, conv_delta, delta_filters  # noqa: E402
from zfcore.ops.deconv_step import deconv_step  # noqa: E402
from zfcore.ops.lrn_delta import lrn_delta  # noqa: E402
from zfcore.ops.paste_boxes import paste_boxes  # noqa: E402
from zfcore.ops.pointwise_delta import pointwise_delta  # noqa: E402
from zfcore.ops.pool_delta import pool_delta  # noqa: E402
from zfcore.ops.relu_delta import relu_delta  # noqa: E402
from zfcore.reference._params import ConvChange, Limits, Lrn, Places, StepParams  # noqa: E402
from zfcore.reference.pointwise_delta import FUNCTIONS  # noqa: E402

# Shapes that reach each way of laying threads out: 16 bytes of channels at once, four planes, and one value a thread.
SHAPES = ((2, 16, 13, 13), (1, 12, 9, 8), (3, 5, 9, 7))
POOLS = ((3, 2, 0), (3, 2, 1), (2, 2, 0), ((3, 2), (1, 3), (1, 0)), (2, 1, 0, 2))
LAYOUTS = ("contiguous", "channels_last", "sliced")
FAR = 2**31 + 8  # elements
TOLERANCE = 1e-5  # of float32, relative to the largest magnitude
TOLERANCES = {"exact": TOLERANCE, "tf32": 2e-3, "bf16": 2e-2}  # of products
LAST = {"memory_format": torch.channels_last}


class Wrong(AssertionError):
    """A kernel's answer is not the reference's."""


def same(what: str, ours: torch.Tensor, wanted: torch.Tensor) -> None:
    if not oracle.same(ours.cpu(), wanted):
        raise Wrong(f"{what}: not the reference's bits")


def close(what: str, ours: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """wanted: in float64."""
    error = (ours.cpu().double() - wanted).abs().max() / wanted.abs().max()
    if not error <= tolerance:  # NaN is not
        raise Wrong(f"{what}: relative error {error:.1e}, expected at most {tolerance:.0e}")


def pooling(device: torch.device) -> Iterator[str]:
    """Pooling with switches, unpooling with and without ReLU, and their transpose, in every dtype and variant."""
    for dtype, layout, pool, shape in itertools.product(samples.DTYPES, LAYOUTS, POOLS, SHAPES):
        x = samples.draw(shape, dtype, "special", torch.Generator().manual_seed(0))
        y, switches = reference.max_pool2d_with_switches(x, *pool)
        size = tuple(shape[2:])
        what = f"{pool} {dtype} {layout} {shape}"
        own = samples.lay_out(x.to(device), layout)
        own_y, own_switches = ops.max_pool2d_with_switches(own, *pool)
        same(f"max_pool2d_with_switches {what}", own_y, y)
        same(f"max_pool2d_with_switches {what}: switches", own_switches, switches)
        for name, overlap in itertools.product(("unpool2d", "unpool_relu2d"), ("sum", "last")):
            ours = getattr(ops, name)(own_y, own_switches, *pool, output_size=size, overlap=overlap)
            wanted = getattr(reference, name)(y, switches, *pool, output_size=size, overlap=overlap)
            same(f"{name} {what} {overlap}", ours, wanted)
        for overlap in ("sum", "last"):
            ours = ops.pool_gather2d(own, own_switches, *pool, overlap=overlap)
            wanted = reference.pool_gather2d(x, switches, *pool, overlap=overlap)
            same(f"pool_gather2d {what} {overlap}", ours, wanted)
        yield what


def pooling_on_triton(device: torch.device) -> Iterator[str]:
    """The Triton kernel of pooling with switches: few cases, since each window, dtype and layout is compiled first."""
    for dtype, layout, pool in itertools.product((torch.float32, torch.bfloat16), LAYOUTS[:2], ((3, 2, 1), ((5, 4), 2))):
        x = samples.draw(SHAPES[0], dtype, "special", torch.Generator().manual_seed(0))
        own = samples.lay_out(x.to(device), layout)
        with use_backend("triton") if device.type == "cuda" else contextlib.nullcontext():
            ours = ops.max_pool2d_with_switches(own, *pool)
        what = f"max_pool2d_with_switches {pool} {dtype} {layout}"
        for part, wanted in zip(ours, reference.max_pool2d_with_switches(x, *pool), strict=True):
            same(f"{what}: {part.dtype}", part, wanted)
        yield what


def bad_switches(device: torch.device) -> Iterator[str]:
    """Switches of any byte: a GPU's kernels leave the bad ones out, and touch nothing outside."""
    if device.type == "cpu":
        return  # there they raise, as the op tests show
    switches = torch.randint(0, 256, (2, 8, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    for layout in LAYOUTS:
        own = samples.lay_out(y.to(device), layout)
        out = ops.unpool2d(own, samples.lay_out(switches.to(device), layout), 3, 2, output_size=(13, 13))
        named = torch.where(switches < 9, y.double(), 0.0).sum((2, 3))
        if not torch.allclose(out.cpu().double().sum((2, 3)), named, atol=1e-4):
            raise Wrong(f"unpool2d of any byte, {layout}: a bad switch left something")
        yield layout


def far(device: torch.device) -> Iterator[str]:
    """Values 2**31 elements apart: the variants with offsets of 64 bits."""
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    y, switches = ops.max_pool2d_with_switches(x, 2)
    for axis in range(4):
        strides = list(x.stride())
        strides[axis] = -(-FAR // (x.size(axis) - 1))
        memory = torch.empty(FAR + 2 * x.numel() * x.size(axis), dtype=x.dtype, device=device)
        apart = memory.as_strided(x.shape, strides).copy_(x)
        for ours, wanted in zip(ops.max_pool2d_with_switches(apart, 2), (y, switches), strict=True):
            same(f"max_pool2d_with_switches, axis {axis} far apart", ours, wanted.cpu())
        same(f"pool_gather2d, axis {axis} far apart", ops.pool_gather2d(apart, switches, 2), y.cpu())
        del memory, apart
        yield f"axis {axis}"


def boxes(device: torch.device) -> Iterator[str]:
    """paste_boxes, boxes reaching past patches and pictures."""
    for dtype, layout, channels in itertools.product((torch.float32, torch.float64), LAYOUTS, (1, 3, 4)):
        generator = torch.Generator().manual_seed(channels)
        images = torch.randn((2, channels, 19, 23), generator=generator).to(dtype)
        fill = torch.randn((1, channels, 1, 1), generator=generator).to(dtype).expand(images.shape)
        patch, count = (7, 10), 9
        origin = torch.stack([torch.randint(0, n - m + 1, (count,), generator=generator) for n, m in zip((19, 23), patch)], 1)
        first = origin + torch.randint(-3, 5, (count, 2), generator=generator)
        box = torch.cat((first, first + torch.randint(0, 9, (count, 2), generator=generator)), 1)
        image = torch.randint(0, 2, (count,), generator=generator)
        wanted = reference.paste_boxes(images, fill, box, Places(image, origin, origin, patch))
        image, origin, box = (x.to(device) for x in (image, origin, box))
        own = samples.lay_out(images.to(device), layout)
        fill = fill[:, :, :1, :1].to(device).expand(images.shape)
        same(f"paste_boxes {dtype} {layout}", paste_boxes(own, fill, box, Places(image, origin, origin, patch)), wanted)
        yield f"{dtype} {layout} {channels}"


def patches(size, patch, window, batch, seed):
    """Places of patches of a map whose results lie in the map that `window` makes of it, all inside."""
    generator = torch.Generator().manual_seed(seed)
    above = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, *window))
    origin = torch.stack([torch.randint(0, n - m + 1, (batch,), generator=generator) for n, m in zip(size, patch)], 1)
    return Places(torch.randint(0, 3, (batch,), generator=generator), origin, torch.zeros_like(origin), above)


def moved(places: Places, device: torch.device) -> Places:
    return Places(*(x.to(device) for x in places[:3]), places.size)


# channels, filters, groups, (kernel, stride, padding, dilation), map, patch
PRODUCTS = (
    (3, 33, 1, ((7, 7), (2, 2), (1, 1), (1, 1)), (17, 19), (9, 11)),
    (16, 40, 1, ((3, 3), (1, 1), (1, 1), (1, 1)), (9, 8), (3, 4)),
    (20, 33, 1, ((3, 2), (1, 2), (1, 0), (2, 3)), (13, 15), (5, 7)),
    (24, 48, 2, ((3, 3), (1, 1), (1, 1), (1, 1)), (7, 7), (3, 3)),
    (12, 12, 12, ((3, 3), (1, 1), (1, 1), (1, 1)), (7, 7), (3, 3)),
    (32, 70, 1, ((5, 6), (1, 1), (0, 0), (1, 1)), (5, 6), (5, 6)),  # a full layer
)


def products(device: torch.device) -> Iterator[str]:
    """conv_delta in every precision, with and without a rectifier."""
    for seed, (channels, units, groups, window, size, patch) in enumerate(PRODUCTS):
        places = patches(size, patch, window, 11, seed)
        generator = torch.Generator().manual_seed(seed)
        delta = torch.randn((11, channels, *patch), generator=generator)
        weight = torch.randn((units, channels // groups, *window[0]), generator=generator)
        clean = torch.randn((3, units, *places.size), generator=generator)
        step = ConvChange(window, groups, size, places.size, Limits(0.1))
        for precision, rectified in itertools.product(PRECISIONS, (False, True)):
            z = clean if rectified else None
            own_z = clean.to(device) if rectified else None
            wanted = reference.conv_delta(
                delta.double(), weight.double(), step, places, None if z is None else z.double()
            )
            filters = delta_filters(weight.to(device), None, groups=groups, precision=precision)
            ours = conv_delta(delta.to(device), filters, step, moved(places, device), own_z)
            what = f"conv_delta {channels} to {units} in {groups}, {window}, {precision}, rectified={rectified}"
            close(what, ours, wanted, TOLERANCES[precision])
            yield what


def first_products(device: torch.device) -> Iterator[str]:
    """conv_boxes in every precision: boxes clipped, and reaching past their patches."""
    window, size, patch = ((7, 7), (2, 2), (1, 1), (1, 1)), (19, 23), (9, 10)
    for channels, precision in itertools.product((1, 3, 4), PRECISIONS):
        generator = torch.Generator().manual_seed(channels)
        change = torch.randn((3, channels, *size), generator=generator)
        weight = torch.randn((33, channels, 7, 7), generator=generator)
        places = patches(size, patch, window, 9, channels)
        clean = torch.randn((3, 33, *places.size), generator=generator)
        first = places.origin + torch.randint(-3, 5, (9, 2), generator=generator)
        box = torch.cat((first, first + torch.randint(0, 9, (9, 2), generator=generator)), 1)
        step = ConvChange(window, 1, size, places.size, Limits())
        nothing = torch.zeros_like(change)
        delta = reference.paste_boxes(nothing, change, box, places._replace(size=patch))
        wanted = reference.conv_delta(delta.double(), weight.double(), step, places, clean.double())
        filters = delta_filters(weight.to(device), None, precision=precision)
        own = (moved(places, device), clean.to(device))
        ours = conv_boxes(change.to(device), box.to(device), patch, filters, step, *own)
        what = f"conv_boxes of {channels}, {precision}"
        close(what, ours, wanted, TOLERANCES[precision])
        yield what


def changes(device: torch.device) -> Iterator[str]:
    """pool_delta, lrn_delta, relu_delta and pointwise_delta, few and many channels."""
    window = ((3, 3), (2, 2), (1, 1), (1, 1))
    same_size = ((1, 1), (1, 1), (0, 0), (1, 1))
    for channels in (5, 40):
        generator = torch.Generator().manual_seed(channels)
        x = torch.randn((3, channels, 13, 11), generator=generator)
        delta = torch.randn((9, channels, 5, 4), generator=generator)
        own_x, own_delta = x.to(device), delta.to(device)
        y = torch.nn.functional.max_pool2d(x, *window)
        places = patches((13, 11), (5, 4), window, 9, channels)
        wanted = reference.pool_delta(delta.double(), x.double(), y.double(), window, places)
        close("pool_delta", pool_delta(own_delta, own_x, y.to(device), window, moved(places, device)), wanted)
        places = patches((13, 11), (5, 4), same_size, 9, channels)
        places = Places(places.image, places.origin, places.origin, (5, 4))
        for lrn in (Lrn(5, 1e-2, 0.75, 2.0), Lrn(4, 1e-2, 0.5, 1.0)):
            after = torch.nn.functional.local_response_norm(x, *lrn)
            wanted = reference.lrn_delta(delta.double(), x.double(), after.double(), lrn, places)
            ours = lrn_delta(own_delta, own_x, after.to(device), lrn, moved(places, device))
            close(f"lrn_delta {lrn}", ours, wanted)
        for limits in (Limits(), Limits(0.1, 1.0)):
            wanted = reference.relu_delta(delta.double(), x.double(), limits, places)
            close(f"relu_delta {limits}", relu_delta(own_delta, own_x, limits, moved(places, device)), wanted)
        for name in FUNCTIONS:
            function = (name, 1.0, 20.0)
            maps = (delta.abs(), x.abs()) if name == "sqrt" else (delta, x)
            wanted = reference.pointwise_delta(*(m.double() for m in maps), function, places)
            ours = pointwise_delta(*(m.to(device) for m in maps), function, moved(places, device))
            close(f"pointwise_delta {name}", ours, wanted)
        yield f"{channels} channels"


# channels above and below, signal, map, unpooled by 3 x 3 windows of stride 2, convolution, map below
STEPS = (
    (32, 24, 3, 13, False, ((3, 3), (1, 1), (1, 1), (1, 1)), 13),
    (16, 3, 5, 11, True, ((7, 7), (2, 2), (1, 1), (1, 1)), 25),
    (32, 20, 4, 11, True, ((5, 5), (2, 2), (0, 0), (1, 1)), 25),
)


def steps(device: torch.device) -> Iterator[str]:
    """deconv_step: into many channels and into the few of a picture, with and without unpooling."""
    pool = ((3, 3), (2, 2), (1, 1), (1, 1))
    for seed, (above, below, patch, size, pooled, conv, below_size) in enumerate(STEPS):
        generator = torch.Generator().manual_seed(seed)
        signal = torch.randn((9, above, patch, patch), generator=generator)
        weight = torch.randn((above, below, *conv[0]), generator=generator)
        switches = None
        if pooled:
            _, switches = reference.max_pool2d_with_switches(torch.randn((2, above, size, size), generator=generator), 3, 2, 1)
        image = torch.randint(0, 2, (9,), generator=generator)
        origin = torch.randint(-2, 4, (9, 2), generator=generator)
        step = StepParams(pool if pooled else None, conv, 1, (size,) * 2, (below_size,) * 2, False, True, "sum")
        wanted = reference.deconv_step(signal.double(), weight.double(), step, image, origin, switches)
        own = (x.to(device) for x in (signal.contiguous(**LAST), weight))
        own_switches = None if switches is None else switches.to(device)
        ours = deconv_step(*own, step, image.to(device), origin.to(device), own_switches)
        close(f"deconv_step {above} to {below}", ours, wanted)
        yield f"{above} to {below}"


def drawn_steps(device: torch.device) -> Iterator[str]:
    """deconv_step to pictures: every dtype, frames, whole maps, both overlaps, dilation, filters that are not finite."""
    done = 0
    for seed in range(100):
        sample = draw(seed).part(slice(0, 3))
        if sample.weight.size(1) > 4 or sample.step.groups > 1:
            continue
        if done % 4 == 3:
            sample.weight[0, 0, 0, 0] = torch.inf
        wanted = sample.run(reference.deconv_step, torch.float64)
        step_is_close(sample.to(device).run().cpu(), wanted, sample.signal.dtype, what=seed)
        yield f"drawn with seed {seed}"
        done += 1
        if done == 16:
            return


GROUPS = (pooling, pooling_on_triton, bad_switches, boxes, first_products, products, changes, steps, drawn_steps)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--far", action="store_true")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    warnings.filterwarnings("error", r"zfcore\.\w+ runs on the reference", RuntimeWarning)
    failed = []
    for group in (*GROUPS, *([far] if options.far else [])):
        try:
            count = sum(1 for _ in group(device))
        except Exception:  # told, and the other groups have their turn: each may show what is wrong
            traceback.print_exc()
            failed.append(group.__name__)
        else:
            print(f"{group.__name__}: {count} cases", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "every answer is the reference's")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
