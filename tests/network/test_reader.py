"""What the reader makes of a model: stages, names, fields, memory that is shared, and what it refuses."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zfcore.errors import LayerNotFound, ShapeError, UnsupportedOperation
from zfcore.network import evaluating, observing, read_network, resolve_layer

SHAPE = (3, 20, 24)


class Code(nn.Module):
    """A model whose forward is a function of a conv's output; `parts` are its modules."""

    def __init__(self, function, **parts):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x):
        return self.function(self, self.conv(x))


def run(network, images):
    """The network's output by its stages."""
    values = {}
    for stage in network.stages:
        inputs = [values[source] for source in stage.inputs]
        values[stage] = images if stage.kind == "input" else stage.run(*inputs)
        assert values[stage].shape[1:] == stage.shape, stage
    return values[network.layer]


def reads(function, *kinds, shape=SHAPE, **parts):
    """The stages of a model with this code compute what the model does, on two images and on one."""
    model = Code(function, **parts).eval()
    network = read_network(model, shape)
    with torch.no_grad():
        for n in (2, 1):
            images = torch.randn(n, *shape)
            torch.testing.assert_close(run(network, images), model(images))
    found = tuple(stage.kind for stage in network.stages[2:])
    assert not kinds or found == kinds, found
    return network


def _shuffled(x):
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)


def _windows(x):
    """Attention within windows of 4 x 4, whose number is folded into the batch axis."""
    n, c, h, w = x.shape
    y = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    y = torch.softmax(y @ y.transpose(1, 2) / 3, -1) @ y
    return y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


@torch.fx.wrap
def wrapped(x, training):
    """What is a leaf to fx, with control flow inside that does not depend on the map."""
    return torch.bernoulli(x) if training else F.relu(x)


OPERATIONS = {
    "relu": (lambda m, x: F.relu(x), "relu"),
    "relu method": (lambda m, x: x.relu(), "relu"),
    "relu6": (lambda m, x: F.relu6(x), "relu"),
    "hardtanh": (lambda m, x: F.hardtanh(x, 0.0, 4.0), "relu"),
    "clamp": (lambda m, x: torch.clamp(x, 0, 2), "relu"),
    "clamp_min": (lambda m, x: x.clamp_min(0), "relu"),
    "threshold": (lambda m, x: F.threshold(x, 0, 0), "relu"),
    "leaky": (lambda m, x: F.leaky_relu(x, 0.3), "relu"),
    "max pool": (lambda m, x: F.max_pool2d(x, 3, 2, 1, 2, True), "max_pool"),
    "torch.max_pool2d": (lambda m, x: torch.max_pool2d(x, (2, 3)), "max_pool"),
    "avg pool": (lambda m, x: F.avg_pool2d(x, 3, 2, 1, True, False), "avg_pool"),
    "avg pool by a divisor": (lambda m, x: F.avg_pool2d(x, 2, divisor_override=3), "avg_pool"),
    "adaptive": (lambda m, x: F.adaptive_avg_pool2d(x, (3, 5)), "map"),
    "adaptive that divides": (lambda m, x: F.adaptive_avg_pool2d(x, (5, None)), "avg_pool"),
    "adaptive max": (lambda m, x: F.adaptive_max_pool2d(x, 3), "map"),
    "conv": (lambda m, x: F.conv2d(x, m.conv.weight[:, :1], None, (2, 1), "valid", groups=4), "conv"),
    "batch norm": (
        lambda m, x: F.batch_norm(x, torch.ones(4), torch.full((4,), 2.0), torch.tensor([1.0, -2, 3, 0])),
        "batch_norm"),
    "lrn": (lambda m, x: F.local_response_norm(x, 3), "lrn"),
    "dropout": (lambda m, x: F.dropout(x, 0.3, m.training) * 2, "scale"),
    "add": (lambda m, x: x + x.relu(), "relu", "add"),
    "add a number": (lambda m, x: 2 + x - 0.5, "scale", "scale"),
    "number minus": (lambda m, x: 1 - x, "scale"),
    "normalise": (
        lambda m, x: (x - torch.arange(4.0).view(1, 4, 1, 1)) / torch.full((4, 1, 1), 3.0), "scale", "scale"),
    "divide by": (lambda m, x: 2 / (x * x + 1), "product", "scale", "pointwise", "scale"),
    "neg": (lambda m, x: -x, "scale"),
    "mul": (lambda m, x: x * torch.sigmoid(x), "pointwise", "product"),
    "mul broadcast": (lambda m, x: x * x.mean((2, 3), keepdim=True), "map", "product"),
    "plus a row": (lambda m, x: x + torch.arange(24.0), "scale"),
    "times a row": (lambda m, x: torch.arange(24.0) * x, "map"),
    "cat": (lambda m, x: torch.cat([x, F.relu(x)], dim=-3), "relu", "cat"),
    "cat below": (lambda m, x: torch.cat((x, x), 2), "map"),
    "pad": (lambda m, x: F.pad(x, (1, 2, 0, -3)), "pad"),
    "flatten": (lambda m, x: torch.flatten(x, 1), "map"),
    "view": (lambda m, x: x.view(x.size(0), -1), "map"),
    "view by shape": (lambda m, x: x.reshape(x.shape[0], x.shape[1] * x.size(2) * x.shape[3]), "map"),
    "view to anything": (lambda m, x: x.view(-1, 4 * 20 * 24), "map"),
    "view with parts": (lambda m, x: x.view(len(m.conv.weight) // 4 * x.size(0), 2, 2, *x.shape[2:]), "map"),
    "flatten nothing": (lambda m, x: torch.flatten(x.mean([2, 3]), 1), "map"),
    "mean": (lambda m, x: x.mean(dim=(-1, -2)), "map"),
    "pick of one": (
        lambda m, x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0][:, :, None, None], "map"),
    "squeeze": (lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(3).squeeze(-1), "map", "map", "map"),
    "expand": (lambda m, x: x * x.mean((2, 3)).view(-1, 4, 1, 1).expand_as(x), "map", "map", "map", "product"),
    "slices": (lambda m, x: x[:, 1:3, ..., ::2] + x[:, -2:, :, 1::2], "channels", "map", "channels", "map", "add"),
    "row": (lambda m, x: x[:, :, 3], "map"),
    "shuffle": (
        lambda m, x: _shuffled(torch.cat(x.chunk(2, dim=1)[::-1], 1)),
        "channels", "channels", "cat", "channels"),
    "split": (lambda m, x: torch.split(x, [1, 3], 1)[1] * 2, "channels", "scale"),
    "wrapped function": (lambda m, x: wrapped(x, training=m.training), "relu"),
    "permute": (lambda m, x: x.permute(0, 2, 3, 1).transpose(1, 2), "map", "map"),
    "softmax": (lambda m, x: F.softmax(x, dim=1), "map"),
    "log softmax": (lambda m, x: torch.log_softmax(x.flatten(1), 1), "map", "map"),
    "control flow on sizes": (lambda m, x: F.relu(x) if x.shape[-1] > 10 and x.dim() == 4 else x, "relu"),
    "asks what it gets": (
        lambda m, x: F.relu(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else 0, "relu"),
    "shapes alike": (lambda m, x: x + F.relu(x) if x.shape == F.relu(x).shape else x, "relu", "add"),
    "sequence": (lambda m, x: [f(x) for f in (F.relu, torch.tanh)][1], "pointwise"),
    "crop": (lambda m, x: x[:, :, 1:-2, 3:], "pad", "pad"),
    "channels by number": (lambda m, x: x[:, [2, 1, 0]], "channels"),
    "one channel": (lambda m, x: torch.cat([x[:, 1].unsqueeze(1) * 2, x[:, :1]], 1), "channels", "scale", "channels", "cat"),
    "by a mask": (lambda m, x: x[:, torch.tensor([True, False, True, True])], "channels"),
    "clamp below another": (lambda m, x: x.clamp(min=-1), "pointwise"),
    "where": (lambda m, x: torch.where(x > 0, x, 0.0), "pointwise"),
    "swish by hand": (lambda m, x: x / (1 + torch.exp(-x)), "scale", "pointwise", "scale", "map"),
    "difference": (lambda m, x: torch.sub(x, F.avg_pool2d(x, 3, 1, 1), alpha=2), "avg_pool", "scale", "add"),
    "a multiple more": (lambda m, x: torch.add(x, x.relu(), alpha=3), "relu", "scale", "add"),
    "glu": (lambda m, x: F.glu(x, 1), "channels", "channels", "pointwise", "product"),
    "channel shuffle": (lambda m, x: F.channel_shuffle(x, 2), "channels"),
    "power": (lambda m, x: torch.pow(x, 2) + x**3, "pointwise", "pointwise", "add"),
    "cumsum": (lambda m, x: x.cumsum(2), "map"),
    "too many taps": (lambda m, x: F.max_pool2d(x, 16), "map"),
    "indices": (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0], "max_pool"),
    "unpool": (lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), "max_pool", "map"),
    "upsample": (lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"), "map"),
    "reflect": (lambda m, x: F.pad(x, (1, 1, 2, 0), mode="reflect"), "map"),
    "group norm": (lambda m, x: F.group_norm(x, 2), "map"),
    "layer norm of channels": (lambda m, x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2), "map", "map", "map"),
    "transposed conv": (lambda m, x: F.conv_transpose2d(x, m.conv.weight, stride=2), "map"),
    "einsum": (lambda m, x: torch.einsum("bchw,cd->bdhw", x, torch.eye(4) * 2), "map"),
    "attention": (lambda m, x: F.scaled_dot_product_attention(x, x, x), "map"),
    "windows": (lambda m, x: _windows(x),),
    "normalize": (lambda m, x: F.normalize(x, dim=1), "map", "pointwise", "map", "map"),
    "stack, unbind": (lambda m, x: torch.stack(x.unbind(1)[::-1], 1),),
    "half a region": (lambda m, x: (x.half() * 2).float(), "map"),
    "contiguous": (lambda m, x: x.contiguous(memory_format=torch.channels_last),),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    function, *kinds = OPERATIONS[name]
    reads(function, *kinds)


MODULES = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.Hardtanh(0, 5), nn.Threshold(0, 0),
    nn.MaxPool2d(3, 2),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AdaptiveAvgPool2d((4, None)), nn.AdaptiveMaxPool2d(1),
    nn.BatchNorm2d(4),
    nn.LocalResponseNorm(3), nn.Dropout(), nn.Dropout2d(), nn.Identity(), nn.Flatten(), nn.Flatten(2),
    nn.Unflatten(1, (2, 2)),
    nn.ZeroPad2d((1, 0, 2, 1)), nn.Softmax2d(), nn.Softmax(1), nn.Sigmoid(), nn.Tanh(),
    nn.SiLU(inplace=True), nn.GELU("tanh"),
    nn.ELU(0.5), nn.Softplus(), nn.Hardswish(), nn.Hardsigmoid(), nn.Mish(), nn.Conv2d(4, 8, (3, 2),
    padding="same", dilation=(1, 2)),
    nn.Conv2d(4, 6, 3, 2, (0, 1), groups=2, bias=False), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 4, 3), nn.LeakyReLU(-0.5), nn.Hardtanh(), nn.PReLU(4),
    nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.ConstantPad2d(1, 0.5), nn.PixelUnshuffle(2), nn.RReLU(),
    nn.LPPool2d(2, 2), nn.Softmin(1), nn.Hardshrink(), nn.Tanhshrink(), nn.ChannelShuffle(2), nn.GLU(1),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_module(module):
    torch.manual_seed(1)
    if isinstance(module, nn.BatchNorm2d):
        module.running_var.uniform_(0.5, 2)
        module.running_mean.normal_()
        nn.init.normal_(module.weight)
    reads(lambda m, x: F.relu(m.part(x)), part=copy.deepcopy(module))


REFUSED = {
    "control flow": (lambda m, x: x if x.sum() > 0 else -x, r"'' \(Code\) reads a value .*is_nonzero.*control flow"),
    "a number": (lambda m, x: x * x.sum().item(), "reads a value .*item"),
    "NumPy": (lambda m, x: x + float(x.detach().numpy().max()), "reads a value .*numpy"),
    "an array": (lambda m, x: x * np.asarray(x).mean().item(), "reads a value .*__array__"),
    "a list": (lambda m, x: x * x.flatten()[:2].tolist()[0], "reads a value|picks images"),
    "a pointer": (lambda m, x: x * (x.data_ptr() % 2), "reads a value .*data_ptr"),
    "iteration": (lambda m, x: torch.stack([row for row in x]), "picks images"),
    "unknown function": (lambda m, x: torch.fft.rfft(x).real, r"'' \(Code\) .*rfft"),
    "batch statistics": (lambda m, x: F.batch_norm(x, None, None, training=True), "batch's own statistics"),
    "dropout all the same": (lambda m, x: F.dropout(x), "drops values in eval mode"),
    "random numbers": (lambda m, x: x + torch.randn(4, 1, 1), "draws random numbers"),
    "random in place": (lambda m, x: x + torch.zeros(4, 1, 1).normal_(), "draws random numbers"),
    "batch axis by view": (lambda m, x: x.view(-1, 2, 20, 24), "whose images are not its first axis"),
    "batch axis by mean": (lambda m, x: x - x.mean(0, keepdim=True), "reduces the batch axis"),
    "batch axis by sum": (lambda m, x: x / x.abs().sum(), "reduces the batch axis"),
    "batch axis by cat": (lambda m, x: torch.cat([x, x]), "joins along the batch axis"),
    "batch axis by permute": (lambda m, x: x.permute(1, 0, 2, 3), "whose images are not its first axis"),
    "batch axis by flatten": (lambda m, x: torch.flatten(x), "whose images are not its first axis"),
    "batch axis by softmax": (lambda m, x: x.softmax(0), "works along the batch axis"),
    "batch axis by roll": (lambda m, x: x.roll(1, 0), "rolls the batch axis"),
    "batch axis by matmul": (
        lambda m, x: torch.matmul(x.flatten(1), x.flatten(1).T), "the images on different axes"),
    "batch axis by einsum": (lambda m, x: torch.einsum("bchw,bchw->chw", x, x)[None] + x, "sums over the batch axis"),
    "batch size in the values": (lambda m, x: x / x.size(0), "depends on the number of images"),
    "batch size in a root": (lambda m, x: x / len(x) ** 0.5, "depends on the number of images"),
    "batch size in the flow": (lambda m, x: F.relu(x) if x.size(0) > 1 else x, "depends on the number of images"),
    "batch size in a range": (lambda m, x: x + sum(range(x.size(0))), "depends on the number of images"),
    "squeeze of what is one": (lambda m, x: x.squeeze(), "squeeze a batch of one"),
    "squeeze of the images": (lambda m, x: x.squeeze(0), "squeeze a batch of one"),
    "images": (lambda m, x: x[:1], "picks images"),
    "images by split": (lambda m, x: x.chunk(2)[0], "splits the batch axis"),
    "by the batch size": (lambda m, x: x[:, : x.size(0)], "depends on the number of images"),
    "a constant of each image": (
        lambda m, x: x + torch.arange(len(x)).view(-1, 1, 1, 1), "differs from image to image|number of images"),
    "other dtype": (lambda m, x: x.to(torch.float16), "tensor of torch.float16"),
    "indices alone": (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[1], "tensor of torch.int64"),
    "written to": (lambda m, x: (x.__setitem__(0, 1.0), x)[1], "picks images"),
    "no stride": (lambda m, x: x.as_strided((1, 2), (1, 1)), "as_strided"),
    "storage": (lambda m, x: torch.empty(0).set_(x.untyped_storage()), "untyped_storage|set_"),
    "nothing": (lambda m, x: None, "returns a NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name):
    function, message = REFUSED[name]
    with pytest.raises(UnsupportedOperation, match=message):
        read_network(Code(function).eval(), SHAPE)


@pytest.mark.parametrize(
    "module, message",
    [
        (nn.BatchNorm2d(4, track_running_stats=False), r"'part' \(BatchNorm2d\).*batch's own statistics"),
        (nn.FractionalMaxPool2d(2, output_size=4), r"'part' \(FractionalMaxPool2d\).*random numbers"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refused_module(module, message):
    with pytest.raises(UnsupportedOperation, match=message):
        read_network(Code(lambda m, x: m.part(x), part=module).eval(), SHAPE)


def test_a_subclass_is_read_by_what_it_computes():
    class Named(nn.Conv2d):
        pass

    class Normed(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight / 3, self.bias)

    class Padded(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, bias)

    for own in (Named, Normed, Padded):
        network = reads(lambda m, x: m.part(x), part=own(4, 2, 3))
        assert network.layer.name == "part"
    patched = nn.ReLU()
    patched.forward = lambda x: x.clamp(min=0) * 2
    reads(lambda m, x: m.part(x), "relu", "scale", part=patched)


def test_parametrised_weights():
    part = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    reads(lambda m, x: m.part(x), "conv", part=part)


# ---- memory that is shared ---------------------------------------------------------------------------------

IN_PLACE = {
    "another name": lambda m, x: (y := x, F.relu(x, inplace=True), y * 2)[2],
    "unused result": lambda m, x: (x.relu_(), x + 1)[1],
    "sum in place": lambda m, x: _summed(x),
    "in a list": lambda m, x: (kept := [x], x.mul_(3), kept[0] + x)[2],
    "through dropout": lambda m, x: (y := m.drop(x), y.add_(1), x * y)[2],
    "result of an addition": lambda m, x: (y := x + 1, F.relu_(y), x * y)[2],
    "of a copy": lambda m, x: (y := x.clone(), y.relu_(), x + y)[2],
}


def _summed(x):
    y = x * 2
    kept = y
    y += x
    y *= 3
    return kept + y


@pytest.mark.parametrize("name", [name for name in IN_PLACE if name != "of a copy"])
def test_work_in_place(name):
    reads(IN_PLACE[name], drop=nn.Dropout())


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (y := x.flatten(1), x.relu_(), y)[2],
        lambda m, x: (y := x.contiguous(), y.relu_(), x * 1)[2],
        lambda m, x: (y := x.reshape(len(x), -1), y.relu_(), x * 1)[2],
        lambda m, x: (y := x.reshape(len(x), -1).reshape(x.shape), y.relu_(), x * 1)[2],
        lambda m, x: (y := x.flatten(1).contiguous().reshape(x.shape), x.relu_(), y * 1)[2],
    ],
)
def test_what_may_be_a_view_or_a_copy_of_what_changed_is_refused(function):
    with pytest.raises(UnsupportedOperation, match="works in place on what may be a view of a map that is in use"):
        read_network(Code(function).eval(), SHAPE)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (y := x.view(-1, 2, 40, 24), F.relu(y, inplace=True), x * 1)[2],
        lambda m, x: (y := x[:, :, None], y.mul_(2), x * 1)[2],
        lambda m, x: (y := x[:, 1:3], x.mul_(2), y + 1)[2],
        lambda m, x: (y := x[:, 1:3], z := x[:, 2:], y.mul_(2), z + 1)[3],
        lambda m, x: (x.transpose(1, 2)[:, 3].sigmoid_(), x)[1],
        lambda m, x: (x[:, 1].fill_(3), x)[1],
        lambda m, x: (x.chunk(2, 1)[1].add_(x[:, :2]), x)[1],
    ],
)
def test_writes_through_views_are_followed(function):
    reads(function)


def _into(make, write):
    def function(m, x):
        own = make(m, x)
        write(own, x)
        return own + 0.1 * x

    return function


WRITES = {
    "set": (lambda m, x: torch.zeros(len(x), 4, 20, 24), lambda b, x: b.__setitem__(slice(None), x)),
    "copy": (lambda m, x: torch.zeros(len(x), 4, 20, 24), lambda b, x: b.copy_(x)),
    "add": (lambda m, x: torch.ones(len(x), 4, 20, 24), lambda b, x: b.add_(x)),
    "a part": (lambda m, x: torch.ones(len(x), 4, 20, 24), lambda b, x: b[:, :2].add_(x[:, :2])),
    "every other": (lambda m, x: torch.zeros_like(x), lambda b, x: b[:, ::2].copy_(x[:, ::2])),
    "rows": (lambda m, x: torch.zeros_like(x), lambda b, x: b[:, :, 1:].copy_(x[:, :, :-1])),
    "by index": (lambda m, x: torch.zeros_like(x), lambda b, x: b.index_copy_(1, torch.tensor([2, 0]), x[:, :2])),
    "out": (lambda m, x: torch.empty_like(x), lambda b, x: torch.add(x, 1, out=b)),
    "where it is large": (lambda m, x: x.clone(), lambda b, x: b.__setitem__(b > 0.5, 0.5)),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_into_other_tensors_are_followed(name):
    reads(_into(*WRITES[name]))


def test_weights_that_are_standardised_in_the_forward():
    def standardised(m, x):
        weight = m.conv.weight
        rows = F.batch_norm(weight.reshape(1, len(weight), -1), None, None, training=True)
        return F.conv2d(x, rows.reshape_as(weight)[:, :1], groups=4)

    reads(standardised, "conv")


def test_constants_of_each_image_may_differ_by_rounding():
    """The rows of a product of matrices are not all computed in the same order."""
    deep = nn.Linear(515, 4)
    model = Code(lambda m, x: x * m.deep(torch.ones(len(x), 515) / 3).view(-1, 4, 1, 1), deep=deep).eval()
    images = torch.randn(3, *SHAPE)
    torch.testing.assert_close(run(read_network(model, SHAPE), images), model(images))


def test_writes_into_the_models_own_tensors_go_to_a_copy():
    """What is computed from the images is refused by name there, constants count from then on."""
    model = Code(lambda m, x: (m.buf.copy_(x), m.buf * 2)[1]).eval()
    model.register_buffer("buf", torch.zeros(1, 4, 20, 24))
    with pytest.raises(UnsupportedOperation):
        read_network(model, SHAPE)
    assert not model.buf.any()
    def counted(m, x):
        m.count += 1
        y = x * m.count
        m.count += 1
        return y + m.count

    model = Code(counted).eval()
    model.register_buffer("count", torch.zeros(()))
    model.double()
    network = read_network(model, SHAPE)
    assert model.count == 0
    images = torch.randn(2, *SHAPE, dtype=torch.float64)
    wanted = model(images)
    torch.testing.assert_close(run(network, images), wanted)


def test_views_that_are_not_used_again_do_no_harm():
    reads(lambda m, x: (y := x.flatten(1), y.relu_(), y * 1)[2])


def test_a_copy_is_not_a_view():
    reads(IN_PLACE["of a copy"])


def test_a_layer_is_what_it_returned_then():
    """Not what an operation in place made of it later."""
    model = Code(lambda m, x: m.relu(x), relu=nn.ReLU(inplace=True)).eval()
    assert read_network(model, SHAPE, "conv").layer.kind == "conv"
    assert read_network(model, SHAPE, "relu").layer.kind == "relu"
    dropped = Code(lambda m, x: m.drop(F.relu(x)), drop=nn.Dropout()).eval()
    assert read_network(dropped, SHAPE, "drop").layer.kind == "relu"


# ---- names and layers --------------------------------------------------------------------------------------


def test_names():
    relu = nn.ReLU()
    model = Code(
        lambda m, x: m.block(F.relu(m.relu(m.relu(x)))),
        relu=relu,
        block=nn.Sequential(nn.Conv2d(4, 2, 1), relu),
    )
    network = read_network(model.eval(), SHAPE)
    assert [stage.name for stage in network.stages] == [
        "image", "conv", "relu@0", "relu@1", ":relu", "block.0", "relu@2"
    ]  # fmt: skip
    assert [stage.index for stage in network.stages] == list(range(7))
    assert read_network(model, SHAPE, "relu@1").layer.name == "relu@1"
    for last in ("relu", "block", "block.1", relu):
        assert read_network(model, SHAPE, last).layer.name == "relu@2"
    assert read_network(model, SHAPE, model).layer.name == "relu@2"
    assert repr(network.layer).startswith("Stage(6: relu 'relu@2' <- [block.0], shape=(2, 20, 24)")


@pytest.mark.parametrize(
    "layer, message",
    [
        ("layer1.0.conv3", "layer='layer1.0.conv3'.*layer1.0.conv1"),
        ("layer1.0.conv1@x", "nearest names are layer1.0.conv1"),
        ("layer1.0.conv1@1", r"the model calls 'layer1.0.conv1' 1 times, from @0"),
        ("unused", "expected a layer that the model calls"),
        (3, "layer=3.*got int"),
        (nn.ReLU(), r"layer=ReLU\(...\): expected a module of the model"),
        ("zzz", "nearest names are conv, layer1"),
    ],
)
def test_no_such_layer(layer, message):
    block = nn.Sequential()
    block.add_module("conv1", nn.Conv2d(4, 4, 1))
    model = Code(lambda m, x: m.layer1(x), layer1=nn.Sequential(block), unused=nn.Conv2d(1, 1, 1)).eval()
    with pytest.raises(LayerNotFound, match=message):
        read_network(model, SHAPE, layer)


def test_resolve_layer():
    model = nn.Sequential()
    model.add_module("a@1", nn.ReLU())
    model.add_module("a", nn.ReLU())
    assert resolve_layer(model, "a@1") == ("a@1", None)
    assert resolve_layer(model, "a@0") == ("a", 0)
    assert resolve_layer(model, "a@1@2") == ("a@1", 2)
    assert resolve_layer(model, model[1]) == ("a", None)
    assert resolve_layer(model, model) == ("", None)


# ---- only what leads to the layer --------------------------------------------------------------------------


def test_what_is_not_needed_need_not_be_read():
    model = Code(lambda m, x: (x.cumsum(0), m.relu(x).cumsum(0))[1], relu=nn.ReLU()).eval()
    assert read_network(model, SHAPE, "relu").layer.kind == "relu"
    with pytest.raises(UnsupportedOperation, match="cumsum"):
        read_network(model, SHAPE)


def test_layers_before_control_flow():
    def code(m, x):
        x = m.relu(x)
        return m.relu(x) if m.again and x.sum() > -1 else m.head(x) if x.sum() > -1 else x

    model = Code(code, relu=nn.ReLU(), head=nn.Conv2d(4, 2, 1)).eval()
    image = torch.randn(1, *SHAPE)
    model.again = False
    assert read_network(model, SHAPE, "relu@0").layer.kind == "relu"
    assert (
        read_network(model, SHAPE, "relu", image).layer.kind == "relu"
    )  # the model was run to count the calls
    for layer, example in (("relu", None), ("head", image), (None, image)):
        with pytest.raises(UnsupportedOperation, match="control flow"):
            read_network(model, SHAPE, layer, example)
    model.again = True  # now the last call lies behind the control flow
    with pytest.raises(UnsupportedOperation, match="control flow"):
        read_network(model, SHAPE, "relu", image)
    assert read_network(model, SHAPE, "relu@0").layer.kind == "relu"


def test_a_forward_is_followed_up_to_a_layer_that_is_called_once():
    """Once a whole forward has shown it; as long as the model is as it was."""
    seen = []

    def code(m, x):
        x = m.relu(x)
        seen.append("after")
        return m.relu(x) + 1 if m.again else x + 1

    model = Code(code, relu=nn.ReLU()).eval()
    model.again = False
    for _ in range(3):
        network = read_network(model, SHAPE, "relu")
        assert [stage.kind for stage in network.stages] == ["input", "conv", "relu"]
    assert seen == ["after"]
    model.again = True  # the forward has another way to go
    assert len(read_network(model, SHAPE, "relu").stages) == 4
    assert len(read_network(model, SHAPE, "relu@0").stages) == 3
    model.again = False
    model.conv = nn.Conv2d(3, 2, 1)
    assert read_network(model, SHAPE, "relu").layer.shape == (2, 20, 24)


def test_images_that_fit_up_to_the_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 5), nn.Flatten(), nn.Linear(99, 2)
    )
    assert read_network(model, SHAPE, "2").layer.shape == (4, 5, 7)
    with pytest.raises(
        ShapeError, match=r"'4' \(Linear\): images: they give this layer 140 features; it takes 99"
    ):
        read_network(model, SHAPE)
    with pytest.raises(ShapeError, match=r"'2' \(Conv2d\): images: their map of \(3, 3\)"):
        read_network(model, (3, 8, 8), "2")
    with pytest.raises(
        ShapeError, match=r"'0' \(Conv2d\): images: they give this layer 1 channels; it takes 3"
    ):
        read_network(model, (1, 20, 24), "0")
    with pytest.raises(ShapeError, match=r"'1' \(MaxPool2d\): images: their map of \(1, 1\)"):
        read_network(model, (3, 3, 3), "1")


def test_optional_arguments_keep_their_defaults():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, mask=None, *, scale=1.0):
            x = self.conv(x) * scale
            return x if mask is None else x * mask

    assert [stage.kind for stage in read_network(Optional(), SHAPE).stages] == ["input", "conv", "scale"]


# ---- hooks and what else changes a module ------------------------------------------------------------------


@pytest.mark.parametrize("where", ("conv", "block", "block.0"))
@pytest.mark.parametrize("kind", ("forward_hook", "forward_pre_hook"))
def test_hooks_see_values(kind, where):
    """A hook of the user's is shown no tensors without values: the forward is computed for it, or refused."""
    model = Code(lambda m, x: m.block(x), block=nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU())).eval()
    seen = []
    handle = getattr(model.get_submodule(where), f"register_{kind}")(lambda m, *args: seen.append(args[-1]))
    with pytest.raises(UnsupportedOperation, match=f"'{where}' .* has hooks"):
        read_network(model, SHAPE, "block.1")
    assert not seen
    image = torch.randn(1, *SHAPE)
    network = read_network(model, SHAPE, "block.1", image)
    assert [stage.kind for stage in network.stages] == ["input", "conv", "conv", "relu"]
    shown = seen.pop()
    shown = shown[0] if isinstance(shown, tuple) else shown
    model(image)
    wanted = seen.pop()
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    torch.testing.assert_close(shown[:1], wanted)
    handle.remove()
    read_network(model, SHAPE, "block.1")


def test_hooks_that_change_the_answer_are_followed():
    model = Code(lambda m, x: m.relu(x), relu=nn.ReLU()).eval()
    model.relu.register_forward_hook(lambda m, a, out: out * 2)
    model.conv.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    images = torch.randn(2, *SHAPE)
    network = read_network(model, SHAPE, None, images)
    torch.testing.assert_close(run(network, images), model(images))


def test_hooks_on_gradients_keep_the_way_down_out():
    model = Code(lambda m, x: m.relu(x), relu=nn.ReLU()).eval()
    model.relu.register_full_backward_hook(lambda m, g, h: None)
    assert read_network(model, SHAPE).layer.kind == "relu"
    with pytest.raises(UnsupportedOperation, match=r"'relu' \(ReLU\) has backward hooks"):
        read_network(model, SHAPE, gradient=True)
    hooked = Code(lambda m, x: (x.register_hook(lambda g: g * 2), x * 1)[1] if x.requires_grad else x).eval()
    assert read_network(hooked, SHAPE).layer.kind == "conv"
    with pytest.raises(UnsupportedOperation, match="hook on a map's gradient"):
        read_network(hooked, SHAPE, gradient=True)


def test_hooks_on_every_module():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args))
    try:
        with pytest.raises(UnsupportedOperation, match="has hooks"):
            read_network(Code(lambda m, x: x), SHAPE)
    finally:
        handle.remove()
    assert not seen


def test_observers_are_no_hindrance():
    model = Code(lambda m, x: F.relu(x)).eval()
    seen = []
    with observing(model.conv, seen.append):
        read_network(model, SHAPE, "conv")
        assert not seen
        other = threading.Thread(target=model, args=(torch.zeros(1, *SHAPE),))
        other.start()
        other.join()
        assert not seen  # another thread's forward is not this one's
        model(torch.zeros(1, *SHAPE))
    assert len(seen) == 1 and not model.conv._forward_hooks


# ---- what autograd would not pass ----------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    """A step whose gradient is passed straight through."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda m, x: x.detach() * 2 + x, "detaches it"),
        (lambda m, x: x.data * 2, "detaches it"),
        (lambda m, x: x * torch.no_grad()(torch.sigmoid)(x), r"sigmoid under no_grad\(\)"),
        (lambda m, x: torch.no_grad()(lambda: x[:, 1:])() + 1, r"slice under no_grad\(\)"),
    ],
)
def test_cut_signals(function, message):
    reads(function)  # their values are as they are
    with pytest.raises(UnsupportedOperation, match=message):
        read_network(Code(function).eval(), SHAPE, gradient=True)


def test_custom_functions_keep_their_backward():
    network = reads(lambda m, x: Straight.apply(x) * 2, "pointwise", "scale")
    model = Code(lambda m, x: Straight.apply(x) * 2).eval()
    network = read_network(model, SHAPE, gradient=True)
    assert [stage.kind for stage in network.stages[2:]] == ["map", "scale"]
    x = torch.randn(1, 4, 20, 24, requires_grad=True)
    network.stages[2].run(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_other_ways_to_run_code():
    scripted = torch.jit.script(_scripted)
    reads(lambda m, x: scripted(x), "relu", "pointwise", "product")
    for reentrant in (True, False):
        run_again = torch.utils.checkpoint.checkpoint
        reads(lambda m, x, r=reentrant: run_again(F.relu, x, use_reentrant=r), "relu")
    reads(lambda m, x: torch.func.vmap(lambda t: t.relu() * 2)(x), "relu", "scale")
    reads(lambda m, x: torch.ops.aten.relu(torch._C._nn.silu(x)), "pointwise", "relu")
    reads(lambda m, x: torch.as_tensor(x) * 2, "scale")
    reads(lambda m, x: nn.Parameter(x) * 2, "scale")
    reads(lambda m, x: torch.compile(lambda t: t.relu() + 1)(x), "relu", "scale")


def _scripted(x: torch.Tensor) -> torch.Tensor:
    y = F.relu(x)
    return y * torch.tanh(y)


def test_outputs_that_are_several_tensors():
    model = Code(lambda m, x: {"out": x.relu(), "sizes": 3, "more": [x.mean((2, 3)), (x,)]}).eval()
    network = read_network(model, SHAPE)
    images = torch.randn(2, *SHAPE)
    with torch.no_grad():
        made, wanted = network.rebuild(run(network, images)), model(images)
    torch.testing.assert_close(made, wanted)


def test_the_model_is_left_as_it_was():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.last = self.kept = None

        def forward(self, x):
            self.last = self.conv(x) + torch.ones(4, 1, 1)
            self.fresh = [self.last]
            return F.relu(self.last)

    model = Remembers()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    read_network(model, SHAPE)
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}
    assert model.last is None and model.training


def test_compiled_parts_are_read_as_written():
    model = Code(lambda m, x: m.block(x), block=nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU())).eval()
    model.block.compile()
    assert [stage.kind for stage in read_network(model, SHAPE).stages] == ["input", "conv", "conv", "relu"]


def test_torchscript_is_followed():
    reads(lambda m, x: m.part(x), "relu", part=torch.jit.script(nn.Sequential(nn.ReLU())))


class Announced(nn.Conv2d):
    """A class of modules that has its own way of calling itself."""

    def __call__(self, x):
        return super().__call__(x) + 1


class Impl(nn.Conv2d):
    def _call_impl(self, *args):
        return super()._call_impl(*args) * 2


@pytest.mark.parametrize(
    ("layer", "kinds"),
    [
        (Announced(3, 4, 3), ("conv", "scale")),
        (Impl(3, 4, 3), ("conv", "scale")),
        (nn.Conv2d(3, 4, 3), ("conv",)),
    ],
    ids=["__call__", "_call_impl", "neither"],
)
def test_modules_that_call_themselves_their_own_way(layer, kinds):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer
            self.hidden = [nn.ReLU()]  # no module of the model's, to torch

        def forward(self, x):
            return self.hidden[0](self.layer(x))

    kinds = ("input", *kinds, "relu")
    before = dict(vars(nn.Module))
    model = Outer().eval()
    network = read_network(model, SHAPE)
    assert tuple(stage.kind for stage in network.stages) == kinds
    assert dict(vars(nn.Module)) == before
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(run(network, x), model(x))


def test_threads_read_and_run_at_once():
    model = Code(lambda m, x: m.block(x), block=nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU())).eval()
    images = torch.randn(2, *SHAPE)
    wanted = model(images)
    errors = []

    def work(reading):
        try:
            for _ in range(30):
                if reading:
                    assert len(read_network(model, SHAPE).stages) == 4
                else:
                    assert torch.equal(model(images), wanted)
        except BaseException as error:  # noqa: BLE001 - a thread's failure must reach the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# ---- geometry ----------------------------------------------------------------------------------------------


def field_by_gradient(model, shape, place):
    """(y0, x0, y1, x1) of the pixels that reach one place of the output, weights and pixels being
    positive.
    """
    x = torch.zeros(1, *shape, dtype=torch.float64).requires_grad_()
    y = model(x)[0, :, place[0], place[1]].sum()
    (g,) = torch.autograd.grad(y, x)
    rows, columns = g[0].abs().sum((0, 2)).nonzero(), g[0].abs().sum((0, 1)).nonzero()
    return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 2, (5, 3), (2, 3), (2, 1))
        self.b = nn.Conv2d(2, 2, 3, dilation=(2, 3), padding=(1, 4))
        self.c = nn.Conv2d(2, 2, 1, padding=0)
        self.d = nn.Conv2d(2, 2, (4, 2), padding="same")
        self.pool = nn.AvgPool2d(3, 2, 1)

    def forward(self, x):
        x = self.a(x)
        x = self.b(x) + F.pad(self.c(x), (2, 0, -2, 0))
        return self.pool(torch.cat([self.d(x), x], 1))


def test_fields_are_what_gradients_reach():
    model = Branches().double()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    shape = (2, 61, 73)
    network = read_network(model, shape)
    size, jump, offset = network.layer.field
    height, width = network.layer.shape[1:]
    for place in ((0, 0), (height // 2, width // 2), (height - 1, width - 1), (1, width - 2)):
        start = [p * j + o for p, j, o in zip(place, jump, offset, strict=True)]
        end = [s + n for s, n in zip(start, size, strict=True)]
        wanted = field_by_gradient(model, shape, place)
        clipped = (max(start[0], 0), max(start[1], 0), min(end[0], 61), min(end[1], 73))
        if place == (height // 2, width // 2):
            assert clipped == wanted == (*start, *end)
        # At a border the padding may hide what the box covers, never the other way round.
        assert clipped[0] <= wanted[0] and clipped[1] <= wanted[1]
        assert clipped[2] >= wanted[2] and clipped[3] >= wanted[3]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * (x.eq_(x.relu()) + 1),
        lambda m, x: m.conv2(x.logical_or_(torch.zeros(4, 1, 1))),
        lambda m, x: m.conv2(x.mul_(torch.linspace(0, 1, 4, dtype=torch.float64).view(4, 1, 1))),
        lambda m, x: m.conv2((x * torch.linspace(0, 1, 4, dtype=torch.float64).view(4, 1, 1)).to(x.dtype)),
        lambda m, x: m.conv2(torch.zeros_like(x).copy_(x > 0)),
    ],
)
def test_results_of_another_dtype(function):
    """What is written takes the dtype of what it is written to; what a wider constant makes is wider."""
    reads(function, conv2=nn.Conv2d(4, 4, 1))


def test_powers_of_maps():
    reads(lambda m, x: torch.pow(x.abs() + 1, x), "pointwise", "scale", "map")
    reads(lambda m, x: (x.abs() + 1).float_power(x).to(x.dtype), "pointwise", "scale", "map")
    reads(lambda m, x: x.pow_(2), "pointwise")
    reads(lambda m, x: x.abs().pow_(x), "pointwise", "map")


def test_products_with_rows():
    """A gate is one number, or one for each channel; what is broadcast along rows alone is no product of the engines'."""
    reads(lambda m, x: x * x.mean(3, keepdim=True).sigmoid(), "map", "pointwise", "map")
    reads(lambda m, x: x * x.mean(1, keepdim=True).sigmoid(), "map", "pointwise", "product")
    reads(lambda m, x: x.mean((2, 3), keepdim=True) * x.mean(1, keepdim=True), "map", "map", "product")


@pytest.mark.parametrize("parts", [lambda v: v.chunk(2, 1), lambda v: v.unbind(1), lambda v: v.split([1, 3], 1)])
def test_writes_to_parts_have_a_gradient(parts):
    """Autograd forbids writes to one of several views, which the stage of such a write does without."""

    def function(m, x):
        y = x * 1
        for i, part in enumerate(parts(y)):
            part.mul_(i + 2)
        return y

    model = Code(function).eval()
    network = read_network(model, SHAPE, gradient=True)
    images = torch.randn(2, *SHAPE, requires_grad=True)
    (found,) = torch.autograd.grad(run(network, images).square().sum(), images)
    with torch.no_grad():
        factors = function(model, torch.ones(2, 4, 1, 1)) ** 2
    (wanted,) = torch.autograd.grad((model.conv(images).square() * factors).sum(), images)
    torch.testing.assert_close(found, wanted)


def test_views_that_are_more_than_a_geometry():
    for function in (lambda m, x: torch.ops.aten._neg_view(x) * 2, lambda m, x: x[:, 1:]._view_func(x)):
        with pytest.raises(UnsupportedOperation):
            read_network(Code(function).eval(), SHAPE)


def test_custom_functions_that_are_told_the_number_of_images():
    model = Code(lambda m, x: x.resize_as(x.flatten(1))).eval()
    with pytest.raises(UnsupportedOperation):
        read_network(model, SHAPE, gradient=True)
    reads(lambda m, x: torch.ops.aten.hardtanh_(x, 1.0, 0.5), "pointwise")


def test_constants_written_over_a_map():
    """They leave no gradient, and no operation that has none."""

    def function(m, x):
        x[:, 1:] = torch.arange(24.0)
        return x * 2

    reads(function)
    for constant in (torch.ones(4, 1, 1), 1):
        model = Code(lambda m, x, constant=constant: x.copy_(constant) * 2).eval()
        images = torch.randn(2, *SHAPE, requires_grad=True)
        out = run(read_network(model, SHAPE, gradient=True), images)
        assert torch.equal(out, torch.full((2, 4, 20, 24), 2.0))
        (slope,) = torch.autograd.grad(out.sum(), images)
        assert not slope.any()


def test_slopes_laid_over_a_map():
    reads(lambda m, x: torch.ops.aten._prelu_kernel(x, torch.linspace(0, 1, 4).view(1, 4, 1, 1)), "pointwise")
    reads(lambda m, x: torch.ops.aten._prelu_kernel(x, torch.full((5, 4, 1, 1), 0.5)[:1]), "pointwise")


def test_what_the_forward_made_is_written_to_while_it_computes():
    """With an example, the constant that a stage holds keeps the values that it had."""

    def function(m, x):
        y = torch.full_like(x, 0.3)
        z = x * y
        y.add_(x)
        return z + y

    model = Code(function).eval()
    model.conv.register_forward_hook(lambda m, a, out: out * 0.5)
    images = torch.randn(2, *SHAPE)
    network = read_network(model, SHAPE, None, images)
    torch.testing.assert_close(run(network, images), model(images))


def test_no_field_where_everything_is_seen():
    network = reads(lambda m, x: x * x.mean((2, 3), keepdim=True))
    assert [stage.field is None for stage in network.stages] == [False, False, True, True]
    # Branches of different strides have no common box.
    model = nn.Module()
    network = reads(
        lambda m, x: F.max_pool2d(x, 2)[:, :, :] + m.far(x), far=nn.Conv2d(4, 4, 3, dilation=(5, 6)),
        shape=(3, 20, 24),
    )  # fmt: skip
    assert model is not None and network.layer.field is None


# ---- eval mode ---------------------------------------------------------------------------------------------


def test_evaluating_restores_every_module():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="on purpose"), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("on purpose")
    assert [module.training for module in model.modules()] == before
    with evaluating(model):
        with evaluating(model[1]):  # a part of it, for another call
            pass
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_evaluating_in_threads():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm2d(2)))
    barrier, failures = threading.Barrier(8), []

    def work(part):
        barrier.wait()
        for _ in range(300):
            with evaluating(part):
                if any(module.training for module in part.modules()):
                    failures.append(part)

    threads = [threading.Thread(target=work, args=((model, model[1])[i % 2],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and all(module.training for module in model.modules())


def test_evaluating_does_not_call_eval():
    class Merges(nn.Module):
        def train(self, mode=True):
            raise AssertionError("a model's own train() may do more than set flags")

    with evaluating(Merges()):
        pass
