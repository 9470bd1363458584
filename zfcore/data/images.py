"""Reading pictures: the right pixels, or an ImageError that says why not."""

import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zfcore.data.formats import FORMATS, Contents, Deadline, inspect
from zfcore.data.samples import strips, to_samples
from zfcore.errors import ArgumentError, DtypeError, ImageError
from zfcore.files import NotRegular, open_regular

__all__ = ["FORMATS", "MAX_PIXELS", "Picture", "load_image", "read_image"]

MAX_PIXELS = 2**26  # 64 million, of a picture that is scaled down
MAX_PIXELS_UNSCALED = 2**25  # of one that is returned whole: 3 floats a pixel are 400 MB
MAX_SIDE = 2**20  # Pillow keeps a pointer for each row

# With Python and torch in memory, about 220 MB, reading a picture stays under 1 GB and 10 s.
_BYTES_A_PIXEL = 10.5  # of MAX_PIXELS, while decoding
_SECONDS = 7  # of processor time, for MAX_PIXELS

_TURNED = {  # EXIF's orientation -> how the stored pixels become upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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


def load_image(
    path: "str | os.PathLike[str]",
    *,
    size: "int | tuple[int, int] | None" = None,
    channels: int = 3,
    max_pixels: int | None = None,
) -> Tensor:
    """The pixels of a picture file: [channels, H, W] float32 in 0..1. `read_image` also tells about the file.

    path:       a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file. EXIF orientation is applied, transparency
                is laid on white, 16-bit grey keeps its precision (16-bit colour is read as 8 bits), CMYK
                becomes RGB by Pillow's formula, profiles and gamma are not applied, of an animation the
                first frame is read.
    size:       None keeps the picture's size; an int s means (s, s). (H, W) scales the picture until it
                just covers H x W and cuts the centre out, with an antialiased bilinear filter.
    channels:   3 (grey is repeated) or 1 (colour becomes ITU-R 601 luma).
    max_pixels: a larger picture is refused before it is decoded. None: 2^26; without `size` 2^25, as a
                result of 3 channels takes 12 bytes a pixel. At most 1 GB of memory (Python and torch
                included) and 10 s then suffice for any file; with a larger number both grow with it.

    Raises: ImageError for a file that is missing, no regular file, of another kind, truncated, damaged,
    too large (also a side over 2^20, or over `max_pixels` in what decoding its kind takes), or one that
    would be read wrongly (the message names what); ArgumentError, DtypeError for the other arguments.
    """
    return read_image(path, size=size, channels=channels, max_pixels=max_pixels).pixels


def read_image(
    path: "str | os.PathLike[str]",
    *,
    size: "int | tuple[int, int] | None" = None,
    channels: int = 3,
    max_pixels: int | None = None,
) -> Picture:
    """`load_image`, with what is known about the file."""
    size = _size(size)
    if channels not in (1, 3) or isinstance(channels, bool):
        raise ArgumentError(f"channels: {channels!r}; expected 1 or 3")
    if max_pixels is None:
        most = MAX_PIXELS_UNSCALED if size is None and channels == 3 else MAX_PIXELS
    else:
        most = _positive("max_pixels", max_pixels)
    deadline = Deadline(_SECONDS * max(1, most / MAX_PIXELS))
    name = _name(path)
    with _opened(path, name) as file:
        try:
            contents = inspect(file, deadline)
            _check_size(contents, most, hint=size is None and max_pixels is None)
            return _read(contents, size, channels)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from error.__cause__
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name}: larger than Pillow's own limit ({error})") from error
        except MemoryError as error:
            raise ImageError(f"{name}: decoding it takes more memory than there is") from error
        # Pillow's decoders raise whatever a damaged file makes them stumble over: OSError, SyntaxError,
        # struct.error, IndexError, ... To the caller they are all one thing, a file that cannot be read.
        except Exception as error:
            raise ImageError(f"{name}: damaged or truncated ({type(error).__name__}: {error})") from error


def _name(path: object) -> str:
    try:
        return repr(os.fsdecode(path))  # quoted, so that a control character in it stays inert in a message
    except TypeError:
        raise DtypeError(f"path: a {type(path).__name__}; expected a str or os.PathLike") from None


@contextmanager
def _opened(path: object, name: str) -> Iterator[BinaryIO]:
    """The file, when it is one and not empty."""
    try:
        file = open_regular(path)
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except NotRegular as error:
        raise ImageError(f"{name}: {error}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ImageError(f"{name}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    with file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ImageError(f"{name}: an empty file")
        yield file


def _check_size(contents: Contents, most: int, hint: bool) -> None:
    width, height = contents.canvas[:2] if contents.canvas else contents.size
    if width * height > most:
        more = " without size= (max_pixels= allows more)" if hint else ""
        raise ImageError(f"{width} x {height} pixels; expected at most {most}{more}")
    if not contents.size[0] * contents.size[1]:
        raise ImageError("no pixels")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{width} x {height} pixels; expected sides of at most {MAX_SIDE}")
    memory, available = contents.cost * width * height, _BYTES_A_PIXEL * max(most, MAX_PIXELS)
    if memory > available:
        raise ImageError(
            f"decoding {width} x {height} pixels of this kind of {contents.format} takes about "
            f"{memory / 1e6:.0f} MB; expected at most {available / 1e6:.0f}"
        )


def _read(contents: Contents, size: tuple[int, int] | None, channels: int) -> Picture:
    notes = list(contents.notes)
    if contents.animated:
        notes.append("several frames: only the first was read")
    image = contents.decode()
    mode = contents.mode or image.mode
    samples = to_samples(image, contents, notes)  # mode L, RGB or F
    del image
    if samples.mode == "RGB" and channels == 1:
        samples = samples.convert("L")
    aside = contents.orientation >= 5
    upright = (samples.width, samples.height) if aside else (samples.height, samples.width)
    if size is not None:
        samples = _covering(samples, size[::-1] if aside else size)
    if contents.orientation in _TURNED:
        samples = samples.transpose(_TURNED[contents.orientation])
    return Picture(_floats(samples, channels), upright, contents.format, mode, tuple(notes))


def _floats(samples: Image.Image, channels: int) -> Tensor:
    """[channels, H, W] float32 in 0..1"""
    pixels = torch.empty(channels, samples.height, samples.width)
    for top, strip in strips(samples):
        array = np.array(strip, dtype=np.float32)  # [h, W] or [h, W, 3]
        if strip.mode != "F":
            array /= 255
        values = torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)
        pixels[:, top : top + strip.height] = values
    return pixels.clamp_(0, 1)


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
