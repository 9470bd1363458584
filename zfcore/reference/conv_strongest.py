"""Where the units of a convolution are strongest, and how strong."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zfcore.reference.strongest import strongest


def conv_strongest(images, weight, bias, units, conv, size):
    """index [N, U] int64, as of ``strongest``, and value [N, U] of the maps of images [N, C, H, W].

    weight: [K, C, kh, kw]. bias: [K] or None. units: [U], each under K. conv: (kernel, stride, padding,
    dilation), the padding what lies above and to the left. size: (Oh, Ow) of the maps; below and to the right
    there may be one more of padding, as padding="same" has it.
    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.1.
    """
    _, stride, (top, left), dilation = conv
    if not len(units):
        return units.new_zeros((len(images), 0)), images.new_zeros((len(images), 0))
    images = F.pad(images, (left, left + 1, top, top + 1))
    maps = F.conv2d(images, weight[units], None if bias is None else bias[units], stride, 0, dilation)
    maps = maps[:, :, : size[0], : size[1]]
    index = strongest(maps, torch.arange(len(units), device=maps.device))
    return index, maps.flatten(2).gather(-1, index.unsqueeze(-1)).squeeze(-1)
