"""The operations of the deconvnet, registered under ``torch.ops.zfcore``, each on the best backend here."""

from zfcore.ops._library import BackendStatus, backends, use_backend
from zfcore.ops.max_pool2d_with_switches import max_pool2d_with_switches
from zfcore.ops.pool_gather2d import pool_gather2d
from zfcore.ops.unpool2d import unpool2d
from zfcore.ops.unpool_relu2d import unpool_relu2d
from zfcore.ops.unpool_relu_conv_transpose2d import unpool_relu_conv_transpose2d
from zfcore.reference._params import ConvParams, PoolParams

__all__ = [
    "BackendStatus",
    "ConvParams",
    "PoolParams",
    "backends",
    "max_pool2d_with_switches",
    "pool_gather2d",
    "unpool2d",
    "unpool_relu2d",
    "unpool_relu_conv_transpose2d",
    "use_backend",
]
