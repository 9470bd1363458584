"""What a picture's header says, and how its pixels are then read."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image

from zfcore.errors import ImageError

_MOST = 2**22  # bytes read at once, though a decoder asks for a whole gap between strips
CUT_OFF = "damaged or truncated (it ends too early)"


@dataclass(frozen=True)
class Contents:
    """format:   one of FORMATS.
    size:        (width, height) of the pixels as they are stored, before `orientation`.
    cost:        bytes of memory that decoding takes at its peak, for each pixel.
    decode:      reads the pixels; called once the limits hold.
    orientation: EXIF's, 1 to 8.
    animated:    more than one frame.
    key:         the level, or colour, that stands for transparent: of `decode`'s samples.
    white:       the largest integer sample, of grey that is wider than 8 bits.
    inverted:    0 is white, of samples that `decode` leaves as they are.
    canvas:      (width, height, left, top) of a larger canvas that the pixels lie on.
    mode:        the samples' kind in the file, where the decoded picture does not tell it.
    notes:       as of Picture.
    """

    format: str
    size: tuple[int, int]
    cost: float
    decode: Callable[[], Image.Image]
    orientation: int = 1
    animated: bool = False
    key: int | tuple[int, ...] | None = None
    white: int = 65535
    inverted: bool = False
    canvas: tuple[int, int, int, int] | None = None
    mode: str | None = None
    notes: tuple[str, ...] = ()


class Deadline:
    """Ends a decoder that takes too long: processor time, so that a busy machine refuses no picture."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.thread_time() + seconds

    def check(self) -> None:
        if time.thread_time() > self.end:
            raise ImageError(
                f"decoding takes too long (over {self.seconds:.3g} s of processor time), for a picture of "
                "its size; damaged, or made to be slow"
            )


class Pieces(io.RawIOBase):
    """A file put together from bytes and from stretches (start, end) of another.

    A decoder gets the parts that decide the pixels and nothing else: no profiles, comments, thumbnails or
    later frames, whose parsing has no bound. It looks at the clock whenever it reads on.
    """

    def __init__(self, file: BinaryIO, pieces: Iterable[bytes | tuple[int, int]], deadline: Deadline) -> None:
        self._file, self._deadline = file, deadline
        self._pieces: list[tuple[int, int, bytes | int]] = []  # start and end in this file, source
        at = 0
        for piece in pieces:
            length = len(piece) if isinstance(piece, bytes) else max(piece[1] - piece[0], 0)
            self._pieces.append((at, at + length, piece if isinstance(piece, bytes) else piece[0]))
            at += length
        self._length, self._at = at, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        self._deadline.check()
        end = self._length if size is None or size < 0 else min(self._at + min(size, _MOST), self._length)
        parts = []
        for start, stop, source in self._pieces:
            if start <= self._at < min(stop, end):
                first, count = self._at - start, min(stop, end) - self._at
                if isinstance(source, bytes):
                    part = source[first : first + count]
                else:
                    self._file.seek(source + first)
                    part = self._file.read(count)
                parts.append(part)
                self._at += len(part)
                if len(part) < count:
                    break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readall(self) -> bytes:
        return self.read()


def take(file: BinaryIO, count: int) -> bytes:
    """Exactly so many bytes."""
    data = file.read(count)
    if len(data) < count:
        raise ImageError(CUT_OFF)
    return data


def opened(
    file: BinaryIO, pieces: Iterable[bytes | tuple[int, int]], kind: str, deadline: Deadline
) -> Image.Image:
    """Pillow's picture of these pieces, its pixels read."""
    image = Image.open(Pieces(file, pieces, deadline), formats=(kind,))
    image.load()
    return image


def assembled(
    mode: str, size: tuple[int, int], strips: Iterable[np.ndarray], deadline: Deadline
) -> Image.Image:
    """The picture whose rows come a strip at a time: [h, W] or [h, W, channels] uint8, or [h, W] float32."""
    image = Image.new(mode, size)
    top = 0
    for strip in strips:
        deadline.check()
        image.paste(Image.fromarray(strip), (0, top))
        top += strip.shape[0]
    return image


def strip_rows(width: int) -> int:
    """Rows that are worked on at a time: about a million pixels."""
    return max(1, 2**20 // width)
