"""Pictures: reading files, Fashion-MNIST, and the test pictures that ship with the package."""

from zfcore.data.fashion_mnist import (
    FASHION_MNIST_CLASSES,
    SampleImage,
    export_samples,
    find_fashion_mnist,
    load_fashion_mnist,
    read_idx,
    sample_images,
)
from zfcore.data.folders import FoundImages, find_images
from zfcore.data.images import Picture, load_image, read_image

__all__ = [
    "FASHION_MNIST_CLASSES",
    "FoundImages",
    "Picture",
    "SampleImage",
    "export_samples",
    "find_fashion_mnist",
    "find_images",
    "load_fashion_mnist",
    "load_image",
    "read_idx",
    "read_image",
    "sample_images",
]
