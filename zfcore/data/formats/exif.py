"""The orientation in an EXIF block: one entry of its first directory, and nothing else of it."""

import struct

_ORIENTATION, _SHORT = 0x0112, 3


def orientation(exif: bytes) -> int:
    """1 to 8 as EXIF counts them; 1 where the block says nothing, or nothing that can be read."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == _ORIENTATION:
                return value if kind == _SHORT and count == 1 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
