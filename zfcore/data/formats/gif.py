"""GIF: the first frame, and nothing of the comments, programs and frames around it."""

import struct
from typing import BinaryIO

from zfcore.data.formats.contents import Contents, Deadline, opened, take
from zfcore.errors import ImageError

_MAX_EXTENSIONS = 2**12
_MAX_BLOCKS = 2**21  # of up to 255 bytes: 64 million pixels that do not compress take 400,000


def inspect(file: BinaryIO, deadline: Deadline) -> Contents:
    file.seek(0)
    screen = take(file, 13)
    width, height, flags = struct.unpack_from("<HHB", screen, 6)
    table = take(file, 3 << (flags & 7) + 1) if flags & 0x80 else b""
    control = b""
    for _ in range(_MAX_EXTENSIONS):
        kind = take(file, 1)
        if kind == b",":
            break
        if kind != b"!":
            raise ImageError("damaged or truncated (a GIF without a frame)")
        label = take(file, 1)
        if label == b"\xf9":
            (length,) = take(file, 1)
            control = take(file, length)[:4] if length >= 4 else b""
        _skip(file, deadline)
    else:
        raise ImageError(f"over {_MAX_EXTENSIONS} GIF extensions before the pixels; expected fewer")
    left, top, frame_width, frame_height, frame_flags = struct.unpack("<HHHHB", take(file, 9))
    frame_table = take(file, 3 << (frame_flags & 7) + 1) if frame_flags & 0x80 else b""
    start = file.tell()
    take(file, 1)  # the code size
    _skip(file, deadline)
    end = file.tell()

    # Pillow sees a picture of the frame's size: what lies around it is white here, and not colour 0.
    own_screen = screen[:6] + struct.pack("<HHBBB", frame_width, frame_height, flags, 0, 0) + table
    frame = b"," + struct.pack("<HHHHB", 0, 0, frame_width, frame_height, frame_flags) + frame_table
    width, height = max(width, left + frame_width), max(height, top + frame_height)

    def decode():
        return opened(file, [own_screen, frame, (start, end), b";"], "GIF", deadline)

    return Contents(
        "GIF",
        (frame_width, frame_height),
        1,
        decode,
        animated=_another(file, deadline),
        key=control[3] if control and control[0] & 1 else None,
        canvas=None if (width, height) == (frame_width, frame_height) else (width, height, left, top),
    )


def _skip(file: BinaryIO, deadline: Deadline) -> None:
    """Steps over blocks, to behind the empty one that ends them (or to the end of a file that is cut off)."""
    for count in range(_MAX_BLOCKS):
        if count % 4096 == 0:
            deadline.check()
        length = file.read(1)
        if not length or not length[0]:
            return
        file.seek(length[0], 1)
    raise ImageError(f"over {_MAX_BLOCKS} GIF blocks in a row; expected fewer")


def _another(file: BinaryIO, deadline: Deadline) -> bool:
    """Whether a further frame follows."""
    for _ in range(_MAX_EXTENSIONS):
        kind = file.read(1)
        if kind != b"!":
            return kind == b","
        file.read(1)
        _skip(file, deadline)
    return True
