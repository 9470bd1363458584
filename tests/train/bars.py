"""A small set of pictures that a network learns quickly, in memory and as IDX files."""

import gzip
import struct

import torch


def pictures(n, seed=0, size=28, classes=10):
    """Noise with bright bars whose place is the class: [n, 1, size, size] uint8, and [n] int64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = torch.randint(0, 60, (n, 1, size, size), dtype=torch.uint8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        at = 1 + label * (size - 4) // classes
        image[:, at : at + 2] += 190
    return images, labels


def write_idx(path, tensor, zipped=True):
    data = struct.pack(f">BBBB{tensor.dim()}I", 0, 0, 8, tensor.dim(), *tensor.shape)
    data += tensor.to(torch.uint8).numpy().tobytes()
    path.write_bytes(gzip.compress(data) if zipped else data)
