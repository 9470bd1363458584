"""TIFF: its directory, read before Pillow and libtiff see it. What they would read wrongly is refused here.

TIFF 6.0, with BigTIFF's longer fields. libtiff decodes a whole strip or tile before it comes back, so what
one of them may take is bounded by the directory.
"""

import struct
import zlib
from typing import BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

from zfcore.data.formats import jpeg, libtiff
from zfcore.data.formats.contents import CUT_OFF, Contents, Deadline, opened, take
from zfcore.errors import ImageError

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 274, 277, 278, 279, 284
_PREDICTOR, _COLOURS, _TILE_WIDTH, _TILE_LENGTH, _TILES, _TILE_BYTES = 317, 320, 322, 323, 324, 325
_EXTRA, _FORMAT, _SUBSAMPLING, _REFERENCE, _EXIF, _GPS = 338, 339, 530, 532, 34665, 34853
_READ = {  # the tags whose values count here
    _WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES,
    _PLANAR, _PREDICTOR, _COLOURS, _TILE_WIDTH, _TILE_LENGTH, _TILES, _TILE_BYTES, _EXTRA, _FORMAT,
    _SUBSAMPLING, _REFERENCE, _EXIF, _GPS,
}  # fmt: skip

_NONE, _LZW, _JPEG, _DEFLATE, _PACKBITS, _OLD_DEFLATE, _ZSTD = 1, 5, 7, 8, 32773, 32946, 50000
_FAX = (2, 3, 4)
_COMPRESSIONS = (_NONE, *_FAX, _LZW, _JPEG, _DEFLATE, _PACKBITS, _OLD_DEFLATE, _ZSTD)
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_COLOUR_SAMPLES = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
_PHOTOMETRICS = {
    4: "a mask", 8: "CIE L*a*b*", 9: "ICC L*a*b*", 10: "ITU L*a*b*", 32803: "a colour filter array",
    32844: "log luminance", 32845: "log LUV", 34892: "linear raw",
}  # fmt: skip
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_SIZES |= {16: 8, 17: 8, 18: 8}
_NUMBERS = {1: "B", 3: "H", 4: "I", 11: "f", 12: "d", 13: "I", 16: "Q", 18: "Q"}
_BYTES = (1, 2, 6, 7)  # types that Pillow keeps as they are
_MAX_ENTRIES = 2**12
_MAX_SAMPLES = 6  # as Pillow's
_MAX_PARTS = 2**17  # strips or tiles; Pillow sets a decoder up for each
_MAX_NUMBERS = 2**22  # bytes of other values: Pillow makes a Python object of each number
_MAX_SUB_DIRECTORY = 2**20
_TRUSTED_DEFLATE = 2**25  # bytes that take at most 2 s, whatever they are
_INFLATE_SHARE = 0.4  # of the time there is
_ZSTD_WINDOW = 2**27


class _Directory(NamedTuple):
    """tags: the values that count. stored: bytes of all values. further: whether another one follows."""

    tags: dict[int, tuple]
    stored: int
    further: bool


def inspect(file: BinaryIO, deadline: Deadline) -> Contents:
    file.seek(0)
    magic = take(file, 4)
    order, big = "<" if magic[:1] == b"I" else ">", 43 in magic
    if big:
        sizes, reserved, first = struct.unpack(order + "HHQ", take(file, 12))
        if (sizes, reserved) != (8, 0):
            raise ImageError("damaged or truncated (a BigTIFF header)")
    else:
        (first,) = struct.unpack(order + "I", take(file, 4))
    directory = _directory(file, first, order, big)
    _check_sub_directories(file, directory.tags, order, big)
    tags = directory.tags
    width, height = _one(tags, _WIDTH), _one(tags, _LENGTH)
    if width is None or height is None:
        raise ImageError("damaged or truncated (a TIFF without a size)")
    kind = _Kind.of(tags)
    kind.check(order)
    total = file.seek(0, 2)
    cost = _cost(tags, kind, width, height, total)

    def decode() -> Image.Image:
        if kind.compression in (_DEFLATE, _OLD_DEFLATE):
            _check_deflate(file, tags, deadline.seconds * _INFLATE_SHARE)
        if kind.compression == _JPEG:
            _check_jpegs(file, tags, deadline)
        # libtiff opens the file's descriptor itself; only what is not compressed is read through the clock.
        with libtiff.quiet():
            try:
                if kind.compression == _NONE:
                    return opened(file, [(0, total)], "TIFF", deadline)
                file.seek(0)
                image = Image.open(file, formats=("TIFF",))
            except UnidentifiedImageError:
                raise ImageError(
                    f"a TIFF of {kind.samples} {kind.bits}-bit samples a pixel, photometric "
                    f"{kind.photometric}, extra samples {kind.extra}: a kind that is not read"
                ) from None
            image.load()
            return image

    return Contents(
        "TIFF",
        (width, height),
        cost + directory.stored * 3 / max(width * height, 1),
        decode,
        animated=directory.further,
        white=2**kind.bits - 1,
        inverted=kind.photometric == _WHITE_IS_ZERO and kind.bits > 8,
        notes=("16-bit colour: read as 8 bits",) if kind.samples > 1 and kind.bits == 16 else (),
    )


class _Kind(NamedTuple):
    """What the samples are."""

    photometric: int
    compression: int
    bits: int
    format: int
    samples: int
    extra: tuple[int, ...]
    planar: bool
    fill_order: int
    predictor: int
    full_colour: bool  # YCbCr without subsampling or ranges of its own
    wide_colours: bool  # a palette of 16-bit values, as it must be

    @classmethod
    def of(cls, tags: dict[int, tuple]) -> "_Kind":
        bits, formats = tags.get(_BITS, (1,)), tags.get(_FORMAT, (1,))
        samples = _one(tags, _SAMPLES, 1)
        if len(set(bits)) > 1 or len(set(formats)) > 1:
            raise ImageError(
                f"a TIFF of samples of {sorted(set(bits))[:9]} bits and formats {sorted(set(formats))[:9]}; "
                "expected all alike"
            )
        if samples > _MAX_SAMPLES:
            raise ImageError(f"a TIFF of {samples} samples a pixel; expected at most {_MAX_SAMPLES}")
        if len(bits) not in (1, samples):
            raise ImageError(f"damaged or truncated (a TIFF of {samples} samples and {len(bits)} depths)")
        reference = tags.get(_REFERENCE, (0, 255, 128, 255, 128, 255))
        return cls(
            _one(tags, _PHOTOMETRIC, 0),
            _one(tags, _COMPRESSION, 1),
            bits[0],
            formats[0],
            samples,
            tags.get(_EXTRA, ())[:_MAX_SAMPLES],
            _one(tags, _PLANAR, 1) == 2 and samples > 1,
            _one(tags, _FILL_ORDER, 1),
            _one(tags, _PREDICTOR, 1),
            tags.get(_SUBSAMPLING, (2, 2)) == (1, 1) and reference == (0, 255, 128, 255, 128, 255),
            max(tags.get(_COLOURS, (65535,))) > 255,
        )

    def check(self, order: str) -> None:
        """Refuses what would be read wrongly, or by nobody."""
        if self.compression not in _COMPRESSIONS:
            raise ImageError(f"a TIFF with compression {self.compression}; expected one of {_COMPRESSIONS}")
        if self.photometric not in _COLOUR_SAMPLES:
            name = _PHOTOMETRICS.get(self.photometric, f"photometric {self.photometric}")
            raise ImageError(f"a TIFF whose samples are {name}; expected grey, RGB, a palette, CMYK or YCbCr")
        grey = self.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO)
        if self.format == _SIGNED:
            raise ImageError("signed integer samples; expected unsigned ones, whose white is known")
        if self.format not in (_UNSIGNED, _FLOAT):
            raise ImageError(f"a TIFF of sample format {self.format}; expected unsigned or float")
        colours = _COLOUR_SAMPLES[self.photometric]
        if self.samples < colours:
            raise ImageError(f"damaged or truncated (a TIFF of {self.samples} samples; expected {colours})")
        name, depths = "colour", (8, 16) if self.photometric == _RGB else (8,)
        if self.format == _FLOAT:
            name, depths = "float", (32,)
        elif grey:
            name, depths = "grey", (1, 2, 4, 8, 12, 16, 32) if self.samples == 1 else (8,)
        elif self.photometric == _PALETTE:
            name, depths = "palette", (1, 2, 4, 8)
        if self.bits not in depths:
            raise ImageError(f"{self.bits}-bit {name} samples in a TIFF; expected {_listed(depths)} bits")
        if self.format == _FLOAT and (not grey or self.samples > 1):
            raise ImageError("float samples of a colour TIFF; expected grey ones")
        if self.samples > colours + len(self.extra) and not (self.photometric == _RGB and self.samples == 4):
            raise ImageError(
                f"a TIFF of {self.samples} samples a pixel that does not say what all of them mean"
            )
        reason = self._not_read(order, grey)
        if reason:
            raise ImageError(f"a TIFF of {self.bits}-bit {name} samples, {reason}: a kind that is not read")

    def _not_read(self, order: str, grey: bool) -> str | None:
        """Combinations that Pillow has no words for, or reads wrongly."""
        if self.planar and (self.bits != 8 or self.photometric not in (_RGB, _CMYK) or 1 in self.extra):
            return "in separate planes"
        if self.fill_order != 1 and not (grey and self.bits == 1 and self.compression in (_NONE, *_FAX)):
            return "with the bits of each byte turned round"
        if self.predictor != 1 and self.compression not in (_LZW, _DEFLATE, _OLD_DEFLATE, _ZSTD):
            return f"with predictor {self.predictor}, which compression {self.compression} does not know"
        if 1 in self.extra and self.bits == 16:
            return "multiplied by alpha"
        if order == ">" and self.bits in (12, 32) and (
            self.format == _UNSIGNED or self.compression != _NONE
        ):  # fmt: skip
            return "big-endian"
        if self.photometric == _WHITE_IS_ZERO and (
            self.bits in (12, 32) and self.format == _UNSIGNED or self.bits == 16 and order == ">"
        ):
            return "white at zero"
        if self.photometric == _YCBCR and self.compression == _NONE and not self.full_colour:
            return "subsampled, or with a range of its own, without JPEG"
        if self.photometric == _PALETTE and not self.wide_colours:
            return "with a palette of 8-bit values where 16 are due"
        return None


def _directory(file: BinaryIO, offset: int, order: str, big: bool) -> _Directory:
    """A directory's tags. All values together are bounded, however many of them share their bytes."""
    total = file.seek(0, 2)
    if not 8 <= offset < total:
        raise ImageError(CUT_OFF)
    file.seek(offset)
    (count,) = struct.unpack(order + ("Q" if big else "H"), take(file, 8 if big else 2))
    if count > _MAX_ENTRIES:
        raise ImageError(f"a TIFF directory of {count} entries; expected at most {_MAX_ENTRIES}")
    entry, inside = (20, 8) if big else (12, 4)
    table = take(file, entry * count)
    following = file.read(inside)
    tags: dict[int, tuple] = {}
    stored = numbers = 0
    for at in range(0, entry * count, entry):
        tag, kind, length = struct.unpack_from(order + ("HHQ" if big else "HHI"), table, at)
        size = _SIZES.get(kind, 1) * length
        if size > total:
            raise ImageError(CUT_OFF)
        if size > inside:
            stored += size
            numbers += 0 if kind in _BYTES and tag not in _READ else size
        if numbers > _MAX_NUMBERS:
            raise ImageError(f"over {_MAX_NUMBERS} bytes of numbers in a TIFF's directory; expected fewer")
        if tag not in _READ or kind not in _NUMBERS or tag in tags:
            continue
        if size <= inside:
            data = table[at + entry - inside :][:size]
        else:
            (where,) = struct.unpack_from(order + ("Q" if big else "I"), table, at + entry - inside)
            file.seek(where)
            data = take(file, size)
        tags[tag] = struct.unpack(f"{order}{length}{_NUMBERS[kind]}", data)
    return _Directory(tags, stored, any(following))


def _check_sub_directories(file: BinaryIO, tags: dict[int, tuple], order: str, big: bool) -> None:
    """Pillow reads these whole, for metadata that nobody asks for here."""
    for tag in (_EXIF, _GPS):
        if offset := _one(tags, tag):
            stored = _directory(file, offset, order, big).stored
            if stored > _MAX_SUB_DIRECTORY:
                raise ImageError(f"{stored} bytes in a TIFF's EXIF; expected at most {_MAX_SUB_DIRECTORY}")


def _cost(tags: dict[int, tuple], kind: _Kind, width: int, height: int, total: int) -> float:
    """Bytes for each pixel that decoding takes. Refuses strips and tiles out of proportion to the picture."""
    pixels = max(width * height, 1)
    if _TILES in tags and _STRIPS not in tags:
        across, down = _one(tags, _TILE_WIDTH, 0), _one(tags, _TILE_LENGTH, 0)
        if not across or not down:
            raise ImageError("damaged or truncated (TIFF tiles without a size)")
        offsets, sizes = tags[_TILES], tags.get(_TILE_BYTES, ())
        padded = -(-width // across) * across * -(-height // down) * down
        if padded > 4 * pixels + 2**22:
            raise ImageError(
                f"TIFF tiles of {across} x {down} for {width} x {height} pixels; expected smaller ones"
            )
    else:
        across, down = width, min(_one(tags, _ROWS, height) or height, height)
        offsets, sizes = tags.get(_STRIPS, ()), tags.get(_STRIP_BYTES, ())
    if len(offsets) > _MAX_PARTS:
        raise ImageError(f"a TIFF of {len(offsets)} strips or tiles; expected at most {_MAX_PARTS}")
    samples = 1 if kind.planar else kind.samples
    decoded = across * down * samples * kind.bits / 8
    memory = pixels * (1 if kind.samples == 1 and kind.bits <= 8 else 4)
    if kind.compression != _NONE:
        memory += _ZSTD_WINDOW if kind.compression == _ZSTD else 0
        memory += decoded * (2 if kind.photometric == _YCBCR else 1) + min(sum(sizes) or total, total)
        if sum(sizes) > 2 * pixels * kind.samples * kind.bits / 8 + 2**20:
            raise ImageError(
                f"{sum(sizes)} bytes of compressed TIFF for {width} x {height} pixels; expected fewer"
            )
    return memory / pixels


def _check_jpegs(file: BinaryIO, tags: dict[int, tuple], deadline: Deadline) -> None:
    """Each strip or tile is a JPEG of its own; libjpeg goes over it once for each scan."""
    for offset in tags.get(_STRIPS) or tags.get(_TILES, ()):
        file.seek(offset)
        if jpeg.header(file, deadline).several:
            raise ImageError("a TIFF of progressive JPEG; expected a single scan in each strip")


def _check_deflate(file: BinaryIO, tags: dict[int, tuple], seconds: float) -> None:
    """Inflates a large file's strips once before libtiff does, which cannot be stopped: a deflate stream can
    hold the decoder at 60 ms for each MB that gives no byte."""
    sizes = tags.get(_STRIP_BYTES) or tags.get(_TILE_BYTES, ())
    if sum(sizes) < _TRUSTED_DEFLATE:
        return
    deadline = Deadline(seconds)
    for offset, size in zip(tags.get(_STRIPS) or tags.get(_TILES, ()), sizes, strict=False):
        file.seek(offset)
        stream = zlib.decompressobj()
        while size > 0 and not stream.eof:
            data = file.read(min(size, 2**16))
            if not data:
                raise ImageError(CUT_OFF)
            size -= len(data)
            while data and not stream.eof:
                deadline.check()
                stream.decompress(data, 2**20)
                data = stream.unconsumed_tail


def _one(tags: dict[int, tuple], tag: int, default: int | None = None) -> int | None:
    value = tags.get(tag)
    return int(value[0]) if value else default


def _listed(numbers: tuple[int, ...]) -> str:
    head = ", ".join(map(str, numbers[:-1]))
    return f"{head} or {numbers[-1]}" if head else str(numbers[-1])
