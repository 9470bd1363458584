"""The layers of the paper that torch.nn lacks: max-pooling with switches, contrast normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zfcore.ops import max_pool2d_with_switches

# A tracer records the call in place of the op's inside, which looks at shapes.
torch.fx.wrap("max_pool2d_with_switches")


class MaxPool2d(nn.MaxPool2d):
    """Max-pooling on the op with switches: faster than torch's, and the backward needs one byte a window.

    .. math::
        y_{n,c,o,q} = \\max_{i,j} x_{n,c,\\; o s_h - p_h + i d_h,\\; q s_w - p_w + j d_w}

    The arguments are those of ``nn.MaxPool2d``, without ``return_indices``: the switches come from
    ``zfcore.ops.max_pool2d_with_switches``.

    Args:
        kernel_size, stride, padding, dilation: int or pair, pixels; at most 255 taps.
        ceil_mode: round the output size up.

    Shape: x [N, C, H, W] or [C, H, W] float to [N, C, Oh, Ow] or [C, Oh, Ow], x's dtype and memory format.

    Raises:
        ArgumentError, ShapeError, DtypeError: in ``forward``, as ``zfcore.ops.max_pool2d_with_switches``.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (switches).
    """

    def __init__(self, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = max_pool2d_with_switches(
            x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )
        return y


class ContrastNorm(nn.LocalResponseNorm):
    """Contrast normalisation across neighbouring feature maps.

    .. math::
        y_{n,c} = x_{n,c} \\Big/ \\Big( k + \\alpha \\sum_{|c' - c| \\le 2} x_{n,c'}^2 \\Big)^{\\beta},
        \\qquad k = 2,\\ \\alpha = 10^{-4},\\ \\beta = 0.75

    The paper normalises "across feature maps" and gives no constants; its network is a correction of that of
    Krizhevsky et al. (2012), whose section 3.3 gives these. torch divides its ``alpha`` by the number of
    maps, so that ``alpha`` is 5e-4 there. The deconvnet passes over this layer on the way down.

    Shape: x [N, C, H, W] float to the same.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2 and figure 3 (contrast normalised across feature maps).
    """

    def __init__(self):
        super().__init__(size=5, alpha=5e-4, beta=0.75, k=2.0)
