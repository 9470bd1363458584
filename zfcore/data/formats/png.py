"""PNG: the chunks that decide the pixels. Text, profiles and animation are stepped over unread.

gAMA, cHRM, sRGB and iCCP are not applied: the samples are taken as they stand, as from every other format.
"""

import struct
import zlib
from typing import BinaryIO

from zfcore.data.formats.contents import CUT_OFF, Contents, Deadline, opened, take
from zfcore.data.formats.exif import orientation
from zfcore.errors import ImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"\0\0\0\0IEND\xaeB`\x82"
_MAX_CHUNKS = 2**18  # enough for 64 million pixels in chunks of 1 KB
_MAX_KEPT = 2**24  # bytes of one chunk that is read whole

_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGB_ALPHA = 0, 2, 3, 4, 6
_DEPTHS = {
    _GREY: (1, 2, 4, 8, 16), _RGB: (8, 16), _PALETTE: (1, 2, 4, 8), _GREY_ALPHA: (8, 16), _RGB_ALPHA: (8, 16)
}  # fmt: skip


def inspect(file: BinaryIO, deadline: Deadline) -> Contents:
    file.seek(len(SIGNATURE))
    length, kind = struct.unpack(">I4s", take(file, 8))
    if kind == b"CgBI":
        raise ImageError("an Apple-optimised PNG (CgBI); expected one after the standard")
    if kind != b"IHDR" or length != 13:
        raise ImageError("damaged or truncated (no PNG header)")
    header = _body(file, kind, 13)
    width, height, depth, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", header)
    if depth not in _DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise ImageError(
            f"damaged or truncated (PNG colour type {colour}, depth {depth}, compression {compression}, "
            f"filter {filtering}, interlace {interlace})"
        )
    pieces: list = [SIGNATURE, _chunk(b"IHDR", header)]
    kept: dict[bytes, bytes] = {}
    frames, start, end = 1, 0, 0
    for _ in range(_MAX_CHUNKS):
        at = file.tell()
        head = file.read(8)
        if len(head) < 8:
            break
        length, kind = struct.unpack(">I4s", head)
        if length > 2**31 - 1 or not kind.isalpha():
            raise ImageError("damaged or truncated (a PNG chunk without a name)")
        if kind == b"IEND":
            break
        if kind == b"IDAT":
            if start and at != end:
                break  # only neighbours belong together
            start, end = start or at, at + 12 + length
            file.seek(end)
        elif kind in (b"PLTE", b"tRNS", b"eXIf", b"acTL"):
            if kind in kept:
                raise ImageError(f"damaged or truncated (two {kind.decode()} chunks)")
            body = _body(file, kind, length)
            if not (start and kind in (b"PLTE", b"tRNS")):  # after the pixels they would come too late
                kept[kind] = body
        elif kind[:1].isupper():
            raise ImageError(f"damaged or truncated (an unknown PNG chunk {kind!r})")
        else:
            file.seek(at + 12 + length)
    else:
        raise ImageError(f"over {_MAX_CHUNKS} PNG chunks; expected fewer")
    if not start:
        raise ImageError(CUT_OFF if width and height else "no pixels")
    if len(kept.get(b"acTL", b"")) >= 4:
        (frames,) = struct.unpack_from(">I", kept[b"acTL"])
    if colour == _PALETTE:
        palette = kept.get(b"PLTE", b"")
        if not 3 <= len(palette) <= 3 * 2**depth or len(palette) % 3:
            raise ImageError(f"damaged or truncated (a PNG palette of {len(palette)} bytes)")
        pieces.append(_chunk(b"PLTE", palette))
        if kept.get(b"tRNS"):
            pieces.append(_chunk(b"tRNS", kept[b"tRNS"][: len(palette) // 3]))
    key = _transparent(kept.get(b"tRNS"), colour, depth)
    notes = ("16-bit colour: read as 8 bits",) if depth == 16 and colour != _GREY else ()

    def decode():
        return opened(file, [*pieces, (start, end), _END], "PNG", deadline)

    return Contents(
        "PNG",
        (width, height),
        {_GREY: 1 if depth <= 8 else 2, _PALETTE: 1}.get(colour, 4),
        decode,
        orientation=orientation(kept.get(b"eXIf", b"")),
        animated=frames > 1,
        key=key,
        notes=notes,
    )


def _transparent(body: bytes | None, colour: int, depth: int) -> int | tuple[int, ...] | None:
    """The level or colour of a tRNS chunk, in samples as Pillow gives them: 1, 2 and 4 bits spread over 8."""
    if body is None or colour not in (_GREY, _RGB):
        return None
    if len(body) != (2 if colour == _GREY else 6):
        raise ImageError(f"damaged or truncated (a tRNS chunk of {len(body)} bytes)")
    if colour == _RGB and depth == 16:
        raise ImageError("a transparent colour among 16-bit colours; expected 8 bits, or an alpha channel")
    # "If the image bit depth is less than 16, the least significant bits are used": PNG, 11.3.2.1
    levels = [level & (2**depth - 1) for level in struct.unpack(f">{len(body) // 2}H", body)]
    if colour == _RGB:
        return tuple(levels)
    return levels[0] if depth == 16 else levels[0] * 255 // (2**depth - 1)


def _body(file: BinaryIO, kind: bytes, length: int) -> bytes:
    if length > _MAX_KEPT:
        raise ImageError(f"a {kind.decode()} chunk of {length} bytes; expected at most {_MAX_KEPT}")
    body = take(file, length)
    (sum_,) = struct.unpack(">I", take(file, 4))
    if sum_ != zlib.crc32(kind + body):
        raise ImageError(f"damaged or truncated (the checksum of {kind.decode()} is wrong)")
    return body


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
