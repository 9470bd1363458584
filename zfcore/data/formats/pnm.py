"""PBM, PGM and PPM, plain and raw, and PFM of one channel.

Read here: Pillow goes over plain text, and over any `maxval` but 255 and 65535, a sample at a time.
"""

import math
import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from zfcore.data.formats.contents import (
    CUT_OFF,
    Contents,
    Deadline,
    assembled,
    strip_rows,
    take,
)
from zfcore.errors import ImageError

MAGIC = re.compile(rb"P[1-6f]\s")
_MAX_HEADER = 2**16
_MAX_TOKEN = 32
_BLOCK = 2**20
_SPACE = b" \t\n\v\f\r"
_COMMENT = re.compile(rb"#[^\r\n]*[\r\n]")


def inspect(file: BinaryIO, deadline: Deadline) -> Contents:
    file.seek(0)
    magic = take(file, 2)
    plain, bitmap = magic in (b"P1", b"P2", b"P3"), magic in (b"P1", b"P4")
    channels = 3 if magic in (b"P3", b"P6") else 1
    width, height = _number(file), _number(file)
    size = (width, height)
    if magic == b"Pf":
        return _floats(file, size, deadline)
    maxval = 1 if bitmap else _number(file)
    if not 1 <= maxval <= 65535:
        raise ImageError(f"damaged or truncated (a maxval of {maxval}; expected 1 to 65535)")
    start = file.tell()
    mode = "RGB" if channels == 3 else "L" if bitmap or maxval == 255 else "F"

    def strips() -> Iterator[np.ndarray]:
        file.seek(start)
        if plain:
            samples = _gathered(_plain(file, bitmap, deadline), width * channels, height)
        elif bitmap:
            samples = _bits(file, width, height)
        else:
            samples = _raw(file, "u1" if maxval < 256 else ">u2", width * channels, height)
        for strip in samples:
            brightest = strip.max()
            if brightest > maxval:
                raise ImageError(f"damaged or truncated (a sample {brightest} above the maxval {maxval})")
            levels = _levels(strip, maxval, mode, bitmap)
            yield levels.reshape(-1, width, 3) if channels == 3 else levels

    notes = (f"colour of {maxval + 1} levels: read as 256",) if channels == 3 and maxval > 255 else ()
    return Contents(
        "PPM",
        size,
        1 if mode == "L" else 4,
        lambda: assembled(mode, size, strips(), deadline),
        mode="1" if bitmap else "I;16" if mode == "F" and maxval > 255 else "RGB" if channels == 3 else "L",
        notes=notes,
    )


def _levels(samples: np.ndarray, maxval: int, mode: str, bitmap: bool) -> np.ndarray:
    """As 0..255, or 0..1 where grey would lose precision."""
    if bitmap:
        return np.where(samples, np.uint8(0), np.uint8(255))
    if mode == "F":
        return samples.astype(np.float32) / np.float32(maxval)
    if maxval == 255:
        return samples.astype(np.uint8)
    return ((samples.astype(np.uint32) * 255 + maxval // 2) // maxval).astype(np.uint8)


def _raw(file: BinaryIO, kind: str, row: int, height: int) -> Iterator[np.ndarray]:
    step = strip_rows(row)
    for top in range(0, height, step):
        rows = min(step, height - top)
        yield np.frombuffer(take(file, rows * row * np.dtype(kind).itemsize), kind).reshape(rows, row)


def _bits(file: BinaryIO, width: int, height: int) -> Iterator[np.ndarray]:
    for packed in _raw(file, "u1", (width + 7) // 8, height):
        yield np.unpackbits(packed, axis=1, count=width)


def _plain(file: BinaryIO, bitmap: bool, deadline: Deadline) -> Iterator[np.ndarray]:
    """The samples of plain text, a block at a time. Comments reach to the end of their line."""
    rest, comment = b"", False
    while True:
        deadline.check()
        block = file.read(_BLOCK)
        text = (b"#" if comment else b"") + rest + block + (b"" if block else b"\n")
        text = _COMMENT.sub(b"\n", text)
        cut = text.find(b"#")
        comment = cut >= 0
        text = text[:cut] if comment else text
        # What follows the last space may go on in the next block; in front of a comment it ends.
        whole = len(text) if comment or not block else 1 + max(text.rfind(space) for space in _SPACE)
        text, rest = text[:whole], text[whole:]
        digits = b"01" if bitmap else b"0123456789"
        if text.translate(None, digits + _SPACE) or len(rest) > _MAX_TOKEN and not bitmap:
            raise ImageError("damaged or truncated (plain samples that are no numbers)")
        if bitmap:
            yield np.frombuffer((text + rest).translate(None, _SPACE), np.uint8) - ord("0")
            rest = b""
        else:
            yield np.fromstring(text, np.int64, sep=" ") if text.strip() else np.empty(0, np.int64)
        if not block:
            return


def _gathered(blocks: Iterator[np.ndarray], row: int, height: int) -> Iterator[np.ndarray]:
    """Blocks of any length, as strips of whole rows."""
    rest = np.empty(0, np.int64)
    for block in blocks:
        rest = np.concatenate([rest, block])
        rows = min(len(rest) // row, height)
        if rows:
            yield rest[: rows * row].reshape(rows, row)
            rest, height = rest[rows * row :], height - rows
        if not height:
            return
    raise ImageError(CUT_OFF)


def _floats(file: BinaryIO, size: tuple[int, int], deadline: Deadline) -> Contents:
    """PFM of one channel: rows from below, the scale's sign tells the order of the bytes."""
    scale = _token(file)
    try:
        factor = float(scale)
    except ValueError:
        factor = math.nan
    if abs(factor) != 1:
        raise ImageError(f"a PFM with scale {scale.decode('ascii', 'replace')!r}; expected 1 or -1")
    start = file.tell()
    width, height = size

    def strips() -> Iterator[np.ndarray]:
        step = strip_rows(width)
        for top in range(0, height, step):
            rows = min(step, height - top)
            file.seek(start + 4 * width * (height - top - rows))
            data = np.frombuffer(take(file, 4 * width * rows), "<f4" if factor < 0 else ">f4")
            yield data.reshape(rows, width)[::-1].astype(np.float32)

    return Contents("PPM", size, 4, lambda: assembled("F", size, strips(), deadline), mode="F")


def _number(file: BinaryIO) -> int:
    token = _token(file)
    if not token.isdigit():
        raise ImageError(f"damaged or truncated ({token[:20]!r} for a number)")
    return int(token)


def _token(file: BinaryIO) -> bytes:
    """The next word of the header, and the one white space behind it."""
    token, comment = b"", False
    while file.tell() < _MAX_HEADER and len(token) < _MAX_TOKEN:
        byte = take(file, 1)
        if comment:
            comment = byte not in b"\r\n"
        elif byte == b"#":
            comment = True
        elif byte not in _SPACE:
            token += byte
        elif token:
            return token
    raise ImageError("damaged or truncated (a PNM header without an end)")
