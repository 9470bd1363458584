"""The network that the paper corrects."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zfcore.models.layers import ContrastNorm, MaxPool2d
from zfcore.models.zfnet import initialise


class AlexNet(nn.Module):
    """The network of Krizhevsky, Sutskever and Hinton (2012), for pictures of 224 x 224 pixels.

    conv1 is 11 x 11 with stride 4 and conv2 5 x 5 with stride 1; ZFNet's are 7 x 7 with stride 2 and 5 x 5
    with stride 2. The original ran on two GPUs, each with half of the maps of conv2, conv4 and conv5: here
    ``groups=2``. 60,965,224 parameters then, 62,378,344 with ``groups=1``, at 1000 classes. Padding conv1 by
    2 gives the 55 x 55 maps that its paper states. Weights start at N(0, 0.01), the biases of conv2, conv4,
    conv5, fc6 and fc7 at 1 and the others at 0, from torch's global generator.

    Args:
        num_classes: C, the number of logits.
        in_channels: the picture's channels.
        groups: 1, or 2 for the two-GPU original.
        contrast_norm: normalise across feature maps after relu1 and relu2, as the original does.

    Shape: x [N, in_channels, 224, 224] float, the training mean subtracted, to logits [N, C].

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.1 (what it corrects).
    """

    def __init__(
        self, num_classes: int = 1000, in_channels: int = 3, groups: int = 2, contrast_norm: bool = True
    ):
        super().__init__()

        def norm():
            return ContrastNorm() if contrast_norm else nn.Identity()

        self.conv1 = nn.Conv2d(in_channels, 96, 11, stride=4, padding=2)
        self.relu1 = nn.ReLU()
        self.norm1 = norm()
        self.pool1 = MaxPool2d(3, 2)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=groups)
        self.relu2 = nn.ReLU()
        self.norm2 = norm()
        self.pool2 = MaxPool2d(3, 2)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=groups)
        self.relu4 = nn.ReLU()
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=groups)
        self.relu5 = nn.ReLU()
        self.pool5 = MaxPool2d(3, 2)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.relu6 = nn.ReLU()
        self.dropout6 = nn.Dropout(0.5)
        self.fc7 = nn.Linear(4096, 4096)
        self.relu7 = nn.ReLU()
        self.dropout7 = nn.Dropout(0.5)
        self.fc8 = nn.Linear(4096, num_classes)
        initialise(self)
        for layer in (self.conv2, self.conv4, self.conv5, self.fc6, self.fc7):
            nn.init.ones_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.norm1(self.relu1(self.conv1(x))))  # [N, 96, 27, 27]
        x = self.pool2(self.norm2(self.relu2(self.conv2(x))))  # [N, 256, 13, 13]
        x = self.relu3(self.conv3(x))
        x = self.relu4(self.conv4(x))
        x = self.pool5(self.relu5(self.conv5(x)))  # [N, 256, 6, 6]
        x = self.dropout6(self.relu6(self.fc6(torch.flatten(x, 1))))
        x = self.dropout7(self.relu7(self.fc7(x)))
        return self.fc8(x)


def alexnet(
    num_classes: int = 1000, in_channels: int = 3, groups: int = 2, contrast_norm: bool = True
) -> AlexNet:
    """The network of Krizhevsky et al. (2012), untrained; the arguments are those of ``AlexNet``."""
    return AlexNet(num_classes, in_channels, groups, contrast_norm)
