"""Reading IDX files, and the pictures that ship with the package."""

import gzip
import os
import random
import struct

import pytest
import torch
from PIL import Image

from zfcore.data import (
    FASHION_MNIST_CLASSES,
    export_samples,
    find_fashion_mnist,
    load_fashion_mnist,
    read_idx,
    sample_images,
)
from zfcore.errors import ArgumentError, ImageError


def idx(tensor, kind=8):
    return (
        struct.pack(f">BBBB{tensor.dim()}I", 0, 0, kind, tensor.dim(), *tensor.shape)
        + tensor.numpy().tobytes()
    )


IMAGES = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("name", ["a-idx3-ubyte", "a.gz"])  # the name does not matter
def test_read_idx(tmp_path, pack, name):
    path = tmp_path / name
    path.write_bytes(pack(idx(IMAGES)))
    read = read_idx(path)
    assert torch.equal(read, IMAGES) and read.dtype is torch.uint8
    read += 1  # it is the reader's own memory


GOOD = idx(IMAGES)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no IDX file: it starts with b''"),
        (GOOD[:3], "no IDX file"),
        (b"\x89PNG\r\n\x1a\n", "no IDX file: it starts with"),
        (GOOD[:9], "ends within its header of 3 dimensions"),
        (b"\0\0\x08\0" + bytes(9), "ends within its header of 0 dimensions"),
        (b"\0\0\x08\xff" + bytes(90), "ends within its header of 255 dimensions"),
        (idx(IMAGES, kind=13), "element type 0x0d, expected 0x08"),
        (GOOD[:-1], "holds only 59 elements, its header says"),
        (GOOD[:16], "holds only 0 elements"),
        (GOOD + b"\0", "holds more elements, its header says"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "expected 1 to 1073741824"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 0, 28, 28), "expected 1 to"),
        (gzip.compress(GOOD)[:-9], "cannot be read"),
        (gzip.compress(GOOD)[:-8] + bytes(8), "cannot be read"),
        (b"\x1f\x8b" + bytes(30), "cannot be read"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, data, words):
    path = tmp_path / "x-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=words) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_mutated_files_never_crash(tmp_path):
    pick, path, refused = random.Random(3), tmp_path / "x", 0
    for data in (GOOD, gzip.compress(GOOD)) * 150:
        at = pick.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << pick.randrange(8)]) + data[at + 1 :])
        try:
            assert read_idx(path).dtype is torch.uint8
        except ImageError:
            refused += 1
    assert refused > 150


def test_a_small_file_that_unpacks_to_much_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(struct.pack(">4B1I", 0, 0, 8, 1, 10) + bytes(50_000_000)))
    with pytest.raises(ImageError, match="holds more elements"):
        read_idx(path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: None])
def test_what_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(ImageError, match="no such file"):
        read_idx(tmp_path / "x")


def write(folder, images, labels, stem="t10k"):
    (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx(images))
    (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))


def labels(*values):
    return torch.tensor(values, dtype=torch.uint8)


def test_load_a_folder(tmp_path):
    write(tmp_path, IMAGES, labels(9, 0, 3))
    images, given = load_fashion_mnist("test", tmp_path)
    assert torch.equal(images, IMAGES[:, None])
    assert given.dtype is torch.int64 and given.tolist() == [9, 0, 3]


@pytest.mark.parametrize(
    ("images", "given", "words"),
    [
        (IMAGES, labels(1, 2), r"holds \[2\] labels, expected one for each of the 3 pictures"),
        (IMAGES, labels(1, 2, 10), "holds the label 10, expected 0 to 9"),
        (IMAGES[0], labels(1, 2, 3), "has 2 dimensions, expected 3"),
        (IMAGES, IMAGES, "labels, expected one for each"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, images, given, words):
    write(tmp_path, images, given)
    with pytest.raises(ImageError, match=words):
        load_fashion_mnist("test", tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ImageError, match="holds neither 'train-images-idx3-ubyte' nor"):
        load_fashion_mnist("train", tmp_path)
    with pytest.raises(ImageError, match="there is no folder .*dataset-fashion-mnist"):
        find_fashion_mnist(tmp_path / "gone")
    with pytest.raises(ArgumentError, match="split='val': expected one of 'train', 'test'"):
        load_fashion_mnist("val", tmp_path)


def test_a_hundred_pictures_ship_ten_of_each_class():
    samples = sample_images()
    assert [sample.label for sample in samples] == [label for label in range(10) for _ in range(10)]
    assert all(sample.class_name == FASHION_MNIST_CLASSES[sample.label] for sample in samples)
    assert len({sample.path.read_bytes() for sample in samples}) == 100
    for sample in samples:
        with Image.open(sample.path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))


def test_their_licence_and_origin_ship_beside_them():
    folder = sample_images()[0].path.parent
    licence = (folder / "LICENSE").read_text()
    assert "Zalando SE" in licence and "Permission is hereby granted, free of charge" in licence
    assert "zalandoresearch/fashion-mnist" in (folder / "README.md").read_text()


def dataset():
    try:
        return find_fashion_mnist()
    except ImageError as error:
        pytest.skip(str(error))


def test_the_shipped_pictures_are_the_first_of_the_test_set(tmp_path):
    export_samples(tmp_path, dataset())
    for sample in sample_images():
        with Image.open(sample.path) as shipped, Image.open(tmp_path / sample.path.name) as exported:
            assert shipped.tobytes() == exported.tobytes()


def test_the_data_set_is_whole():
    for split, n in (("train", 60_000), ("test", 10_000)):
        images, given = load_fashion_mnist(split, dataset())
        assert images.shape == (n, 1, 28, 28)
        assert given.bincount().tolist() == [n // 10] * 10
