"""The kinds of picture files that are read: what their headers say, before a pixel is decoded."""

from typing import BinaryIO

from zfcore.data.formats import bmp, gif, jpeg, png, pnm, tiff, webp
from zfcore.data.formats.contents import Contents, Deadline
from zfcore.errors import ImageError

__all__ = ["FORMATS", "Contents", "Deadline", "inspect"]

# Only these are ever decoded; the rest of what Pillow knows (EPS, FITS, PDF, ...) is attack surface.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def inspect(file: BinaryIO, deadline: Deadline) -> Contents:
    """What the file says of itself, told by its contents. Raises ImageError for what is not read."""
    head = file.read(16)
    file.seek(0)
    if head.startswith(png.SIGNATURE):
        kind = png
    elif head.startswith(b"\xff\xd8\xff"):
        kind = jpeg
    elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        kind = webp
    elif head.startswith((b"GIF87a", b"GIF89a")):
        kind = gif
    elif head.startswith(b"BM") and len(head) == 16:
        kind = bmp
    elif head.startswith(tiff.MAGICS):
        kind = tiff
    elif pnm.MAGIC.match(head):
        kind = pnm
    else:
        raise ImageError(f"not a picture of a kind that is read ({', '.join(FORMATS)})")
    return kind.inspect(file, deadline)
