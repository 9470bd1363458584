"""Projections equal those of a deconvnet in float64 that works on whole maps and shares no code with the library."""

import warnings

import pytest
import torch
from deconvnet_networks import NETWORKS, Controlled, make
from deconvnet_oracle import crop as crop_whole
from deconvnet_oracle import project

import zfcore

TOLERANCE = 1e-5  # of the largest magnitude
UNITS = [3, 0]
CASES = [(name, layer) for name, (_, _, layers) in NETWORKS.items() for layer in layers]


def close(found, expected):
    assert found.shape == expected.shape
    scale = expected.abs().max().clamp(min=1e-30)
    assert (found.double() - expected).abs().max() <= TOLERANCE * scale


def projected(model, images, layer, units, **options):
    """By the engine: strict."""
    return zfcore.deconv_project(model, images, layer, units, strict=True, **options)


def corners(model, images, layer, units):
    """Positions [N, U, 2] of the map's first and last row and column, in turn, as seeds at its border."""
    with torch.no_grad():
        found = projected(model, images, layer, units)
        outputs = []
        handle = model.get_submodule(layer).register_forward_hook(lambda m, a, out: outputs.append(out.shape))
        model(images)
        handle.remove()
    height, width = (*outputs[-1], 1, 1)[2:4]
    n, u = found.activations.shape
    at = [(0, 0), (height - 1, width - 1), (0, width - 1), (height - 1, 0)]
    return torch.tensor([at[i % 4] for i in range(n * u)]).reshape(n, u, 2)


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_every_layer_whole_and_cropped(name, layer):
    model, images = make(name)
    found = projected(model, images, layer, UNITS)
    pixels, activations = project(model, images, layer, UNITS, found.positions)
    close(found.pixels, pixels)
    close(found.activations, activations)
    cropped = projected(model, images, layer, UNITS, crop=True)
    close(cropped.pixels, crop_whole(pixels, cropped.boxes))
    # Pasted back, nothing is missing: what lies outside the boxes is zero.
    back = torch.zeros(*pixels.shape[:3], pixels.shape[3] + 400, pixels.shape[4] + 400, dtype=torch.float64)
    for n in range(len(images)):
        for u in range(len(UNITS)):
            y0, x0, y1, x1 = (cropped.boxes[n, u] + 200).tolist()
            back[n, u, :, y0:y1, x0:x1] = cropped.pixels[n, u]
    close(back[..., 200:-200, 200:-200], pixels)


@pytest.mark.parametrize(("name", "layer"), CASES[::4])
def test_seeds_at_the_border(name, layer):
    model, images = make(name)
    positions = corners(model, images, layer, UNITS)
    found = projected(model, images, layer, UNITS, positions=positions)
    pixels, activations = project(model, images, layer, UNITS, positions)
    assert torch.equal(found.positions, positions)
    close(found.pixels, pixels)
    close(found.activations, activations)
    cropped = projected(model, images, layer, UNITS, positions=positions, crop=True)
    close(cropped.pixels, crop_whole(pixels, cropped.boxes))


@pytest.mark.parametrize("seed", ["activation", "one"])
@pytest.mark.parametrize(("name", "layer"), CASES[1::4])
def test_whole_maps_as_seeds(name, layer, seed):
    model, images = make(name)
    found = projected(model, images, layer, UNITS, positions="all", seed=seed)
    pixels, activations = project(model, images, layer, UNITS, "all", seed=seed)
    close(found.pixels, pixels)
    close(found.activations, activations)
    assert (found.positions == -1).all()


@pytest.mark.parametrize("rule", ["guided", "gradient"])
@pytest.mark.parametrize(
    ("name", "layer"),
    [*CASES[2::5], ("efficientnet", "head"), ("shufflenet", "conv"), ("densenet", "norm"), ("products", "joined")],
)
def test_rules(name, layer, rule):
    model, images = make(name)
    found = projected(model, images, layer, UNITS, rule=rule, seed="one")
    close(found.pixels, project(model, images, layer, UNITS, found.positions, rule=rule, seed="one")[0])


@pytest.mark.parametrize(("rule", "positions"), [("deconvnet", "max"), ("deconvnet", "all"), ("guided", "max")])
@pytest.mark.parametrize(
    ("name", "layer"),
    [("overlapping", "pool3"), ("overlapping", "conv3"), ("alexnet", "pool4"), ("alexnet", "fc5"), ("resnet", "layer2"),
     ("googlenet", "b")],
)  # fmt: skip
def test_overlapping_windows_that_keep_the_last(name, layer, rule, positions):
    model, images = make(name)
    found = projected(model, images, layer, UNITS, positions=positions, rule=rule, overlap="last")
    at = found.positions if positions == "max" else "all"
    pixels, _ = project(model, images, layer, UNITS, at, rule=rule, overlap="last")
    close(found.pixels, pixels)


@pytest.mark.parametrize(
    ("rule", "overlap"), [("deconvnet", "sum"), ("deconvnet", "last"), ("guided", "sum"), ("gradient", "last")]
)
@pytest.mark.parametrize(
    ("name", "layer"),
    [("vgg", "0.10"), ("alexnet", "pool4"), ("resnet", "layer2.1.relu"), ("googlenet", "b"), ("mobilenet", "wide"),
     ("overlapping", "pool3"), ("efficientnet", "b"), ("shufflenet", "conv"), ("densenet", "norm"),
     ("products", "joined")],
)  # fmt: skip
def test_the_dense_path_is_the_engine(name, layer, rule, overlap):
    model, images = make(name)
    options = dict(rule=rule, overlap=overlap)
    found = projected(model, images, layer, UNITS, **options)
    with pytest.warns(UserWarning, match="cannot be traced|dense path"):
        dense = zfcore.deconv_project(Controlled(model).eval(), images, f"net.{layer}", UNITS, **options)
    assert dense.path == "dense" and dense.reason and found.path == "engine" and not found.reason
    assert torch.equal(dense.positions, found.positions)
    close(dense.pixels, project(model, images, layer, UNITS, found.positions, **options)[0])
    close(dense.pixels, found.pixels.double())
    assert torch.equal(dense.boxes[0, 0], torch.tensor([0, 0, *images.shape[2:]]))


@pytest.mark.parametrize("positions", ["max", "all"])
@pytest.mark.parametrize(
    ("name", "layer"),
    [("vgg", "0.7"), ("alexnet", "conv4"), ("resnet", "layer2"), ("vgg", "5"), ("efficientnet", "c"), ("shufflenet", "unit"),
     ("products", "joined")],
)  # fmt: skip
def test_any_batch_size_gives_the_same(name, layer, positions):
    model, images = make(name)
    whole = projected(model, images, layer, range(4), positions=positions)
    for batch_size in (1, 3, 1000):
        found = projected(model, images, layer, range(4), positions=positions, batch_size=batch_size)
        close(found.pixels, whole.pixels.double())
        assert torch.equal(found.units, whole.units) and torch.equal(found.images, whole.images)
        parts = list(
            zfcore.iter_projections(
                model, images, layer, range(4), positions=positions, batch_size=batch_size, strict=True
            )
        )
        assert max(len(part.pixels) for part in parts) <= batch_size
        assert torch.equal(torch.cat([part.pixels for part in parts]), found.pixels.flatten(0, 1))
        assert torch.equal(torch.cat([part.boxes for part in parts]), found.boxes.flatten(0, 1))


def test_a_reused_relu_by_its_call():
    model, images = make("resnet")
    for call in (0, 1):
        layer = "layer2.0.relu"
        found = projected(model, images, f"{layer}@{call}", UNITS)
        assert found.layer == f"{layer}@{call}"
        close(found.pixels, project(model, images, layer, UNITS, found.positions, call=call)[0])
        dense = dense_projected(Controlled(model).eval(), images, f"net.{layer}@{call}")
        close(dense.pixels, found.pixels.double())


def dense_projected(model, images, layer, units=UNITS, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = zfcore.deconv_project(model, images, layer, units, **options)
    assert found.path == "dense"
    return found


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.15), (torch.float16, 0.02)]
)
@pytest.mark.parametrize(
    ("name", "layer"),
    [("vgg", "0.10"), ("resnet", "layer2.0.conv2"), ("googlenet", "reduce_conv"), ("efficientnet", "b"),
     ("shufflenet", "conv"), ("densenet", "norm"), ("products", "masked")],
)  # fmt: skip
def test_other_dtypes(name, layer, dtype, tolerance):
    model, images = make(name, dtype)
    found = projected(model, images.float(), layer, UNITS, seed="one")
    assert found.pixels.dtype == dtype
    pixels, _ = project(model, images.float().to(dtype), layer, UNITS, found.positions, seed="one")
    error = (found.pixels.double() - pixels).norm() / pixels.norm()  # a switch that rounding turned moves a pixel
    assert error <= tolerance if dtype == torch.float64 else error <= 4 * tolerance


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_any_layout(layout):
    model, images = make("alexnet")
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        images = torch.stack([images, images], -1)[..., 0]
    else:
        images = images[:1].expand(2, -1, -1, -1)
    close(projected(model, images, "pool2", UNITS).pixels, projected(model, images.contiguous(), "pool2", UNITS).pixels.double())


@pytest.mark.parametrize("overlap", ["sum", "last"])
@pytest.mark.parametrize("layer", ["pool1", "conv3", "pool5", "fc8"])
def test_the_shipped_small_network(layer, overlap):
    from zfcore.models import zfnet_small

    model, images = zfnet_small(num_classes=10).eval(), torch.randn(2, 1, 28, 28)
    found = projected(model, images, layer, UNITS, overlap=overlap)
    pixels, _ = project(model, images, layer, UNITS, found.positions, overlap=overlap)
    close(found.pixels, pixels)
    dense = dense_projected(Controlled(model).eval(), images, f"net.{layer}", overlap=overlap)
    close(dense.pixels, pixels)


def test_zfnet_sees_139_pixels():
    from zfcore.models import ZFNet

    model, images = ZFNet(num_classes=10).eval(), torch.randn(1, 3, 224, 224)
    sizes = {"conv1": 7, "pool1": 11, "conv2": 27, "pool2": 43, "conv3": 75, "conv4": 107, "conv5": 139}
    for layer, side in sizes.items():
        found = projected(model, images, layer, 5, crop=True, seed="one")
        assert found.pixels.shape == (1, 1, 3, side, side)
    # Of seed one: new weights give activations of 1e-5, whose own rounding is no matter of the way down.
    pixels, _ = project(model, images, "conv5", [5], found.positions, seed="one")
    close(found.pixels, crop_whole(pixels, found.boxes))


def test_alexnet():
    from zfcore.models import alexnet

    model, images = alexnet(num_classes=10).eval(), torch.randn(1, 3, 224, 224)
    layer = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)][-1]
    found = projected(model, images, layer, 5, seed="one")
    close(found.pixels, project(model, images, layer, [5], found.positions, seed="one")[0])


def test_captum_where_it_is_right():
    """Modules with ReLUs of their own and pools that do not overlap are what Captum's hooks reach."""
    attr = pytest.importorskip("captum.attr", reason="Captum is not installed")
    model, images = make("vgg")
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False  # Captum's hooks break on in-place ReLUs
    for method, rule in ((attr.NeuronDeconvolution, "deconvnet"), (attr.NeuronGuidedBackprop, "guided")):
        found = projected(model, images, "0.10", [2], rule=rule)
        one = projected(model, images, "0.10", [2], rule=rule, seed="one")
        # Captum takes one neuron for all images. Its hooks rectify at every ReLU below the layer, as here.
        for n in range(len(images)):
            neuron = (2, *found.positions[n, 0].tolist())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of the hooks it sets
                theirs = method(model, model.get_submodule("0.10")).attribute(images[n : n + 1].clone(), neuron)
            close(one.pixels[n, 0], theirs[0].detach().double())
            close(found.pixels[n, 0], (theirs[0] * found.activations[n, 0]).detach().double())
