"""Networks: the paper's, a small one with trained weights, AlexNet; by name, and loading weights safely."""

from zfcore.models.alexnet import AlexNet, alexnet
from zfcore.models.layers import ContrastNorm, MaxPool2d
from zfcore.models.registry import ModelMeta, create, load, names, shipped
from zfcore.models.weights import load_weights, save_weights
from zfcore.models.zfnet import ZFNet, ZFNetSmall, zfnet_small

__all__ = [
    "AlexNet",
    "ContrastNorm",
    "MaxPool2d",
    "ModelMeta",
    "ZFNet",
    "ZFNetSmall",
    "alexnet",
    "create",
    "load",
    "load_weights",
    "names",
    "save_weights",
    "shipped",
    "zfnet_small",
]
