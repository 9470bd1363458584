"""From a decoded picture to grey or RGB on white, a strip at a time: large ones are not copied twice."""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from zfcore.data.formats import Contents
from zfcore.data.formats.contents import strip_rows
from zfcore.errors import ImageError

__all__ = ["strips", "to_samples"]

_WHITE = 255


def to_samples(image: Image.Image, contents: Contents, notes: list[str]) -> Image.Image:
    """The picture as L or RGB (0..255), or as F (0..1) where 8 bits would lose precision."""
    samples = _opaque(image, contents, notes)
    if contents.canvas is None:
        return samples
    width, height, left, top = contents.canvas
    canvas = Image.new(samples.mode, (width, height), (_WHITE,) * len(samples.getbands()))
    canvas.paste(samples, (left, top))
    return canvas


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(first row, these rows) from the top down."""
    step = strip_rows(image.width)
    for top in range(0, image.height, step):
        yield top, image.crop((0, top, image.width, min(top + step, image.height)))


def _opaque(image: Image.Image, contents: Contents, notes: list[str]) -> Image.Image:
    mode, key = image.mode, contents.key
    if mode.startswith("I"):
        return _mapped(image, "F", lambda strip: _from_integers(strip, contents))
    if mode == "F":
        return _from_floats(image, contents, notes)
    if mode == "P":
        return _mapped(_palette_on_white(image, key), "RGB", lambda strip: strip.convert("RGB"))
    if mode in ("1", "L"):
        grey = image if mode == "L" else image.convert("L")
        if key is None:
            return grey
        return grey.point([_WHITE if level == key else level for level in range(256)])
    if mode in ("LA", "La", "RGBA", "PA"):
        # Hidden colours under transparent pixels must not show, so the picture is laid on white.
        return _mapped(image, "L" if mode[0] == "L" else "RGB", _on_white)
    if mode == "RGB":
        return image if key is None else _mapped(image, "RGB", lambda strip: _keyed(strip, key))
    if mode in ("RGBX", "CMYK", "YCbCr"):
        return _mapped(image, "RGB", lambda strip: strip.convert("RGB"))
    raise ImageError(f"colour mode {mode}; expected grey, RGB, CMYK, YCbCr or a palette")


def _mapped(image: Image.Image, mode: str, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    result = Image.new(mode, image.size)
    for top, strip in strips(image):
        result.paste(change(strip), (0, top))
    return result


def _on_white(strip: Image.Image) -> Image.Image:
    if strip.mode == "La":  # the levels are multiplied by alpha already
        level, alpha = (np.asarray(band).astype(np.uint16) for band in strip.split())
        return Image.fromarray(np.minimum(level + (_WHITE - alpha), _WHITE).astype(np.uint8))
    if strip.mode == "PA":
        strip = strip.convert("RGBA")
    *colours, alpha = strip.split()
    opaque = Image.merge("RGB", colours) if len(colours) == 3 else colours[0]
    paper = Image.new(opaque.mode, strip.size, (_WHITE,) * len(colours))
    paper.paste(opaque, mask=alpha)
    return paper


def _keyed(strip: Image.Image, key: tuple[int, ...]) -> Image.Image:
    """One colour stands for transparent."""
    array = np.array(strip)
    array[(array == key).all(-1)] = _WHITE
    return Image.fromarray(array)


def _palette_on_white(image: Image.Image, key: int | None) -> Image.Image:
    """The same indices, of a palette that is laid on white."""
    colours = np.array(image.getpalette("RGB"), np.float64).reshape(-1, 3)
    alpha = np.full((len(colours), 1), 1.0)
    transparency = image.info.pop("transparency", key)
    if isinstance(transparency, bytes):
        known = np.frombuffer(transparency, np.uint8)[: len(colours)]
        alpha[: len(known), 0] = known / 255
    elif transparency is not None and transparency < len(colours):
        alpha[transparency] = 0
    elif transparency is not None:  # beyond the palette
        colours = np.concatenate([colours, np.full((transparency + 1 - len(colours), 3), _WHITE)])
        alpha = np.full((len(colours), 1), 1.0)
    laid = np.rint(colours * alpha + _WHITE * (1 - alpha)).astype(np.uint8)
    image.putpalette(laid.tobytes(), "RGB")
    return image


def _from_integers(strip: Image.Image, contents: Contents) -> Image.Image:
    """Integer samples wider than 8 bits, scaled by the range of their type (not clipped, as Pillow does)."""
    array = np.asarray(strip)
    if strip.mode == "I":
        array = array.view(np.uint32)
    scaled = array.astype(np.float32) / np.float32(contents.white)
    if contents.inverted:  # Pillow turns these round for 8-bit samples only
        scaled = 1 - scaled
    if contents.key is not None:
        scaled[array == contents.key] = 1
    return Image.fromarray(scaled)


def _from_floats(image: Image.Image, contents: Contents, notes: list[str]) -> Image.Image:
    """Float samples: 0..1 by convention; 0..255, which some programs write, is noted."""
    ranges = np.array([(array.min(), array.max()) for _, array in _arrays(image)])
    low, high = float(ranges[:, 0].min()), float(ranges[:, 1].max())  # NaN wins
    if not (low >= 0 and high <= 255):
        raise ImageError(f"float samples from {low:g} to {high:g}; expected 0..1 or 0..255")
    if high > 1:
        notes.append("float samples above 1: read as 0..255")
    if high <= 1 and not contents.inverted:
        return image
    white = np.float32(255 if high > 1 else 1)
    for top, array in _arrays(image):
        array = array / white
        image.paste(Image.fromarray(1 - array if contents.inverted else array), (0, top))
    return image


def _arrays(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    for top, strip in strips(image):
        yield top, np.asarray(strip)
