"""The networks: the paper's sizes, parameter counts, initial weights, tracing."""

import copy
import pickle

import pytest
import torch
from torch import nn

from zfcore.errors import DtypeError, ShapeError
from zfcore.models import ContrastNorm, MaxPool2d, ZFNet, alexnet, zfnet_small
from zfcore.ops import max_pool2d_with_switches


@pytest.fixture(scope="module")
def zfnet():
    return ZFNet(contrast_norm=True).eval()


@pytest.fixture(scope="module")
def krizhevsky():
    return alexnet().eval()


@pytest.fixture(scope="module")
def small():
    return zfnet_small().eval()


def without_memory(make, **arguments):
    """A network of shapes alone, made in no time."""
    with torch.device("meta"):
        return make(**arguments)


def sizes(model, x):
    """The height of every feature map, by module name."""
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            if output.dim() == 4:
                seen[name] = output.shape[2]

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_children()]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_zfnet_has_the_sizes_of_figure_3(zfnet):
    seen = sizes(zfnet, torch.zeros(1, 3, 224, 224))
    names = ("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5")
    assert [seen[name] for name in names] == [110, 55, 26, 13, 13, 13, 13, 6]


def test_zfnet_has_the_papers_maps_and_layers(zfnet):
    convolutions = [zfnet.get_submodule(f"conv{i}") for i in range(1, 6)]
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions] == [
        (96, 7, 2), (256, 5, 2), (384, 3, 1), (384, 3, 1), (256, 3, 1),
    ]  # fmt: skip
    for name in ("relu1", "relu5", "pool1", "pool2", "pool5", "fc6", "dropout6", "fc7", "dropout7", "fc8"):
        zfnet.get_submodule(name)


def test_zfnet_has_62_million_parameters_and_1_17_gmac(zfnet):
    assert parameters(zfnet) == 62_357_608
    maps = sizes(zfnet, torch.zeros(1, 3, 224, 224))
    multiplications = sum(
        layer.weight.numel() * (maps[name] ** 2 if name in maps else 1)
        for name, layer in zfnet.named_children()
        if hasattr(layer, "weight")
    )
    assert multiplications == 1_168_032_896


def test_zfnet_starts_as_the_paper_does(zfnet):
    for layer in zfnet.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert abs(layer.weight.mean()) < 4e-4
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
            assert not layer.bias.any()


def test_zfnet_takes_other_classes_and_channels():
    model = without_memory(ZFNet, num_classes=7, in_channels=1)
    assert model(torch.zeros(2, 1, 224, 224, device="meta")).shape == (2, 7)


def test_contrast_norm_is_an_option_after_the_pools():
    with_norm, without = without_memory(ZFNet, contrast_norm=True), without_memory(ZFNet)
    assert [name for name, m in with_norm.named_children() if isinstance(m, ContrastNorm)] == [
        "norm1",
        "norm2",
    ]
    assert not any(isinstance(m, ContrastNorm) for m in without.modules())
    assert with_norm.state_dict().keys() == without.state_dict().keys()


def test_contrast_norm_is_krizhevskys_formula():
    x = torch.randn(2, 9, 3, 4, dtype=torch.float64) * 30
    expected = torch.empty_like(x)
    for c in range(9):
        near = x[:, max(0, c - 2) : c + 3].square().sum(1)
        expected[:, c] = x[:, c] / (2 + 1e-4 * near) ** 0.75
    torch.testing.assert_close(ContrastNorm()(x), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("groups", "expected"), [(2, 60_965_224), (1, 62_378_344)])
def test_alexnet_has_the_originals_parameters(groups, expected):
    assert parameters(without_memory(alexnet, groups=groups)) == expected


def test_alexnet_has_the_originals_sizes(krizhevsky):
    seen = sizes(krizhevsky, torch.zeros(1, 3, 224, 224))
    names = ("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5")
    assert [seen[name] for name in names] == [55, 27, 27, 13, 13, 13, 13, 6]


@pytest.mark.parametrize("size", [(28, 28), (29, 31), (32, 32), (45, 64), (64, 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_zfnet_small_takes_28_to_64_pixels(size, channels):
    model = zfnet_small(num_classes=5, in_channels=channels)
    logits = model(torch.randn(2, channels, *size))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_zfnet_small_fits_four_megabytes():
    assert parameters(zfnet_small()) * 4 <= 4e6


@pytest.mark.parametrize(
    ("name", "shape"),
    [("zfnet", (1, 3, 224, 224)), ("krizhevsky", (1, 3, 224, 224)), ("small", (2, 1, 28, 28))],
)
def test_networks_trace_with_fx(name, shape, request):
    model = request.getfixturevalue(name)
    graph = torch.fx.symbolic_trace(model)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls.count(max_pool2d_with_switches) == 3
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))


def test_zfnet_small_compiles_whole(small):
    x = torch.randn(2, 1, 28, 28)
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), small(x))


@pytest.mark.parametrize(
    "arguments", [(3,), (3, 2, 1), ((3, 2), (2, 1), (1, 0)), (2, None, 0, 2), (3, 2, 0, 1, True)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_max_pool_equals_torchs_with_its_gradient(arguments, layout):
    x = torch.randn(2, 3, 11, 14, dtype=torch.float64).to(memory_format=layout)
    kernel, stride, padding, dilation, ceil = (*arguments, *(None, 0, 1, False)[len(arguments) - 1 :])
    theirs = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil)
    ours = MaxPool2d(*arguments)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(a), theirs(b)
    assert torch.equal(y, expected) and y.is_contiguous(memory_format=layout)
    weight = torch.randn_like(expected)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
    assert str(ours) == str(theirs)


def test_max_pool_refuses_by_name():
    with pytest.raises(ShapeError):
        MaxPool2d(3)(torch.zeros(4, 4))
    with pytest.raises(DtypeError):
        MaxPool2d(2)(torch.zeros(1, 1, 4, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match="return_indices"):
        MaxPool2d(2, return_indices=True)


def test_networks_survive_pickle_and_deepcopy(small):
    x = torch.randn(1, 1, 28, 28)
    with torch.no_grad():
        expected = small(x)
        for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert torch.equal(twin(x), expected)
