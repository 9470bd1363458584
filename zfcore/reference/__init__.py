"""Every op in a few lines of plain PyTorch, with its op's name and signature.

These are the definitions that the kernels are tested against, and the fallback where no kernel is available.
"""

from zfcore.reference.conv_boxes import conv_boxes
from zfcore.reference.conv_delta import conv_delta
from zfcore.reference.conv_strongest import conv_strongest
from zfcore.reference.deconv_step import deconv_step
from zfcore.reference.lrn_delta import lrn_delta
from zfcore.reference.max_pool2d_with_switches import max_pool2d_with_switches
from zfcore.reference.paste_boxes import paste_boxes
from zfcore.reference.pointwise_delta import pointwise_delta
from zfcore.reference.pool_delta import pool_delta
from zfcore.reference.pool_gather2d import pool_gather2d
from zfcore.reference.relu_delta import relu_delta
from zfcore.reference.strongest import strongest
from zfcore.reference.unpool2d import unpool2d
from zfcore.reference.unpool_relu2d import unpool_relu2d
from zfcore.reference.unpool_relu_conv_transpose2d import unpool_relu_conv_transpose2d

__all__ = [
    "conv_boxes",
    "conv_delta",
    "conv_strongest",
    "deconv_step",
    "lrn_delta",
    "max_pool2d_with_switches",
    "paste_boxes",
    "pointwise_delta",
    "pool_delta",
    "pool_gather2d",
    "relu_delta",
    "strongest",
    "unpool2d",
    "unpool_relu2d",
    "unpool_relu_conv_transpose2d",
]
