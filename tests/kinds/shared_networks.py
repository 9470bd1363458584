"""What the tests of modes and of threads analyse."""

import torch
from torch import nn

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Unread(nn.Module):
    """A network that no tracer follows."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) if x.sum() < 1e9 else x


def network(inplace=False):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.SiLU(),
        nn.Flatten(), nn.Linear(150, 5),
    )  # fmt: skip
