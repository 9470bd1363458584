"""Fashion-MNIST: reading its IDX files, and the hundred test pictures that ship with the package."""

import gzip
import os
import re
import struct
import zlib
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zfcore.errors import ArgumentError, ImageError

__all__ = [
    "FASHION_MNIST_CLASSES",
    "SampleImage",
    "export_samples",
    "find_fashion_mnist",
    "load_fashion_mnist",
    "read_idx",
    "sample_images",
]

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts them
SAMPLES_A_CLASS = 10

_SAMPLES = Path(__file__).resolve().parent / "assets" / "fashion_mnist"
_STEMS = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTES = 0x08  # an IDX element type
_MAX_BYTES = 2**30  # of one IDX file's elements; the real training set has 47 MB


class SampleImage(NamedTuple):
    """A shipped picture: its PNG file, the index of its class, and the class's name."""

    path: Path
    label: int
    class_name: str


def sample_images() -> list[SampleImage]:
    """The shipped pictures: of each of the ten classes in turn, the first ten of the Fashion-MNIST test set.

    Each is a grey PNG of 28 x 28 pixels. Their licence (MIT) and origin lie beside them.
    """
    return [
        SampleImage(_SAMPLES / _sample_name(label, rank), label, name)
        for label, name in enumerate(FASHION_MNIST_CLASSES)
        for rank in range(SAMPLES_A_CLASS)
    ]


def export_samples(out: str | os.PathLike, folder: str | os.PathLike | None = None) -> None:
    """Write the pictures of ``sample_images`` from the data set to the folder ``out``: how the shipped ones
    were made.

    Args:
        out: an existing folder.
        folder: as ``load_fashion_mnist``.

    Raises:
        ImageError: as ``load_fashion_mnist``.
    """
    images, labels = load_fashion_mnist("test", folder)
    for label in range(len(FASHION_MNIST_CLASSES)):
        first = torch.nonzero(labels == label).flatten()[:SAMPLES_A_CLASS]
        for rank, index in enumerate(first.tolist()):
            Image.fromarray(images[index, 0].numpy()).save(
                Path(out) / _sample_name(label, rank), optimize=True
            )


def _sample_name(label: int, rank: int) -> str:
    name = re.sub("[^a-z]+", "-", FASHION_MNIST_CLASSES[label].lower())
    return f"{label}-{name}-{rank}.png"


def find_fashion_mnist(folder: str | os.PathLike | None = None) -> Path:
    """The folder of the data set: the one given, or that of Debian's package ``dataset-fashion-mnist``.

    Raises:
        ImageError: it is not there.
    """
    path = DEBIAN_FOLDER if folder is None else Path(folder)
    if not path.is_dir():
        hint = "install Debian's dataset-fashion-mnist, or give the folder of its IDX files"
        raise ImageError(f"Fashion-MNIST: there is no folder {str(path)!r}; {hint}")
    return path


def load_fashion_mnist(split: str, folder: str | os.PathLike | None = None) -> tuple[Tensor, Tensor]:
    """The pictures and labels of one half of the data set.

    Args:
        split: "train" (60,000 pictures) or "test" (10,000).
        folder: holds ``train-images-idx3-ubyte`` and so on, as they are or with ``.gz``; None for Debian's.

    Returns:
        images: [N, 1, 28, 28] uint8. labels: [N] int64, 0 to 9.

    Raises:
        ArgumentError: there is no such split.
        ImageError: a file is missing or damaged, or the two do not belong together.
    """
    if split not in _STEMS:
        raise ArgumentError(f"split={split!r}: expected one of {', '.join(map(repr, _STEMS))}")
    path = find_fashion_mnist(folder)
    images_file = _idx_file(path, f"{_STEMS[split]}-images-idx3-ubyte")
    labels_file = _idx_file(path, f"{_STEMS[split]}-labels-idx1-ubyte")
    images, labels = read_idx(images_file), read_idx(labels_file)
    if images.dim() != 3:
        raise ImageError(
            f"{str(images_file)!r} has {images.dim()} dimensions, expected 3 (pictures, rows, columns)"
        )
    if labels.dim() != 1 or len(labels) != len(images):
        raise ImageError(
            f"{str(labels_file)!r} holds {list(labels.shape)} labels, expected one for each of the "
            f"{len(images)} pictures of {images_file.name!r}"
        )
    if labels.max() >= len(FASHION_MNIST_CLASSES):
        raise ImageError(f"{str(labels_file)!r} holds the label {labels.max()}, expected 0 to 9")
    return images.unsqueeze(1), labels.long()


def _idx_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ImageError(f"Fashion-MNIST: {str(folder)!r} holds neither {name!r} nor {name + '.gz'!r}")


def read_idx(path: str | os.PathLike) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzipped (by its first bytes, not its name).

    The format: two zero bytes, the element type (8), the number of dimensions, each size as a big-endian
    32-bit integer, the elements in row-major order.

    Returns:
        uint8 tensor of the sizes in the file.

    Raises:
        ImageError: the file is missing, damaged, of another element type, longer or shorter than its header
            says, or larger than 1 GiB.
    """
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"{str(path)!r} cannot be read: there is no such file")
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else open(path, "rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:2] != b"\0\0":
                raise ImageError(f"{str(path)!r} is no IDX file: it starts with {start!r}")
            if start[2] != _UNSIGNED_BYTES:
                raise ImageError(
                    f"{str(path)!r} has the element type {start[2]:#04x}, expected 0x08 (unsigned bytes)"
                )
            header = file.read(4 * start[3])
            if not start[3] or len(header) < 4 * start[3]:
                raise ImageError(f"{str(path)!r} ends within its header of {start[3]} dimensions")
            sizes = struct.unpack(f">{start[3]}I", header)
            count = prod(sizes)
            if not 0 < count <= _MAX_BYTES:
                raise ImageError(
                    f"{str(path)!r} says it holds {list(sizes)} elements, expected 1 to {_MAX_BYTES}"
                )
            elements = file.read(count + 1)  # one more than there should be
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(f"{str(path)!r} cannot be read: {error}") from error
    if len(elements) != count:
        found = "more" if len(elements) > count else f"only {len(elements)}"
        raise ImageError(f"{str(path)!r} holds {found} elements, its header says {list(sizes)}")
    return torch.from_numpy(np.frombuffer(bytearray(elements), np.uint8).reshape(sizes))
