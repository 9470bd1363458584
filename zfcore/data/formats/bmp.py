"""BMP: read here, with any masks and palette; Pillow takes some palettes for grey levels and few masks."""

import struct
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

_CORE, _OS2 = 12, 64
_HEADERS = (_CORE, 40, 52, 56, _OS2, 108, 124)
_RAW, _RLE8, _RLE4, _MASKS, _ALPHA_MASKS = 0, 1, 2, 3, 6
_DEFAULT_MASKS = {16: (0x7C00, 0x3E0, 0x1F, 0), 32: (0xFF0000, 0xFF00, 0xFF, 0)}
_MAX_RUNS = 2**22  # bytes of run-length code


def inspect(file: BinaryIO, deadline: Deadline) -> Contents:
    file.seek(10)
    offset, length = struct.unpack("<II", take(file, 8))
    if length not in _HEADERS:
        raise ImageError(f"damaged or truncated (a BMP header of {length} bytes)")
    header = take(file, length - 4)
    colours = compression = 0
    if length == _CORE:
        width, height, _, depth = struct.unpack_from("<HHHH", header)
    else:
        width, height, _, depth, compression = struct.unpack_from("<iiHHI", header)
        (colours,) = struct.unpack_from("<I", header, 28)
    upside_down, height = height > 0, abs(height)
    if width < 0 or depth not in (1, 2, 4, 8, 16, 24, 32):
        raise ImageError(f"damaged or truncated (a BMP of width {width}, {depth} bits a pixel)")
    masked = compression in (_MASKS, _ALPHA_MASKS) and depth in (16, 32) and length != _OS2
    run_length = (compression, depth) in ((_RLE8, 8), (_RLE4, 4))
    if not (compression == _RAW or masked or run_length):
        raise ImageError(f"a BMP with compression {compression} at {depth} bits a pixel; expected raw or RLE")
    masks = _DEFAULT_MASKS.get(depth)
    if masked:
        count = 4 if length >= 56 or compression == _ALPHA_MASKS and length == 40 else 3
        where = header[36:] if length >= 52 else take(file, 4 * count)  # inside of the header, or behind it
        masks = (*struct.unpack_from(f"<{count}I", where), 0)[:4]
        if not any(masks):  # as some programs write them, for the usual order with alpha
            masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    palette = _palette(file, depth, colours, 3 if length == _CORE else 4, offset) if depth <= 8 else None
    start = offset if offset > 14 + length else file.tell()
    grey = palette is not None and bool((palette == palette[:, :1]).all())
    mode = "L" if grey else "RGBA" if masks and masks[3] else "RGB"
    size = (width, height)

    def strips() -> Iterator[np.ndarray]:
        file.seek(start)
        if run_length:
            whole = _runs(file.read(_MAX_RUNS + 1), width, height, compression == _RLE4, deadline)
            step = strip_rows(width)
            rows = (whole[top : top + step] for top in range(0, height, step))
        else:
            rows = _rows(file, start, width, height, depth, upside_down)
        for strip in rows:
            if palette is not None:
                if strip.max() >= len(palette):
                    raise ImageError(f"damaged or truncated (colour {strip.max()} of {len(palette)})")
                yield palette[strip, 0] if grey else palette[strip]
            elif depth == 24:
                yield np.ascontiguousarray(strip.reshape(-1, width, 3)[..., ::-1])
            else:
                used = masks if masks[3] else masks[:3]
                yield np.stack([_masked(strip, mask) for mask in used], axis=-1)

    return Contents(
        "BMP",
        size,
        1 if grey else 4,
        lambda: assembled(mode, size, strips(), deadline),
        mode="P" if palette is not None and not grey else "1" if grey and depth == 1 else mode,
    )


def _palette(file: BinaryIO, depth: int, colours: int, entry: int, offset: int) -> np.ndarray:
    """[colours, 3] uint8"""
    room = (offset - file.tell()) // entry
    colours = min(colours or 2**depth, 2**depth)
    if 0 < room < colours:
        colours = room
    table = np.frombuffer(take(file, colours * entry), np.uint8).reshape(colours, entry)
    return np.ascontiguousarray(table[:, 2::-1])


def _rows(
    file: BinaryIO, start: int, width: int, height: int, depth: int, upside_down: bool
) -> Iterator[np.ndarray]:
    """Strips of [h, W] samples, [h, 3 W] of 24 bits, from the top down."""
    stride = (width * depth + 31) // 32 * 4
    step = strip_rows(width)
    for top in range(0, height, step):
        count = min(step, height - top)
        first = height - top - count if upside_down else top
        file.seek(start + first * stride)
        data = file.read(count * stride)
        if len(data) < count * stride:
            # the padding of the last row may be missing
            if len(data) < (count - 1) * stride + (width * depth + 7) // 8:
                raise ImageError(CUT_OFF)
            data += bytes(count * stride - len(data))
        rows = np.frombuffer(data, np.uint8).reshape(count, stride)
        rows = rows[::-1] if upside_down else rows
        if depth < 8:
            bits = np.unpackbits(rows, axis=1).reshape(count, -1, depth)
            rows = (bits << np.arange(depth - 1, -1, -1, dtype=np.uint8)).sum(-1, dtype=np.uint8)
        elif depth in (16, 32):
            rows = np.ascontiguousarray(rows).view(f"<u{depth // 8}")
        yield rows[:, : width * 3 if depth == 24 else width]


def _masked(pixels: np.ndarray, mask: int) -> np.ndarray:
    """The bits under a mask, spread over 0..255."""
    if not mask:
        return np.zeros(pixels.shape, np.uint8)
    shift = (mask & -mask).bit_length() - 1
    white = mask >> shift
    if white & (white + 1):
        raise ImageError(f"damaged or truncated (a BMP mask {mask:#x} with gaps)")
    levels = (pixels & pixels.dtype.type(mask & (2 ** (8 * pixels.itemsize) - 1))) >> shift
    if white == 255:
        return levels.astype(np.uint8)
    return ((levels.astype(np.uint64) * 255 + white // 2) // white).astype(np.uint8)


def _runs(code: bytes, width: int, height: int, nibbles: bool, deadline: Deadline) -> np.ndarray:
    """[H, W] indices of run-length code, from the top down. What the code leaves out is colour 0."""
    if len(code) > _MAX_RUNS:
        raise ImageError(f"over {_MAX_RUNS} bytes of run-length coded BMP; expected fewer")
    rows = np.zeros((height, width), np.uint8)
    x = y = at = 0
    while y < height:
        if at + 2 > len(code):
            raise ImageError(CUT_OFF)
        if at % 2**16 == 0:
            deadline.check()
        count, value = code[at], code[at + 1]
        at += 2
        if count:
            room = max(min(count, width - x), 0)
            if nibbles:
                rows[y, x : x + room : 2] = value >> 4
                rows[y, x + 1 : x + room : 2] = value & 15
            else:
                rows[y, x : x + room] = value
            x += count
        elif value == 0:
            x, y = 0, y + 1
        elif value == 1:
            break
        elif value == 2:
            if at + 2 > len(code):
                raise ImageError(CUT_OFF)
            x, y, at = x + code[at], y + code[at + 1], at + 2
        else:
            size = (value + 1) // 2 if nibbles else value
            data = np.frombuffer(code[at : at + size], np.uint8)
            if len(data) < size:
                raise ImageError(CUT_OFF)
            if nibbles:
                data = np.stack([data >> 4, data & 15], axis=1).reshape(-1)
            room = max(min(value, width - x), 0)
            rows[y, x : x + room] = data[:room]
            x, at = x + value, at + size + size % 2
    return rows[::-1]
