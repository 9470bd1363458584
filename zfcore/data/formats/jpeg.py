"""JPEG: its markers up to the pixels, and the scans of a progressive file counted before they are decoded.

ISO 10918-1. libjpeg decodes each scan over the whole picture, so 500 bytes of a scan that changes nothing
cost as much time as a real one.
"""

import re
import struct
from typing import BinaryIO, NamedTuple

from zfcore.data.formats.contents import CUT_OFF, Contents, Deadline, opened, take
from zfcore.data.formats.exif import orientation
from zfcore.errors import ImageError

_MAX_SCANS = 100  # of a small picture; libtiff's bound too
_LARGE_SCANS = 24  # of 2^26 pixels and more; encoders write up to 18
_MAX_SEGMENTS = 2**12
_MAX_HEADER = 2**25  # bytes before the first scan: profiles, thumbnails and depth maps take some megabytes
_MAX_FILL = 2**16
_BLOCK = 2**20

_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_APP0, _APP1, _APP14, _APP15, _COM = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
_RESTARTS = range(0xD0, 0xD8)
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman coded
_OTHER_FRAMES = {
    0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical",
    0xC9: "arithmetic coded", 0xCA: "arithmetic coded", 0xCB: "arithmetic coded",
    0xCD: "arithmetic coded", 0xCE: "arithmetic coded", 0xCF: "arithmetic coded",
}  # fmt: skip
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)


class Header(NamedTuple):
    """parts: the segments that decide the pixels. scan: where the first scan's segment starts.
    several: whether libjpeg keeps the coefficients of the whole picture, for more scans to come."""

    size: tuple[int, int]
    sampling: list[tuple[int, int]]
    parts: bytes
    scan: int
    several: bool
    exif: bytes
    frames: int


def inspect(file: BinaryIO, deadline: Deadline) -> Contents:
    head = header(file, deadline)
    width, height = head.size
    bytes_a_pixel = 1 if len(head.sampling) == 1 else 4
    if head.several:  # 16-bit coefficients of every component
        across, down = (max(factors) for factors in zip(*head.sampling, strict=True))
        bytes_a_pixel += 2 * sum(h * v for h, v in head.sampling) / (across * down)

    def decode():
        end = file.seek(0, 2)
        if head.several:
            end = _checked_scans(file, head.scan, width * height)
        return opened(file, [head.parts, (head.scan, end)], "JPEG", deadline)

    return Contents(
        "JPEG",
        head.size,
        bytes_a_pixel,
        decode,
        orientation=orientation(head.exif),
        animated=head.frames > 1,
    )


def header(file: BinaryIO, deadline: Deadline) -> Header:
    """The segments from the file's position up to the first scan."""
    begin = file.tell()
    if take(file, 2) != b"\xff\xd8":
        raise ImageError("damaged or truncated (no JPEG)")
    parts = [b"\xff\xd8"]
    frame, exif, frames = None, b"", 1
    for _ in range(_MAX_SEGMENTS):
        deadline.check()
        marker = _next_marker(file)
        at = file.tell() - 2
        if at - begin > _MAX_HEADER:
            raise ImageError(f"over {_MAX_HEADER} bytes of JPEG header; expected fewer")
        if marker in _RESTARTS or marker == _TEM:
            continue
        if marker == _EOI or marker == _SOI:
            raise ImageError("damaged or truncated (a JPEG without a scan)")
        (length,) = struct.unpack(">H", take(file, 2))
        if length < 2:
            raise ImageError("damaged or truncated (a JPEG segment without its length)")
        if marker == _SOS:
            if frame is None:
                raise ImageError("damaged or truncated (a JPEG scan before its frame)")
            several = frame[0] == 0xC2 or take(file, 1)[0] < len(frame[2])
            return Header(frame[1], frame[2], b"".join(parts), at, several, exif, frames)
        body = take(file, length - 2)
        if marker in _OTHER_FRAMES:
            raise ImageError(f"a JPEG that is {_OTHER_FRAMES[marker]}; expected baseline or progressive")
        if marker in _FRAMES:
            if frame is not None:
                raise ImageError("damaged or truncated (two JPEG frames)")
            frame = (marker, *_frame(body))
        if marker == _APP1 and not exif and body.startswith(b"Exif\0\0"):
            exif = body
        if marker == 0xE2 and body.startswith(b"MPF\0"):
            frames = _pictures(body[4:])
        wanted = not (_APP0 <= marker <= _APP15 or marker == _COM)
        # JFIF's and Adobe's segments say what the components mean.
        wanted |= marker == _APP0 and body.startswith(b"JFIF") or marker == _APP14
        if wanted:
            parts.append(b"\xff" + bytes([marker]) + struct.pack(">H", length) + body)
    raise ImageError(f"over {_MAX_SEGMENTS} JPEG segments before the pixels; expected fewer")


def _next_marker(file: BinaryIO) -> int:
    """The next marker's code; bytes in between are skipped, as every decoder does."""
    after_fill = False
    for _ in range(_MAX_FILL):
        byte = take(file, 1)[0]
        if after_fill and byte not in (0x00, 0xFF):
            return byte
        after_fill = byte == 0xFF
    raise ImageError("damaged or truncated (no JPEG marker where one must be)")


def _frame(body: bytes) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """(width, height) and the sampling factors of each component."""
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        raise ImageError(CUT_OFF)
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    if precision != 8:
        raise ImageError(f"a JPEG of {precision}-bit samples; expected 8 bits")
    if components not in (1, 3, 4):
        raise ImageError(f"a JPEG of {components} components; expected 1, 3 or 4")
    sampling = [(byte >> 4, byte & 15) for byte in body[7 : 7 + 3 * components : 3]]
    if not all(1 <= h <= 4 and 1 <= v <= 4 for h, v in sampling):
        raise ImageError(f"damaged or truncated (JPEG sampling factors {sampling})")
    return (width, height), sampling


def _pictures(index: bytes) -> int:
    """How many pictures a multi-picture index counts."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(index[:4])
    try:
        (at,) = struct.unpack_from(order + "I", index, 4)
        (entries,) = struct.unpack_from(order + "H", index, at)
        for entry in range(at + 2, at + 2 + 12 * entries, 12):
            tag, _, _, value = struct.unpack_from(order + "HHII", index, entry)
            if tag == 0xB001:
                return value
    except (struct.error, TypeError):
        pass
    return 1


def _checked_scans(file: BinaryIO, start: int, pixels: int) -> int:
    """Where the scans end; refused where there are too many of them for a picture of so many pixels."""
    allowed = min(_MAX_SCANS, max(_LARGE_SCANS * 2**26 // max(pixels, 1), _LARGE_SCANS))
    scans = segments = 0
    position, at, data = start, 0, b""
    file.seek(start)
    while True:
        found = _MARKER.search(data, at)
        if found is None:
            rest = int(data.endswith(b"\xff"))  # a marker may go on in the next block
            position += len(data) - rest
            block = file.read(_BLOCK)
            if not block:
                return position + rest
            data, at = data[len(data) - rest :] + block, 0
            continue
        marker, at = found[1][0], found.end()
        if marker == _EOI:
            return position + at
        scans += marker == _SOS
        segments += 1
        if scans > allowed:
            raise ImageError(f"a JPEG of more than {allowed} scans over {pixels} pixels; expected fewer")
        if segments > _MAX_SEGMENTS:
            raise ImageError(f"a JPEG of over {_MAX_SEGMENTS} segments; expected fewer")
        if marker in (_TEM, _SOI):
            continue
        length = data[at : at + 2]
        if len(length) < 2:
            file.seek(position + at)
            length = file.read(2)
            if len(length) < 2:
                return position + at + len(length)
        at += struct.unpack(">H", length)[0]
        if at > len(data):
            position, at, data = position + at, 0, b""
            file.seek(position)
