"""Small networks, one for each way in which a change travels, and the plain forwards that they are compared with."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 7
SIZE = (26, 23)  # of the pictures that they take


class Branches(nn.Module):
    """A DAG: branches of different receptive fields meet in a cat, one of them twice, and a sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow, self.wide = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 5, padding=2)
        self.far = nn.Conv2d(8, 4, 3, padding=4, dilation=4)
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 6, 1), nn.ReLU())
        self.full = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.stem(x).relu()
        added = self.narrow(x) + self.pooled(x)
        y = torch.cat([added, self.far(x).relu(), self.wide(x).relu()], 1)
        return self.full(F.max_pool2d(y, 2).mean((2, 3)))


class Dense(nn.Module):
    """Each layer reads all before it; a map is joined with itself, and added to itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(8, 5, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(13), nn.Conv2d(26, 6, 3, stride=2)
        self.full = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = torch.cat([x, self.a(x).relu()], 1)
        x = torch.cat([x, self.b(x).relu()], 1)
        x = F.relu(self.norm(x))
        x = self.c(torch.cat([x, x], 1)).relu()
        return self.full((x + x).mean((2, 3)))


class Squeezed(nn.Module):
    """Squeeze and excitation: a map times what a whole map of it says."""

    def __init__(self):
        super().__init__()
        self.a, self.down, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.b, self.full = nn.Conv2d(8, 8, 3, stride=2), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.a(x).relu()
        x = x * torch.sigmoid(self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()))
        return self.full(self.b(x).relu().mean((2, 3)))


class Shared(nn.Module):
    """One convolution and one rectifier called again and again, and normalised pictures."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, -0.2, 0.3])[:, None, None])
        self.first, self.conv, self.relu = nn.Conv2d(3, 6, 3, stride=2), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
        self.full = nn.Linear(6 * 6 * 5, CLASSES)

    def forward(self, x):
        x = (x - self.mean) / 0.5
        x = self.relu(self.first(x))
        x = self.relu(self.conv(-self.relu(self.conv(x) * 1.5)))
        return 2 * self.full(F.max_pool2d(x, 2).flatten(1)) + 1


class Unflattened(nn.Module):
    """A convolution of what was a row of features."""

    def __init__(self):
        super().__init__()
        self.a, self.middle, self.b = nn.Conv2d(3, 6, 3, stride=3), nn.Linear(6 * 8 * 7, 48), nn.Conv2d(3, 5, 3)
        self.full = nn.Linear(5 * 2 * 2, CLASSES)

    def forward(self, x):
        x = self.middle(self.a(x).relu().flatten(1)).relu()
        return self.full(self.b(x.view(-1, 3, 4, 4)).relu().flatten(1))


class Sliced(nn.Module):
    """Maps cut, split and transposed: operations that read whole maps."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.full = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, CLASSES)

    def forward(self, x):
        one, two = self.a(x).relu()[:, :, 1:-2].split(4, 1)
        return self.full(self.b((one - 0.5 * two).transpose(2, 3)).relu().amax((2, 3)))


class Aliased(nn.Module):
    """A change that two stages share, and that is read once more after the one has been read for the last time."""

    def __init__(self):
        super().__init__()
        self.a, self.full = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = F.max_pool2d(self.a(x), 2).clone()
        y = F.leaky_relu(x, 0.3) + x
        return self.full((y + F.relu6(y)).mean((2, 3)))


def _head(channels):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)


def _norm(channels):
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.running_mean, -0.3, 0.3)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.uniform_(norm.weight, -1, 1)
    nn.init.uniform_(norm.bias, -0.3, 0.3)
    return norm


def _dying_norm(channels):
    norm = _norm(channels)
    with torch.no_grad():
        norm.weight[0] = 0
        norm.weight[1:] = -norm.weight[1:].abs()
    return norm


NETWORKS = {
    "branches": Branches,
    "dense": Dense,
    "squeeze and excitation": Squeezed,
    "shared modules": Shared,
    "unflattened": Unflattened,
    "sliced": Sliced,
    "aliased": Aliased,
    "depthwise separable": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), _norm(16), nn.ReLU6(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), _norm(16),
        nn.ReLU6(), nn.Conv2d(16, 24, 1), _norm(24), *_head(24),
    ),
    "same padding, even kernels": lambda: nn.Sequential(
        nn.Conv2d(3, 8, (4, 2), padding="same"), nn.ReLU(), nn.Conv2d(8, 8, 2, padding="same", dilation=3), nn.ReLU(),
        nn.Conv2d(8, 8, (2, 6), padding="same"), *_head(8),
    ),
    "rectifiers": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.Hardtanh(0, 0.4),
        nn.MaxPool2d(2), nn.LeakyReLU(0.5), nn.Conv2d(8, 8, 3), nn.Threshold(0, 0), *_head(8),
    ),
    "average pools": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AvgPool2d(2, 2, 1, ceil_mode=True), nn.Conv2d(8, 8, 2), nn.ReLU(), nn.AvgPool2d(3, 1, divisor_override=5),
        *_head(8),
    ),
    "max pools": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(8, 8, 3),
        nn.MaxPool2d((2, 3), (2, 3), (1, 1), ceil_mode=True), nn.Conv2d(8, 8, 1), nn.ReLU(),
        nn.MaxPool2d(2, 1, 0, dilation=2), *_head(8),
    ),
    "crops": lambda: nn.Sequential(
        nn.ZeroPad2d((2, -1, -2, 3)), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ZeroPad2d((-4, -5, 1, -6)), nn.Conv2d(8, 8, 3),
        nn.ReLU(), nn.ZeroPad2d(2), *_head(8),
    ),
    "adaptive pools": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveMaxPool2d((9, 8)), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d((4, 5)), nn.Conv2d(8, 8, 2), nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(),
        nn.Linear(48, CLASSES),
    ),
    "any function": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 8, 3, 2), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.Tanh(),
        nn.Flatten(), nn.Linear(8 * 9 * 8, 12), nn.GELU(), nn.Linear(12, CLASSES),
    ),
    "contrast": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.LocalResponseNorm(5, 0.1), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3),
        nn.LocalResponseNorm(4, 0.5, 0.5, 2.0), nn.ReLU(), *_head(12),
    ),
    "factors below zero": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), _dying_norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), _dying_norm(8), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), _norm(8), _dying_norm(8), nn.ReLU6(), *_head(8),
    ),
    "strides above the kernel": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 2, 3), nn.ReLU(), nn.Conv2d(8, 8, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5 * 4, CLASSES),
    ),
    "full layers": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 12 * 11, 20), nn.ReLU(), nn.Dropout(),
        nn.Linear(20, 16), nn.BatchNorm1d(16), nn.LeakyReLU(), nn.Linear(16, CLASSES), nn.Softmax(1),
    ),
    "features of the picture": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 26 * 23, 30), nn.ReLU(), nn.Linear(30, CLASSES)),
}  # fmt: skip


def build(name, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().to(dtype).eval()


def pictures(count, size=SIZE, seed=1, dtype=torch.float32) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_pair(value):
    return value if isinstance(value, tuple) else (value, value)


def boxes_of(size, box, stride) -> list[list[tuple[int, int, int, int]]]:
    """Captum's grid, written out."""
    (height, width), (bh, bw), (sy, sx) = size, as_pair(box), as_pair(stride)
    ys = [i * sy for i in range(math.ceil(max(height - bh, 0) / sy) + 1)]
    xs = [i * sx for i in range(math.ceil(max(width - bw, 0) / sx) + 1)]
    return [[(y, x, y + bh, x + bw) for x in xs] for y in ys]


def painted(images, box, stride, fill=0.0) -> Tensor:
    """Every image with every box: [N, Gy, Gx, C, H, W]."""
    fill = torch.as_tensor(fill, dtype=images.dtype)
    fill = (fill[:, None, None] if fill.dim() == 1 else fill).expand(images.shape)
    grid = boxes_of(images.shape[-2:], box, stride)
    rows = []
    for image, paint in zip(images, fill, strict=True):
        for y0, x0, y1, x1 in sum(grid, []):
            rows.append(image.clone())
            rows[-1][:, y0:y1, x0:x1] = paint[:, y0:y1, x0:x1]
    return torch.stack(rows).view(len(images), len(grid), len(grid[0]), *images.shape[1:])


def by_forwards(model, images, box, stride, fill=0.0):
    """The definition: what the model returns for every painted image, [N, Gy, Gx, ...]."""
    rows = painted(images, box, stride, fill)
    with torch.no_grad():
        output = model(rows.flatten(0, 2))
    return output.view(*rows.shape[:3], *output.shape[1:])


def totals(model, module, rows, call=-1):
    """The sums of a layer's maps, [len(rows), units], in a plain forward of the rows [B, C, H, W]."""
    seen = []
    # Cloned here: what follows in the forward may write over the map in place.
    handle = module.register_forward_hook(lambda m, i, output: seen.append(output.clone()))
    with torch.no_grad():
        model(rows)
    handle.remove()
    return seen[call].flatten(2).sum(2) if seen[call].dim() > 2 else seen[call]


def close(actual, wanted, tolerance=1e-5) -> bool:
    return bool((actual - wanted).abs().max() <= tolerance * wanted.abs().max())
