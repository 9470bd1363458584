"""Reading pictures: the right pixels, or an ImageError that says why not."""

import operator
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from zfcore.errors import ArgumentError, DtypeError, ImageError

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "SUFFIXES",
    "FoundImages",
    "Picture",
    "find_images",
    "load_image",
    "read_image",
]

# Only these decoders of Pillow ever see a file; the rest (EPS, FITS, PDF, ...) are attack surface.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .mpo .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm".split()
)
MAX_PIXELS = 2**26  # 64 Mpx: with its copies (orientation, transparency) decoding stays under 1 GB

_WHITE = 255
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339


@dataclass(frozen=True)
class Picture:
    """A picture that was read.

    pixels: [C, H, W] float32 in 0..1.
    size:   (H, W) in the file, upright, before any resizing.
    format, mode: as the file has them ("JPEG", "CMYK").
    notes:  what a reader of the pixels should know ("animated: only the first frame was read").
    """

    pixels: Tensor
    size: tuple[int, int]
    format: str
    mode: str
    notes: tuple[str, ...]


class FoundImages(NamedTuple):
    """files: paths to read, in order. skipped: (path, reason) of what looked like a picture and is none,
    or of a folder that could not be read. others: paths in folders whose names are not a picture's."""

    files: list[str]
    skipped: list[tuple[str, str]]
    others: list[str]


def load_image(
    path: "str | os.PathLike[str]",
    *,
    size: "int | tuple[int, int] | None" = None,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """The pixels of a picture file: [channels, H, W] float32 in 0..1. `read_image` also tells about the file.

    path:       a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file. EXIF orientation is applied, transparency
                is laid on white, 16-bit samples keep their precision, CMYK becomes RGB by Pillow's formula
                (colour profiles are not applied), of an animation the first frame is read.
    size:       None keeps the picture's size; an int s means (s, s). (H, W) scales the picture until it
                just covers H x W and cuts the centre out, with an antialiased bilinear filter.
    channels:   3 (grey is repeated) or 1 (colour becomes ITU-R 601 luma).
    max_pixels: a larger picture is refused before it is decoded.

    Raises: ImageError for a file that is missing, no regular file, of another kind, truncated, damaged or
    too large; ArgumentError, DtypeError for the other arguments.
    """
    return read_image(path, size=size, channels=channels, max_pixels=max_pixels).pixels


def read_image(
    path: "str | os.PathLike[str]",
    *,
    size: "int | tuple[int, int] | None" = None,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
) -> Picture:
    """`load_image`, with what is known about the file."""
    size = _size(size)
    if channels not in (1, 3) or isinstance(channels, bool):
        raise ArgumentError(f"channels: {channels!r}; expected 1 or 3")
    max_pixels = _positive("max_pixels", max_pixels)
    name = _name(path)
    with _opened(path, name) as file:
        try:
            return _decoded(file, name, size, channels, max_pixels)
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name}: larger than Pillow's own limit ({error})") from error
        except Image.UnidentifiedImageError as error:
            raise ImageError(
                f"{name}: not a picture of a kind that is read ({', '.join(FORMATS)})"
            ) from error
        except MemoryError as error:
            raise ImageError(f"{name}: decoding it takes more memory than there is") from error
        # Pillow's decoders raise whatever a damaged file makes them stumble over: OSError, SyntaxError,
        # struct.error, IndexError, ... To the caller they are all one thing, a file that cannot be read.
        except Exception as error:
            raise ImageError(f"{name}: damaged or truncated ({type(error).__name__}: {error})") from error


def find_images(paths: "Iterable[str | os.PathLike[str]]") -> FoundImages:
    """The picture files among `paths`: files as they are named, folders searched all the way down.

    A file named by itself is always returned, whatever its name; in a folder only names that end as a
    picture's do (FORMATS). Folders are read in name order; symbolic links are followed, each folder once,
    so loops end. FIFOs, sockets, devices, dangling links and folders that cannot be read are skipped, and
    listed with the reason.
    """
    found = FoundImages([], [], [])
    seen: set[tuple[int, int]] = set()
    for path in paths:
        path = os.fspath(path)
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if _is_folder(path):
            _search(path, found, seen)
        else:
            found.files.append(path)
    return found


def _search(folder: str, found: FoundImages, seen: set[tuple[int, int]]) -> None:
    pending = [folder]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            found.skipped.append((folder, f"cannot be read ({error.strerror})"))
            continue
        folders = []
        for entry in entries:
            if _is_folder(entry.path):
                folders.append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
                found.others.append(entry.path)
            elif reason := _not_a_file(entry.path):
                found.skipped.append((entry.path, reason))
            else:
                found.files.append(entry.path)
        pending.extend(reversed(folders))


def _is_folder(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _not_a_file(path: str) -> str | None:
    """Why a path is no file to read, or None."""
    try:
        return _kind(os.stat(path).st_mode)
    except OSError as error:
        return "a symbolic link that leads nowhere" if os.path.islink(path) else str(error.strerror)


def _kind(mode: int) -> str | None:
    if stat.S_ISREG(mode):
        return None
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return f"{name}, not a file"
    return "not a file"


def _name(path: object) -> str:
    try:
        return repr(os.fsdecode(path))  # quoted, so that a control character in it stays inert in a message
    except TypeError:
        raise DtypeError(f"path: a {type(path).__name__}; expected a str or os.PathLike") from None


@contextmanager
def _opened(path: object, name: str) -> Iterator[BinaryIO]:
    """The file, checked after it was opened; opening never waits for the other end of a FIFO."""
    flags = os.O_RDONLY
    for extra in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, extra, 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ImageError(f"{name}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    status = os.fstat(descriptor)
    reason = _kind(status.st_mode) or ("an empty file" if status.st_size == 0 else None)
    if reason:
        os.close(descriptor)
        raise ImageError(f"{name}: {reason}")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _decoded(
    file: BinaryIO, name: str, size: tuple[int, int] | None, channels: int, max_pixels: int
) -> Picture:
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(f"{name}: {width} x {height} pixels; expected at most {max_pixels}")
        if not width * height:
            raise ImageError(f"{name}: no pixels")
        kind, mode = image.format or "?", image.mode
        notes = []
        if getattr(image, "is_animated", False):
            notes.append("several frames: only the first was read")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        upright = (image.height, image.width)
        samples = _samples(image, name, notes)  # mode L, RGB or F
    if samples.mode == "RGB" and channels == 1:
        samples = samples.convert("L")
    if size is not None:
        samples = _covering(samples, size)
    array = np.array(samples, dtype=np.float32)  # [H, W] or [H, W, 3]
    if samples.mode != "F":
        array /= 255
    pixels = torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)
    pixels = pixels.expand(channels, -1, -1).contiguous()
    return Picture(pixels.clamp_(0, 1), upright, kind, mode, tuple(notes))


def _samples(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """The picture as L or RGB (0..255), or as F (0..1) where 8 bits would lose precision."""
    mode = image.mode
    if mode.startswith("I"):
        return _from_integers(image, name)
    if mode == "F":
        return _from_floats(image, name, notes)
    if image.has_transparency_data:
        # Hidden colours under transparent pixels must not show, so the picture is laid on white.
        grey = mode in ("1", "L", "LA", "La")
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, (_WHITE,) * 4)
        paper.alpha_composite(layer)
        return paper.convert("RGB").convert("L") if grey else paper.convert("RGB")
    if mode in ("1", "L"):
        return image.convert("L")
    if mode in ("P", "RGB", "RGBX", "CMYK", "YCbCr"):
        return image.convert("RGB")
    raise ImageError(f"{name}: colour mode {mode}; expected grey, RGB, CMYK, YCbCr or a palette")


def _from_integers(image: Image.Image, name: str) -> Image.Image:
    """Integer samples wider than 8 bits, scaled by the range of their type (not clipped, as Pillow does)."""
    array = np.array(image)
    tags = getattr(image, "tag_v2", {})
    if _first(tags, _TIFF_SAMPLE_FORMAT, 1) == 2:
        raise ImageError(f"{name}: signed integer samples; expected unsigned ones, whose white is known")
    # Pillow holds 16-bit samples of a PPM as 32-bit integers, and only a TIFF has wider ones.
    bits = 32 if image.mode == "I" and _first(tags, _TIFF_BITS, 16) == 32 else 16
    white = 2**bits - 1
    if bits == 32:
        array = array.view(np.uint32)
    scaled = _black_is_zero(array.astype(np.float32) / np.float32(white), tags)
    key = image.info.get("transparency")
    if isinstance(key, int):
        scaled[array == key] = 1
    return Image.fromarray(scaled)


def _from_floats(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Float samples: 0..1 by convention; 0..255, which some programs write, is noted."""
    array = np.array(image)
    tags = getattr(image, "tag_v2", {})
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 255):  # also NaN
        raise ImageError(f"{name}: float samples from {low:g} to {high:g}; expected 0..1 or 0..255")
    if high > 1:
        notes.append("float samples above 1: read as 0..255")
        array /= np.float32(255)
    return Image.fromarray(_black_is_zero(array, tags))


def _black_is_zero(scaled: np.ndarray, tags: object) -> np.ndarray:
    """Black at zero; Pillow turns the "white is zero" of a TIFF round for 8-bit samples only."""
    return 1 - scaled if _first(tags, _TIFF_PHOTOMETRIC, 1) == 0 else scaled


def _first(tags: object, tag: int, default: int) -> int:
    value = tags.get(tag, default)
    return value[0] if isinstance(value, tuple) else value


def _covering(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled to cover (H, W), then its centre: one antialiased resampling of the part that stays."""
    height, width = size
    if (image.height, image.width) == (height, width):
        return image
    scale = min(image.width / width, image.height / height)  # source pixels to one of ours
    part_width, part_height = width * scale, height * scale
    left, top = (image.width - part_width) / 2, (image.height - part_height) / 2
    part = (
        max(left, 0),
        max(top, 0),
        min(left + part_width, image.width),
        min(top + part_height, image.height),
    )
    return image.resize((width, height), Image.Resampling.BILINEAR, box=part)


def _size(size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    if isinstance(size, (tuple, list)):
        if len(size) != 2:
            raise ArgumentError(f"size: {size!r}; expected an int or a pair (height, width)")
        return _positive("size", size[0]), _positive("size", size[1])
    side = _positive("size", size)
    return side, side


def _positive(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise DtypeError(f"{name}: {value!r}; expected a whole number of at least 1") from None
    if number < 1:
        raise ArgumentError(f"{name}: {number}; expected a whole number of at least 1")
    return number
