"""Unpooling and rectification in one step."""

from __future__ import annotations

import torch

from zfcore.reference.unpool2d import unpool2d


def unpool_relu2d(
    y, switches, kernel_size, stride=None, padding=0, dilation=1, output_size=None, overlap="sum"
):
    """relu(unpool2d(...)): overlapping windows add up before the ReLU, which keeps NaN and -0.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (unpooling, rectification).
    """
    return torch.relu(unpool2d(y, switches, kernel_size, stride, padding, dilation, output_size, overlap))
