"""WebP: the first frame's chunks. libwebp wants a file whole in memory, so it gets no others."""

import struct
from typing import BinaryIO

from zfcore.data.formats.contents import Contents, Deadline, opened, take
from zfcore.data.formats.exif import orientation
from zfcore.errors import ImageError

_MAX_CHUNKS = 2**16
_MAX_EXIF = 2**24
_COPIES = 3  # of the file, until libwebp has it
_COST = 18  # bytes a pixel: libwebp's animation decoder holds the canvas twice, then it is copied twice


def inspect(file: BinaryIO, deadline: Deadline) -> Contents:
    file.seek(12)
    size, frames, exif = None, 0, b""
    chunks = []  # (start, end) of what belongs to the first frame
    extended = b""
    for index in range(_MAX_CHUNKS):
        at = file.tell()
        head = file.read(8)
        if len(head) < 8:
            break
        kind, length = struct.unpack("<4sI", head)
        end = at + 8 + length + length % 2
        if index == 0:
            if kind == b"VP8X":
                extended = head + take(file, 10)
                across, down = extended[12:15] + b"\0", extended[15:18] + b"\0"
                size = struct.unpack("<I", across)[0] + 1, struct.unpack("<I", down)[0] + 1
            else:
                size = _frame_size(kind, take(file, min(length, 10)))
                chunks.append((at, end))
                break
        elif kind in (b"ANMF", b"VP8 ", b"VP8L", b"ALPH", b"ANIM"):
            frames += kind == b"ANMF"
            if frames <= 1:
                chunks.append((at, end))
        elif kind == b"EXIF":
            if length > _MAX_EXIF:
                raise ImageError(f"an EXIF chunk of {length} bytes; expected at most {_MAX_EXIF}")
            exif = exif or take(file, length)
        file.seek(end)
    else:
        raise ImageError(f"over {_MAX_CHUNKS} WebP chunks; expected fewer")
    if size is None or not chunks:
        raise ImageError("damaged or truncated (a WebP without a frame)")
    if extended:  # no profile, EXIF or XMP in what libwebp gets
        extended = extended[:8] + bytes([extended[8] & 0x12]) + extended[9:]

    def decode():
        total = file.seek(0, 2)
        stretches = [(start, min(end, total)) for start, end in chunks]
        length = 4 + len(extended) + sum(end - start for start, end in chunks)
        return opened(
            file, [b"RIFF" + struct.pack("<I", length) + b"WEBP" + extended, *stretches], "WEBP", deadline
        )

    stored = sum(end - start for start, end in chunks) * _COPIES / max(size[0] * size[1], 1)
    return Contents("WEBP", size, _COST + stored, decode, orientation=orientation(exif), animated=frames > 1)


def _frame_size(kind: bytes, data: bytes) -> tuple[int, int]:
    if kind == b"VP8L" and len(data) >= 5 and data[0] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 1)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(data) == 10 and data[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 6)
        return width & 0x3FFF, height & 0x3FFF
    raise ImageError(f"damaged or truncated (a WebP that starts with {kind!r})")
