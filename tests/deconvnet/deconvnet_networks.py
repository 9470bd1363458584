"""Small networks with every trait that the reader and the deconvnet must get right, with weights that make
maps vary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Op(nn.Module):
    """A functional operation with a name, so that a test can ask for its output."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def vgg():
    """A chain with in-place module ReLUs and full layers; images 3 x 32 x 32."""

    def block(c, k):
        return [nn.Conv2d(c, k, 3, padding=1), nn.ReLU(inplace=True)]

    return nn.Sequential(
        nn.Sequential(
            *block(3, 8), *block(8, 8), nn.MaxPool2d(2),
            *block(8, 12), *block(12, 12), nn.MaxPool2d(2, 2),
            *block(12, 16), nn.MaxPool2d(2),
        ),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 24), nn.ReLU(), nn.Dropout(),
        nn.Linear(24, 10),
    )  # fmt: skip


class AlexNet(nn.Module):
    """All functional: odd sizes, ceil_mode, LRN, grouped and dilated convs, nothing square; images 3 x 67 x
    75.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, (7, 5), (2, 3), (2, 1))
        self.relu1 = Op(F.relu)
        self.norm1 = Op(lambda x: F.local_response_norm(x, 5, 1e-2, 0.75, 2.0))
        self.pool1 = Op(lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True))
        self.conv2 = nn.Conv2d(8, 12, 3, padding=(2, 1), dilation=(2, 1), groups=2)
        self.relu2 = Op(lambda x: x.clamp(min=0))
        self.pool2 = Op(lambda x: F.max_pool2d(x, (3, 2), (2, 1), padding=(1, 1), dilation=(1, 2)))
        self.conv3 = nn.Conv2d(12, 12, (1, 3), padding="same", groups=3)
        self.conv4 = nn.Conv2d(12, 16, (4, 2), padding="same")
        self.relu4 = Op(torch.relu)
        self.pool4 = Op(lambda x: torch.max_pool2d(x, 3, 3))
        self.fc5 = nn.Linear(16 * 2 * 4, 20)
        self.fc6 = nn.Linear(20, 7)

    def forward(self, x):
        x = self.pool1(self.norm1(self.relu1(self.conv1(x))))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = F.relu(self.conv3(x), inplace=True)
        x = self.pool4(self.relu4(self.conv4(x)))
        x = x.view(x.size(0), -1)
        x = F.relu(self.fc5(F.dropout(x, training=self.training)))
        return F.log_softmax(self.fc6(x), 1)


class Residual(nn.Module):
    def __init__(self, c, k, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c, k, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(k)
        self.conv2 = nn.Conv2d(k, k, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(k)
        self.relu = nn.ReLU(inplace=True)  # used twice
        self.down = None
        if stride != 1 or c != k:
            self.down = nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))

    def forward(self, x):
        identity = x if self.down is None else self.down(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Skips, strided skips, BatchNorm with statistics, one in-place ReLU for many; images 3 x 49 x 45."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 5, 2, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Residual(8, 8, 1), Residual(8, 8, 1))
        self.layer2 = nn.Sequential(Residual(8, 12, 2), Residual(12, 12, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(12, 9)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class Inception(nn.Module):
    """Branches of several fields, joined; an average-pooling branch, and a pool beside a strided conv."""

    def __init__(self, c, include_pad):
        super().__init__()
        self.one = nn.Conv2d(c, 4, 1)
        self.three = nn.Sequential(nn.Conv2d(c, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1))
        self.five = nn.Sequential(
            nn.Conv2d(c, 3, (1, 3), padding=(0, 1)), nn.ReLU(), nn.Conv2d(3, 4, (5, 1), padding=(2, 0))
        )
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=include_pad), nn.Conv2d(c, 4, 1))

    def forward(self, x):
        return F.relu(torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1))


class GoogLeNet(nn.Module):
    """Inception blocks; images 3 x 41 x 35."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True))
        self.a = Inception(8, True)
        self.reduce_conv = nn.Conv2d(18, 6, 3, 2)
        self.reduce_pool = nn.MaxPool2d(3, 2)
        self.joined = Op(lambda a, b: torch.cat((a, b), dim=1))
        self.b = Inception(24, False)
        self.fc = nn.Linear(18, 5)

    def forward(self, x):
        x = self.a(self.stem(x))
        x = self.b(self.joined(self.reduce_conv(x), self.reduce_pool(x)))
        return F.softmax(self.fc(x.mean([2, 3])), dim=1)


class Squeeze(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class MobileNet(nn.Module):
    """Depthwise separable convs, ReLU6, squeeze and excitation, a global pooling head; images 3 x 37 x 43."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.ReLU6()
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.bn = nn.BatchNorm2d(12)
        self.se = Squeeze(12)
        self.leaky = nn.LeakyReLU(0.2)
        self.wide = nn.Conv2d(12, 12, 3, 2, 1, groups=12)
        self.head = nn.Linear(12, 6)

    def forward(self, x):
        x = self.act(self.depthwise(self.stem((x - 0.1) * 2.0)))
        x = self.se(self.bn(self.pointwise(x)))
        x = self.wide(self.leaky(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Overlapping(nn.Module):
    """Pools whose windows overlap, padded, with and without a rectifier below; images 2 x 33 x 29."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.pool1 = nn.MaxPool2d(3, 1, 1)
        self.conv2 = nn.Conv2d(6, 6, 3)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(3, 2, 1)
        self.conv3 = nn.Conv2d(6, 8, 3, padding=1)
        self.relu3 = nn.ReLU()
        self.pool3 = nn.MaxPool2d(5, 2, 2)

    def forward(self, x):
        x = self.pool2(self.relu2(self.conv2(self.pool1(self.conv1(x)))))
        return self.pool3(self.relu3(self.conv3(x)))


class Inverted(nn.Module):
    """A mobile block: narrow, wide, depthwise, gated, narrow; its input goes round it where the shapes agree."""

    def __init__(self, c, k, wide, kernel, stride, act, gate):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide), act())
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False), nn.BatchNorm2d(wide), act()
        )
        self.fc1, self.fc2, self.gate = nn.Conv2d(wide, 4, 1), nn.Conv2d(4, wide, 1), gate()
        self.project = nn.Sequential(nn.Conv2d(wide, k, 1, bias=False), nn.BatchNorm2d(k))
        self.skips = stride == 1 and c == k

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        y = self.project(self.gate(self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True))))) * y)
        return x + y if self.skips else y


class EfficientNet(nn.Module):
    """Functions of each value, gates, depthwise filters of several sizes and strides; images 3 x 37 x 43."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU(inplace=True))
        self.smooth = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.GELU(), nn.Conv2d(8, 8, 1), nn.Hardswish())
        self.a = Inverted(8, 8, 20, 3, 1, nn.SiLU, nn.Sigmoid)
        self.b = Inverted(8, 12, 24, 5, 2, nn.Hardswish, nn.Hardsigmoid)
        self.c = Inverted(12, 12, 24, 5, 1, nn.ReLU6, nn.Sigmoid)
        self.head = nn.Linear(12, 6)

    def forward(self, x):
        return self.head(self.c(self.b(self.a(self.smooth(self.stem(x))))).mean((2, 3)))


class ShuffleUnit(nn.Module):
    """Half of the channels go round, the other half through; both are shuffled."""

    def __init__(self, c):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(c // 2, c // 2, 1), nn.ReLU(),
            nn.Conv2d(c // 2, c // 2, 3, 1, 1, groups=c // 2), nn.BatchNorm2d(c // 2),
        )  # fmt: skip

    def forward(self, x):
        a, b = x.chunk(2, 1)
        x = torch.cat((a, self.branch(b)), 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleNet(nn.Module):
    """Channels cut, picked, repeated and shuffled; images 3 x 41 x 35."""

    def __init__(self):
        super().__init__()
        self.flip = Op(lambda x: x[:, [2, 1, 0]])
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.unit = ShuffleUnit(8)
        self.parts = nn.ModuleList(nn.Conv2d(n, 5, 3, padding=1) for n in (2, 5, 3))
        self.sum = Op(lambda a, b, c: a + b + c)
        self.part = Op(lambda x: x[:, 1:])
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = self.unit(self.stem(self.flip(x)))
        a, b, c = x.split([2, 3, 3], 1)
        b = torch.cat((b, a), 1)
        return self.conv(self.part(self.sum(*(m(x) for m, x in zip(self.parts, (a, b, c), strict=True)))))


class DenseNet(nn.Module):
    """Every layer reads all before it, from a normalisation on; pools of means between; images 3 x 45 x 37."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.layers = nn.ModuleList(self.layer(6 + 4 * i) for i in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 8, 1), nn.AvgPool2d(2))
        self.late = nn.ModuleList(self.layer(8 + 4 * i) for i in range(3))
        self.norm = nn.BatchNorm2d(20)

    @staticmethod
    def layer(c):
        return nn.Sequential(
            nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, 1, 1)
        )

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat((x, layer(x)), 1)
        x = self.transition(x)
        for layer in self.late:
            x = torch.cat((x, layer(x)), 1)
        return self.norm(x)


class Products(nn.Module):
    """Maps times maps, times themselves, times one map for all channels; a sum of a cat; images 3 x 25 x 31."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(3, 6, 5, 1, 2)
        self.both = Op(lambda a, b: a * torch.tanh(b))
        self.conv = nn.Conv2d(6, 6, 3, 2, 1)
        self.square = Op(lambda x: x * x)
        self.mask = nn.Conv2d(6, 1, 3, 1, 1)
        self.masked = Op(lambda x, m: x * m.sigmoid())
        self.one, self.two, self.three = nn.Conv2d(6, 3, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 3, 3, 1, 1)
        self.joined = Op(lambda a, b, c: torch.cat((a, b), 1) + c)
        self.last = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        x = self.square(self.conv(self.both(self.left(x), self.right(x))))
        x = self.masked(x, self.mask(x))
        one, two = self.one(x), torch.relu(self.two(x))  # between what is joined, and added after
        return self.last(self.joined(one, self.three(x), two))


class Controlled(nn.Module):
    """Any network behind a question about its input, which no tracer can answer."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) if bool(x.abs().sum() >= 0) else self.net(-x)


class Attention(nn.Module):
    """A conv net with a block of attention over its positions; images 3 x 32 x 32."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(inplace=True))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.conv = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        n, c, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        s = self.norm(t)
        t = t + self.attention(s, s, s, need_weights=False)[0]
        t = t + self.mlp(t)
        x = F.relu_(self.conv(t.transpose(1, 2).reshape(n, c, h, w)))
        return self.head(x.mean((2, 3)))


def randomise(model):
    """Weights that keep the scale of maps, and statistics that make every normalisation do something."""
    generator = torch.Generator().manual_seed(7)

    def normal(like, std):
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like) * std

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan = module.weight[0].numel()
                module.weight.copy_(normal(module.weight, (2 / fan) ** 0.5))
                if module.bias is not None:
                    module.bias.copy_(normal(module.bias, 0.1))
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(normal(module.weight, 1.0))  # negative ones too
                module.bias.copy_(normal(module.bias, 0.3))
                module.running_mean.copy_(normal(module.running_mean, 0.5))
                module.running_var.copy_(normal(module.running_var, 0.5).exp())
    return model.eval()


# name: (factory, image shape, layers to project)
NETWORKS = {
    "vgg": (
        vgg, (3, 32, 32),
        ["0.0", "0.1", "0.2", "0.4", "0.5", "0.7", "0.9", "0.10", "0.12", "0", "2", "3", "5"]),
    "alexnet": (
        AlexNet, (3, 67, 75),
        ["conv1", "relu1", "norm1", "pool1", "conv2", "relu2", "pool2", "conv3", "conv4", "relu4", "pool4",
        "fc5", "fc6"],
    ),
    "resnet": (
        ResNet, (3, 49, 45),
        ["conv1", "bn1", "maxpool", "layer1.0.conv1", "layer1.0.bn2", "layer1.0", "layer1", "layer2.0.down",
         "layer2.0.conv2", "layer2.0", "layer2.1.relu", "layer2", "avgpool", "fc"],
    ),
    "googlenet": (
        GoogLeNet, (3, 41, 35),
        ["stem", "a.one", "a.five", "a.pool", "a", "reduce_conv", "reduce_pool", "joined", "b.three.2",
        "b.pool", "b", "fc"],
    ),
    "mobilenet": (
        MobileNet, (3, 37, 43),
        ["stem", "depthwise", "act", "pointwise", "bn", "se", "leaky", "wide", "head"],
    ),
    "overlapping": (Overlapping, (2, 33, 29), ["pool1", "conv2", "pool2", "conv3", "relu3", "pool3"]),
    "efficientnet": (
        EfficientNet, (3, 37, 43),
        ["stem", "smooth.1", "smooth", "a.depthwise", "a", "b.depthwise.0", "b.gate", "b", "c.project", "c", "head"],
    ),
    "shufflenet": (ShuffleNet, (3, 41, 35), ["stem", "unit.branch", "unit", "parts.1", "sum", "part", "conv"]),
    "densenet": (DenseNet, (3, 45, 37), ["layers.2", "transition", "late.0.2", "late.2", "norm"]),
    "products": (Products, (3, 25, 31), ["both", "square", "masked", "two", "joined", "last"]),
}  # fmt: skip


def make(name, dtype=torch.float32):
    factory, shape, _ = NETWORKS[name]
    torch.manual_seed(3)
    return randomise(factory()).to(dtype), torch.randn(2, *shape, dtype=torch.float64).to(dtype)
