"""In-place operations seen through views, and networks that are refused by name: the right answer, or an error."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zfcore.errors import LayerNotFound, ShapeError, UnsupportedOperation
from zfcore.network import read_network

SHAPE = (3, 9, 10)


class Net(nn.Module):
    """conv, then a function, then a conv over what it returns."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        self.register_buffer("mean", torch.randn(1, 4, 1, 1))
        self.function = function

    def forward(self, x):
        return self.b(self.function(self, self.a(x)))


def in_place_then(x, change):
    change(x)
    return x


def through_view(m, x):
    x.view(len(x), -1).relu_()
    return x


def through_slice(m, x):
    x[:, :2].relu_()
    return x


def through_chunk(m, x):
    torch.chunk(x, 2, 1)[0].sigmoid_()
    return x


def view_seen_after(m, x):
    flat = x.flatten(1)
    F.relu(x, inplace=True)
    return flat.view_as(x)


def old_value_used(m, x):
    y = x * 1.0
    x.relu_()
    return x + y


def augmented(m, x):
    y = x
    x += 1.0
    return y * x


def keyword(m, x):
    F.relu(input=x, inplace=True)
    return x


def out_argument(m, x):
    y = torch.relu(x)
    torch.add(x, y, out=y)
    return y


def contiguous_alias(m, x):
    y = x.contiguous()
    y.relu_()
    return x


def dropout_alias(m, x):
    y = F.dropout(x, training=m.training)
    y.clamp_(min=0)
    return x


def batch_sized(m, x):
    return x.sum((1, 2, 3), keepdim=True) / x.shape[0] + x


def batch_product(m, x):
    return x / math.prod(x.shape)


def batch_permuted(m, x):
    return x.permute(1, 0, 2, 3).permute(1, 0, 2, 3)


def softmax_of_batch(m, x):
    return F.softmax(x, 0)


def batch_mean(m, x):
    return x - x.mean(0, keepdim=True)


def groups_in_batch(m, x):
    n, c, h, w = x.shape
    return F.relu(x.reshape(n * 2, c // 2, h, w)).reshape(n, c, h, w)


def normalised(m, x):
    return (x - m.mean) / (m.mean.abs() + 0.5)


def constant_of_forward(m, x):
    return x * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)


def dropped(m, x):
    return F.dropout(x, 0.5)


def batch_statistics(m, x):
    return F.batch_norm(x, None, None, training=True)


def silu_in_place(m, x):
    y = F.silu(x, True)
    return x + y


def reflected(m, x):
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


def global_max(m, x):
    return x - F.max_pool2d(x, x.shape[-2:])


FUNCTIONS = [
    through_view, through_slice, through_chunk, view_seen_after, old_value_used, augmented, keyword, out_argument,
    contiguous_alias, dropout_alias, batch_sized, batch_product, batch_permuted, softmax_of_batch, batch_mean,
    groups_in_batch, normalised, constant_of_forward, dropped, batch_statistics, silu_in_place, reflected, global_max,
]  # fmt: skip
READ = {
    "old_value_used", "augmented", "keyword", "dropout_alias", "normalised", "constant_of_forward", "global_max",
    "through_view", "through_slice", "through_chunk", "out_argument", "batch_permuted", "groups_in_batch", "silu_in_place",
    "reflected",
}  # fmt: skip


def run_stages(network, images):
    values = {}
    for stage in network.stages:
        inputs = [values[source].clone() for source in stage.inputs]
        values[stage] = images if stage.kind == "input" else stage.run(*inputs)
        assert tuple(values[stage].shape[1:]) == tuple(stage.shape), stage
    return values[network.layer]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_right_or_refused(function):
    model = Net(function).eval()
    before = [sorted(vars(module)) for module in model.modules()]
    images = torch.randn(5, *SHAPE)
    try:
        network = read_network(model, SHAPE)
    except UnsupportedOperation as error:
        assert str(error).strip()
        assert function.__name__ not in READ, error
    else:
        with torch.no_grad():
            torch.testing.assert_close(run_stages(network, images), model(images.clone()))
    assert [sorted(vars(module)) for module in model.modules()] == before


def refused(model, match, layer=None, shape=SHAPE):
    with pytest.raises(UnsupportedOperation, match=match):
        read_network(model.eval(), shape, layer)


def test_refusals_name_the_operation():
    conv = nn.Conv2d(3, 4, 3)
    refused(nn.Sequential(conv, nn.BatchNorm2d(4, track_running_stats=False)), "'1'.*statistics")
    refused(nn.Sequential(conv, nn.FractionalMaxPool2d(2, 3)), "'1'.*random")
    refused(Net(dropped), "dropout")
    refused(Net(lambda m, x: torch.fft.fft2(x).real), "fft2")
    refused(Net(lambda m, x: x if x.sum() > 0 else -x), "Net.*control flow")


def test_only_what_leads_to_the_layer_must_be_readable():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.FractionalMaxPool2d(2, 3), nn.Conv2d(4, 2, 1)).eval()
    assert read_network(model, SHAPE, "1").layer.kind == "relu"
    refused(model, "FractionalMaxPool2d", "3")


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name", ["0", "1", ""])
def test_hooks_are_shown_no_tensors_without_values(register, name):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU()))
    seen = []
    getattr(model.get_submodule(name), register)(lambda *args: seen.append(1))
    refused(model, "hooks")
    assert not seen


def test_a_forward_set_on_the_instance():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    model[1].forward = lambda x: x * 2
    images = torch.randn(2, *SHAPE)
    try:
        network = read_network(model, SHAPE)
    except UnsupportedOperation:
        return
    torch.testing.assert_close(run_stages(network, images), model(images))


class Inside(nn.Module):
    """Returns a map that it changed after its last operation on it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        F.relu_(y)
        return y


def test_a_blocks_output_is_what_it_is_when_the_block_ends():
    model = nn.Sequential(Inside(), nn.Sigmoid()).eval()
    images = torch.randn(2, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(run_stages(read_network(model, SHAPE, "0"), images), model[0](images))
        torch.testing.assert_close(
            run_stages(read_network(model, SHAPE, "0.conv"), images), model[0].conv(images)
        )


def test_images_that_do_not_fit():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 7 * 8, 2)).eval()
    assert read_network(model, SHAPE).layer.shape == (2,)
    for shape in ((4, 9, 10), (3, 2, 10), (3, 9, 11)):
        with pytest.raises(ShapeError, match="images"):
            read_network(model, shape)


def test_layers_that_are_not_there():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model.spare = nn.Identity()
    unused = Net(lambda m, x: x)
    unused.unused = nn.Conv2d(1, 1, 1)
    with pytest.raises(LayerNotFound, match="unused"):
        read_network(unused.eval(), SHAPE, "unused")
    with pytest.raises(LayerNotFound, match="a@1.*1 times"):
        read_network(unused.eval(), SHAPE, "a@1")
    with pytest.raises(LayerNotFound, match="nearest names"):
        read_network(unused.eval(), SHAPE, "aa")


GEOMETRIES = [
    nn.Sequential(nn.Conv2d(1, 1, (3, 5), (2, 1), (1, 2)), nn.Conv2d(1, 1, 3, dilation=(2, 1), padding=1)),
    nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.Conv2d(1, 1, 2, padding="same"), nn.ZeroPad2d((2, 0, 1, 3)), nn.ReLU()),
    nn.Sequential(nn.Conv2d(1, 1, 3), nn.AvgPool2d((2, 3), divisor_override=4, ceil_mode=True), nn.Conv2d(1, 1, 3, 2, 3)),
]  # fmt: skip


@pytest.mark.parametrize("model", GEOMETRIES)
def test_fields_are_where_the_gradient_is(model):
    """Weights and images of ones let every path through: the support of a position's gradient is its field."""
    model = model.eval()
    for p in model.parameters():
        p.data.fill_(1.0)
    images = torch.ones(1, 1, 23, 19, requires_grad=True)
    field = read_network(model, images.shape[1:]).layer.field
    out = model(images)
    for y in range(out.shape[2]):
        for x in range(out.shape[3]):
            (g,) = torch.autograd.grad(out[0, 0, y, x], images, retain_graph=True, allow_unused=True)
            touched = g[0, 0].nonzero()
            for axis, at in enumerate((y, x)):
                first = at * field.jump[axis] + field.offset[axis]
                last = first + field.size[axis] - 1
                size = images.shape[2 + axis]
                if len(touched):
                    assert touched[:, axis].min() >= max(first, 0) and touched[:, axis].max() <= min(last, size - 1)
    y, x = out.shape[2] // 2, out.shape[3] // 2  # in the middle the field is exact, but for holes of dilation
    (g,) = torch.autograd.grad(out[0, 0, y, x], images)
    for axis, at in enumerate((y, x)):
        first = at * field.jump[axis] + field.offset[axis]
        touched = g[0, 0].nonzero()[:, axis]
        assert (touched.min(), touched.max()) == (first, first + field.size[axis] - 1)
