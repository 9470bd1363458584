"""A sheet of paper to draw figures on: pictures, text, bars and legends, with Pillow and numpy."""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from zfcore.report.colour import coloured

__all__ = [
    "INK",
    "MUTED",
    "OUTSIDE",
    "RULE",
    "Sheet",
    "enlarged",
    "plain_text",
    "projection_picture",
    "rgb_array",
]

PAPER, INK, MUTED, RULE = (255, 255, 255), (24, 26, 31), (96, 101, 112), (222, 225, 230)
OUTSIDE = (232, 234, 238)  # what lies past the picture's edge

_SMALLEST_SHOWN = 1e-12
_LONGEST = 400  # characters of a line


_STAND_INS = str.maketrans({"\N{MULTIPLICATION SIGN}": "x", "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-"})
_UNKNOWN = "\N{MIDDLE DOT}"


def plain_text(text: str) -> str:
    """Text that cannot rearrange what stands around it: controls and direction marks become dots."""
    return "".join(_UNKNOWN if unicodedata.category(c)[0] == "C" else c for c in text)


@lru_cache
def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def _drawn(character: str) -> str:
    """The character, or a dot where Pillow's own font has no shape for it."""
    font = _font(20)
    shape, none = (font.getmask(c) for c in (character, "\uffff"))
    same = shape.size == none.size and bytes(shape) == bytes(none)
    return _UNKNOWN if same else character


def _text_width(text: str, size: int) -> float:
    return _font(size).getlength(text)


def _drawable(text: str) -> str:
    return "".join(_drawn(c) for c in plain_text(text).translate(_STAND_INS))


def _shortened(text: str, size: int, width: float) -> str:
    """The text, or its two ends with dots between, in at most `width` pixels."""
    if _text_width(text, size) <= width:
        return text
    for kept in range(min(len(text), _LONGEST) - 1, 1, -1):
        head = (kept + 1) // 2
        short = f"{text[:head]}...{text[len(text) - (kept - head) :]}"
        if _text_width(short, size) <= width:
            return short
    return "..."


def rgb_array(pixels: Tensor) -> np.ndarray:
    """[C, H, W] in 0..1, C = 1 or 3 (more: the first three) -> uint8 [H, W, 3]."""
    array = pixels.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    array = np.repeat(array[..., :1], 3, axis=2) if array.shape[2] < 3 else array[..., :3]
    return np.rint(np.nan_to_num(array) * 255).astype(np.uint8)


def projection_picture(pixels: Tensor) -> np.ndarray:
    """A projection [C, H, W] -> uint8 [H, W, 3]: mid-grey is zero, the contrast is the projection's own.

    The scale is the 99.8 % quantile of the magnitudes, so that one extreme pixel does not grey out the
    rest.
    """
    magnitudes = pixels.detach().abs().float().flatten()
    scale = float(magnitudes.quantile(0.998)) or float(magnitudes.max())
    if not scale > _SMALLEST_SHOWN:
        return rgb_array(pixels.detach().float() * 0 + 0.5)
    return rgb_array(0.5 + 0.5 * pixels.detach().float() / scale)


def enlarged(array: np.ndarray, side: int) -> Image.Image:
    """uint8 [H, W, 3] with its longer side as near to `side` as whole pixels allow.

    Small pictures are enlarged by a whole factor without smoothing, so that each pixel stays a square;
    those that are nearly or more than the size are resampled.
    """
    image = Image.fromarray(array)
    longer = max(image.size)
    if longer * 2 <= side:
        factor = side // longer
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * side / longer)), max(1, round(image.height * side / longer)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


class Sheet:
    """White paper of a fixed size, in pixels; (x, y) are left and top."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self, x: float, y: float, text: str, size: int = 15, fill=INK, anchor: str = "la", width: float = 1e9
    ) -> None:
        if len(text) > _LONGEST:  # measuring takes time for each character
            text = f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 2 :]}"
        self.draw.text(
            (x, y), _shortened(_drawable(text), size, width), fill=fill, font=_font(size), anchor=anchor
        )

    def paragraph(self, x: int, y: int, text: str, width: int, size: int = 15, fill=MUTED) -> int:
        """Text broken at spaces; returns the y below it."""
        for line in _broken(_drawable(text), size, width):
            self.text(x, y, line, size, fill, width=width)
            y += round(size * 1.45)
        return y

    def picture(self, x: int, y: int, image: Image.Image, frame: bool = True) -> None:
        self.image.paste(image, (x, y))
        if frame:
            self.draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=RULE)

    def outline(self, box: Sequence[float], colour, width: int = 3) -> None:
        """A box (x0, y0, x1, y1), the ends exclusive, edged with white so that it stands out anywhere."""
        x0, y0, x1, y1 = (round(v) for v in box)
        x1, y1 = max(x1 - 1, x0), max(y1 - 1, y0)
        self.draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=PAPER)
        self.draw.rectangle((x0, y0, x1, y1), outline=tuple(colour), width=width)
        if x1 - x0 > 2 * width and y1 - y0 > 2 * width:
            self.draw.rectangle((x0 + width, y0 + width, x1 - width, y1 - width), outline=PAPER)

    def rule(self, x0: int, y: int, x1: int) -> None:
        self.draw.line((x0, y, x1, y), fill=RULE)

    def swatch(self, x: int, y: int, colour, side: int = 14) -> None:
        self.draw.rectangle((x, y, x + side, y + side), fill=tuple(int(v) for v in colour), outline=RULE)

    def legend(self, x: int, y: int, width: int, kind: str, ticks: Sequence[tuple[float, str]]) -> None:
        """A colour bar with its values beneath; each tick is (place along the bar 0..1, text)."""
        height = 14
        ramp = np.linspace(0 if kind == "sequential" else -1, 1, width)
        self.picture(x, y, Image.fromarray(np.repeat(coloured(ramp, kind)[None], height, axis=0)))
        for place, text in ticks:
            at = x + place * (width - 1)
            self.draw.line((at, y + height, at, y + height + 4), fill=MUTED)
            anchor = "la" if place < 0.05 else "ra" if place > 0.95 else "ma"
            self.text(at, y + height + 7, text, 14, MUTED, anchor)


def _broken(text: str, size: int, width: float) -> list[str]:
    lines, line = [], ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if line and _text_width(longer, size) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]
