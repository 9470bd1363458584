"""The paper's network, and a small one of the same kind for pictures of 28 to 64 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zfcore.models.layers import ContrastNorm, MaxPool2d


class ZFNet(nn.Module):
    """The network of figure 3, for pictures of 224 x 224 pixels.

    ==========  =====  ===============================  ===========  ==========
    layer       maps   convolution                      then pooled  output
    ==========  =====  ===============================  ===========  ==========
    conv1       96     7 x 7, stride 2, padding 1       pool1        110 -> 55
    conv2       256    5 x 5, stride 2                  pool2        26 -> 13
    conv3       384    3 x 3, padding 1                              13
    conv4       384    3 x 3, padding 1                              13
    conv5       256    3 x 3, padding 1                 pool5        13 -> 6
    fc6, fc7    4096   full, dropout 0.5
    fc8         C      full, logits
    ==========  =====  ===============================  ===========  ==========

    Pools are 3 x 3 with stride 2, padded by 1 but for pool5; the paper gives sizes and no paddings, and these
    give its sizes. A ReLU follows every layer but fc8. 62,357,608 parameters and 1.17 GMAC a picture at 1000
    classes. Weights start at N(0, 0.01) and biases at 0, from torch's global generator.

    Args:
        num_classes: C, the number of logits.
        in_channels: the picture's channels.
        contrast_norm: normalise across feature maps after pool1 and pool2, as the paper does.

    Shape: x [N, in_channels, 224, 224] float, the training mean subtracted, to logits [N, C].

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4 and figure 3; section 3 (initial weights).
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, contrast_norm: bool = False):
        super().__init__()

        def norm():
            return ContrastNorm() if contrast_norm else nn.Identity()

        self.conv1 = nn.Conv2d(in_channels, 96, 7, stride=2, padding=1)
        self.relu1 = nn.ReLU()
        self.pool1 = MaxPool2d(3, 2, padding=1)
        self.norm1 = norm()
        self.conv2 = nn.Conv2d(96, 256, 5, stride=2)
        self.relu2 = nn.ReLU()
        self.pool2 = MaxPool2d(3, 2, padding=1)
        self.norm2 = norm()
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1)
        self.relu4 = nn.ReLU()
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1)
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

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.pool1(self.relu1(self.conv1(x))))  # [N, 96, 55, 55]
        x = self.norm2(self.pool2(self.relu2(self.conv2(x))))  # [N, 256, 13, 13]
        x = self.relu3(self.conv3(x))
        x = self.relu4(self.conv4(x))
        x = self.pool5(self.relu5(self.conv5(x)))  # [N, 256, 6, 6]
        x = self.dropout6(self.relu6(self.fc6(torch.flatten(x, 1))))
        x = self.dropout7(self.relu7(self.fc7(x)))
        return self.fc8(x)


def initialise(model: nn.Module) -> None:
    """Draw the weights of convolutions and full layers from N(0, 0.01) and set their biases to 0.

    0.01 is the standard deviation. Paper: Zeiler & Fergus, arXiv:1311.2901, section 3.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)


class ZFNetSmall(nn.Module):
    """A small network of the same kind, for pictures of 28 to 64 pixels.

    ==========  =====  ===============================  ===========  ==============
    layer       maps   convolution                      then pooled  output at 28
    ==========  =====  ===============================  ===========  ==============
    conv1       24     7 x 7, padding 1                 pool1        24 -> 12
    conv2       48     5 x 5, padding 2                 pool2        12 -> 6
    conv3       96     3 x 3, padding 1                              6
    conv4       96     3 x 3, padding 1                              6
    conv5       64     3 x 3, padding 1                 pool5        6 -> 3
    fc6, fc7    256    full, dropout
    fc8         C      full, logits
    ==========  =====  ===============================  ===========  ==============

    Pools are 3 x 3 with stride 2, padded by 1. As in ZFNet a ReLU follows every layer but fc8; strides are 1,
    since there are fewer pixels to lose. The maps of pool5 are averaged to 3 x 3, which they are at 28 pixels
    already, so that other sizes fit fc6. Weights start at N(0, 2 / fan_in) (He et al., arXiv:1502.01852),
    those of fc8 as the paper's at N(0, 0.01): with 0.01 throughout so small a network is slow to start
    learning. Biases start at 0.

    Args:
        num_classes: C, the number of logits.
        in_channels: the picture's channels.

    Shape: x [N, in_channels, H, W] float, H and W 28 to 64, to logits [N, C].

    Paper: Zeiler & Fergus, arXiv:1311.2901, figure 3 (the network that this one is modelled on).
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 24, 7, padding=1)
        self.relu1 = nn.ReLU()
        self.pool1 = MaxPool2d(3, 2, padding=1)
        self.conv2 = nn.Conv2d(24, 48, 5, padding=2)
        self.relu2 = nn.ReLU()
        self.pool2 = MaxPool2d(3, 2, padding=1)
        self.conv3 = nn.Conv2d(48, 96, 3, padding=1)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(96, 96, 3, padding=1)
        self.relu4 = nn.ReLU()
        self.conv5 = nn.Conv2d(96, 64, 3, padding=1)
        self.relu5 = nn.ReLU()
        self.pool5 = MaxPool2d(3, 2, padding=1)
        self.resize = nn.AdaptiveAvgPool2d(3)
        self.fc6 = nn.Linear(64 * 3 * 3, 256)
        self.relu6 = nn.ReLU()
        self.dropout6 = nn.Dropout(0.3)
        self.fc7 = nn.Linear(256, 256)
        self.relu7 = nn.ReLU()
        self.dropout7 = nn.Dropout(0.3)
        self.fc8 = nn.Linear(256, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.fc8.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))  # [N, 24, 12, 12] at 28 pixels
        x = self.pool2(self.relu2(self.conv2(x)))  # [N, 48, 6, 6]
        x = self.relu3(self.conv3(x))
        x = self.relu4(self.conv4(x))
        x = self.resize(self.pool5(self.relu5(self.conv5(x))))  # [N, 64, 3, 3]
        x = self.dropout6(self.relu6(self.fc6(torch.flatten(x, 1))))
        x = self.dropout7(self.relu7(self.fc7(x)))
        return self.fc8(x)


def zfnet_small(num_classes: int = 10, in_channels: int = 1) -> ZFNetSmall:
    """The small network with untrained weights; the arguments are those of ``ZFNetSmall``."""
    return ZFNetSmall(num_classes, in_channels)
