"""The paper's figures for one picture: projections layer by layer, and what a moving box does.

Paper: Zeiler & Fergus, arXiv:1311.2901, figures 2 and 7.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from zfcore.data.class_names import as_class_names, class_label
from zfcore.occlusion import Occlusion
from zfcore.report.colour import DIVERGING, SEQUENTIAL, categorical, coloured, luma
from zfcore.report.drawing import (
    INK,
    MUTED,
    OUTSIDE,
    RULE,
    Sheet,
    enlarged,
    projection_picture,
    rgb_array,
)

__all__ = [
    "FeatureProjection", "LayerProjections", "number", "occlusion_figure", "percent", "projection_figure",
]  # fmt: skip

_MARGIN = 40
_TILE, _TILE_GAP = 112, 10
_LABEL = 168  # the column that names a layer
_PANEL, _PANEL_GAP = 340, 48


@dataclass(frozen=True)
class LayerProjections:
    """One layer's strongest units in one picture.

    layer:       its name.
    units:       [U] unit indices, strongest first; `of` units in the whole layer.
    activations: [U] the activation that each projection started from.
    pixels:      [U, C, h, w] projections, the receptive field only.
    boxes:       [U, 4] y0, x0, y1, x1 of the receptive fields in the picture; may reach past its edge.
    """

    layer: str
    units: Sequence[int]
    of: int
    activations: Sequence[float]
    pixels: Tensor
    boxes: Sequence[Sequence[int]]


@dataclass(frozen=True)
class FeatureProjection:
    """The feature map of an occlusion figure, projected: pixels [C, H, W] over the whole picture, and the box
    (y0, x0, y1, x1) of its strongest position's receptive field."""

    layer: str
    unit: int
    pixels: Tensor
    box: Sequence[int]


def number(value: float) -> str:
    """Three significant digits, never in a form that needs counting zeros."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(max(digits, 0), 5)}f}"


def percent(share: float) -> str:
    if not math.isfinite(share):
        return str(share)
    if 0 < share < 0.001:
        return "<0.1 %"
    if 0.999 < share < 1:
        return ">99.9 %"
    return f"{100 * share:.1f} %"


def projection_figure(
    picture: Tensor,
    layers: Sequence[LayerProjections],
    *,
    title: str,
    subtitle: str = "",
    classes: Sequence[tuple[str, float]] = (),
) -> Image.Image:
    """The picture beside the projections of each layer's strongest units, as in the paper's figure 2.

    picture: [C, H, W] in 0..1. classes: (name, probability) of the most probable, first to be drawn as bars.
    Above: each unit's projection about mid-grey, cropped to its receptive field and enlarged. Below it: the
    part of the picture that it saw, unless that is all of it.
    """
    shown = rgb_array(picture)
    colours = categorical(max(len(layers), 1))
    columns = max([len(layer.units) for layer in layers], default=0)
    width = max(2 * _MARGIN + _LABEL + columns * (_TILE + _TILE_GAP), 1100)
    band = enlarged(shown, 260)
    tiles = [_tiles(layer, shown) for layer in layers]
    heights = [
        max([sum(tile.height + 4 for tile in pair) for pair in row], default=100) + 60 for row in tiles
    ]
    top = 118
    rows_top = top + max(band.height, 210) + 44
    sheet = Sheet(width, rows_top + sum(heights))
    _heading(sheet, title, subtitle)

    sheet.picture(_MARGIN, top, band)
    scale = band.width / shown.shape[1]
    for layer, colour in zip(layers, colours, strict=False):
        if len(layer.units) and _smaller(layer.boxes[0], shown):
            y0, x0, y1, x1 = (float(v) * scale for v in layer.boxes[0])
            corners = (max(x0, 0), max(y0, 0), min(x1, band.width), min(y1, band.height))
            sheet.outline([a + b for a, b in zip(corners, (_MARGIN, top) * 2, strict=True)], colour)

    left = _MARGIN + band.width + 40
    _bars(sheet, left, top, classes)
    left += 360 if classes else 0
    y = sheet.paragraph(
        left,
        top,
        "Each column shows a unit of the layer: its activation projected back to pixels, mid-grey being zero "
        "and the contrast each projection's own; below, the part of the picture that it saw, unless that is "
        "all of it. Under them stand the unit's index and the activation that was projected. Light grey lies "
        "outside of the picture.",
        width - _MARGIN - left,
    )
    sheet.paragraph(
        left,
        y + 8,
        "Outlines on the picture: where each layer's strongest unit looked.",
        width - _MARGIN - left,
    )

    y = rows_top
    for layer, colour, pairs, height in zip(layers, colours, tiles, heights, strict=False):
        _layer_row(sheet, y, layer, colour, pairs)
        y += height
    return sheet.image


def _tiles(layer: LayerProjections, shown: np.ndarray) -> list[list[Image.Image]]:
    """Each unit's projection and, where that is not all of it, the part of the picture it saw, enlarged."""
    rows = []
    for projection, box in zip(layer.pixels, layer.boxes, strict=True):
        y0, x0, y1, x1 = (int(v) for v in box)
        # A field that is as long as the picture or longer would show mostly what lies outside: then the
        # window is the picture, of which the field covers a part or all.
        top, bottom = (y0, y1) if y1 - y0 < shown.shape[0] else (0, shown.shape[0])
        left, right = (x0, x1) if x1 - x0 < shown.shape[1] else (0, shown.shape[1])
        window = (top, left, bottom, right)
        grey = np.uint8(128)  # no part in the projection: zero
        inside = _cut(np.ones(shown.shape, np.uint8), window, 0)[..., :1].astype(bool)
        field = _cut(projection_picture(projection), (top - y0, left - x0, bottom - y0, right - x0), grey)
        # Past the edge there are no pixels to project to.
        field = np.where(inside, field, np.uint8(OUTSIDE)).astype(np.uint8)
        tiles = [enlarged(field, _TILE)]
        if window != (0, 0, *shown.shape[:2]):
            tiles.append(enlarged(_cut(shown, window, OUTSIDE), _TILE))
        rows.append(tiles)
    return rows


def _layer_row(sheet: Sheet, y: int, layer: LayerProjections, colour, tiles) -> None:
    sheet.rule(_MARGIN, y - 14, sheet.image.width - _MARGIN)
    sheet.swatch(_MARGIN, y + 4, colour)
    sheet.text(_MARGIN + 24, y, layer.layer, 19, width=_LABEL - 36)
    height, width = layer.pixels.shape[-2:]
    lines = [f"sees {height} × {width} px", f"strongest {len(layer.units)}", f"of {layer.of} units"]
    if not tiles:
        lines = ["no unit was active", f"of {layer.of} units"]
    for line, text in enumerate(lines):
        sheet.text(_MARGIN, y + 32 + 21 * line, text, 14, MUTED, width=_LABEL - 16)
    for column, (unit, activation, images) in enumerate(
        zip(layer.units, layer.activations, tiles, strict=True)
    ):
        x = _MARGIN + _LABEL + column * (_TILE + _TILE_GAP)
        below = y
        for image in images:
            sheet.picture(x, below, image, frame=False)
            below += image.height + 4
        sheet.text(x, below + 1, f"{unit}", 13, INK)
        sheet.text(x + images[0].width, below + 1, number(float(activation)), 13, MUTED, "ra")


def _smaller(box: Sequence[int], shown: np.ndarray) -> bool:
    y0, x0, y1, x1 = box
    return y1 - y0 < shown.shape[0] and x1 - x0 < shown.shape[1]


def occlusion_figure(
    picture: Tensor,
    occlusion: Occlusion,
    index: int = 0,
    *,
    title: str,
    subtitle: str = "",
    class_names: Sequence[str] = (),
    score: str = "probability",
    feature: FeatureProjection | None = None,
) -> Image.Image:
    """What a box moved over the picture does to the network's answer, as in the paper's figure 7.

    picture: [C, H, W] in 0..1; occlusion: its map (image `index` of it). Maps show at each place the
    measurement of the box whose centre is nearest. Panels: the picture with the box that cost most; the
    total activation of the feature's map, and that map projected (where `feature` is given); the score of
    the target; the most probable class; the mean drop over the boxes that cover a pixel, over the picture.
    class_names: [K] texts, that of class 0 first; a class past their end is shown as "class 7", and one that shares
    its name with another with its index.

    Raises: DtypeError for class names that are no texts.
    """
    class_names = as_class_names(class_names)
    shown = rgb_array(picture)
    base = enlarged(shown, _PANEL)
    view = _View(occlusion, index, base.size)
    probability = score == "probability"
    target = "target" if occlusion.targets is None else class_label(class_names, int(occlusion.targets[index]))
    form = percent if probability else number
    scores = occlusion.scores[index].detach().cpu().double().numpy()
    clean = float(occlusion.clean[index])

    panels = [_Panel("The picture", _outlined(base, view, scores), ["outlined: the box that cost most"])]
    if occlusion.activation is not None:
        activation = occlusion.activation[index].detach().cpu().double().numpy()
        low, high = _range(activation)
        name = "the feature map" if feature is None else f"{feature.layer}, unit {feature.unit}"
        panels.append(
            _Panel(
                "Total activation of a map",
                view.cells(coloured(_unit(activation, low, high))),
                [name, f"no box: {number(float(occlusion.clean_activation[index]))}"],
                (SEQUENTIAL, _ticks(low, high)),
            )
        )
    if feature is not None:
        local = _smaller(feature.box, shown)
        line = "outlined: what its strongest position saw" if local else "it sees the whole picture"
        panels.append(_Panel("That map, projected", _projected(feature, base.size, local), [line]))
    low, high = (0.0, _round_share(max(clean, _range(scores)[1]))) if probability else _range(scores)
    panels.append(
        _Panel(
            f"{'Probability' if probability else 'Score'} of {target}",
            view.cells(coloured(_unit(scores, low, high))),
            ["with the box centred there", f"no box: {form(clean)}"],
            (SEQUENTIAL, _ticks(low, high, percent if probability else None)),
        )
    )
    if occlusion.labels is not None:
        labels = occlusion.labels[index].cpu().numpy()
        palette, entries = _classes(labels, class_names, int(occlusion.clean_labels[index]))
        panels.append(
            _Panel(
                "Most probable class", view.cells(palette[labels]), ["with the box centred there"], entries
            )
        )
    heat = occlusion.heatmap()[index].detach().cpu().double().numpy()
    reach = float(np.nanmax(np.abs(heat))) if np.isfinite(heat).any() else 0.0
    panels.append(
        _Panel(
            "Mean drop when covered",
            _overlay(base, heat, reach),
            [f"of the {'probability' if probability else 'score'} of {target}"],
            (
                DIVERGING,
                [(0.0, _signed(-reach, probability)), (0.5, "0"), (1.0, _signed(reach, probability))],
            ),
        )
    )
    return _panels(panels, title, subtitle, base.height)


@dataclass(frozen=True)
class _Panel:
    """legend: (colour map, ticks) for a bar, or a list of (colour, text) for classes."""

    title: str
    image: Image.Image
    lines: list[str]
    legend: tuple | list = ()


class _View:
    """Box positions laid out over a picture that is drawn `size` (width, height) large."""

    def __init__(self, occlusion: Occlusion, index: int, size: tuple[int, int]):
        self.height, self.width = occlusion.image_size
        self.size = size
        self.boxes = occlusion.boxes.cpu().numpy()
        rows = self.boxes[:, 0, [0, 2]].mean(axis=1)  # centres, pixels of the image
        columns = self.boxes[0, :, [1, 3]].mean(axis=0)
        y = (np.arange(size[1]) + 0.5) * self.height / size[1]
        x = (np.arange(size[0]) + 0.5) * self.width / size[0]
        self.row = np.abs(y[:, None] - rows[None]).argmin(axis=1)
        self.column = np.abs(x[:, None] - columns[None]).argmin(axis=1)

    def cells(self, colours: np.ndarray) -> Image.Image:
        """uint8 [Gy, Gx, 3] -> each place in the colour of the box whose centre is nearest."""
        return Image.fromarray(np.ascontiguousarray(colours[self.row][:, self.column]))

    def placed(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        y0, x0, y1, x1 = box
        across, down = self.size[0] / self.width, self.size[1] / self.height
        return x0 * across, y0 * down, x1 * across, y1 * down


def _panels(panels: list[_Panel], title: str, subtitle: str, height: int) -> Image.Image:
    columns = 3 if len(panels) > 4 else 2
    rows = -(-len(panels) // columns)
    entries = max([len(p.legend) for p in panels if isinstance(p.legend, list)], default=0)
    below = max(52, 26 * -(-entries // 2) + 12)
    above = 72
    top = 112
    pitch = above + height + below + 26
    width = 2 * _MARGIN + columns * _PANEL + (columns - 1) * _PANEL_GAP
    sheet = Sheet(width, top + rows * pitch)
    _heading(sheet, title, subtitle)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        x = _MARGIN + column * (_PANEL + _PANEL_GAP)
        y = top + row * pitch
        sheet.text(x, y, "abcdefgh"[index], 19, MUTED)
        sheet.text(x + 22, y, panel.title, 19, width=_PANEL - 22)
        sheet.text(x, y + 33, " · ".join(panel.lines), 14, MUTED, width=_PANEL)
        y += above
        sheet.picture(x, y, panel.image)
        y += panel.image.height + 12
        if isinstance(panel.legend, tuple) and panel.legend:
            sheet.legend(x, y, panel.image.width, *panel.legend)
        for place, (colour, text) in enumerate(panel.legend if isinstance(panel.legend, list) else ()):
            down, across = divmod(place, 2)
            at = x + across * (_PANEL // 2), y + 26 * down
            sheet.swatch(*at, colour)
            sheet.text(at[0] + 22, at[1] - 2, text, 14, MUTED, width=_PANEL // 2 - 34)
    return sheet.image


def _heading(sheet: Sheet, title: str, subtitle: str) -> None:
    width = sheet.image.width - 2 * _MARGIN
    sheet.text(_MARGIN, 30, title, 27, width=width)
    sheet.text(_MARGIN, 70, subtitle, 15, MUTED, width=width)


def _bars(sheet: Sheet, x: int, y: int, classes: Sequence[tuple[str, float]]) -> None:
    """The most probable classes, a bar each."""
    for place, (name, share) in enumerate(classes):
        at = y + 42 * place
        sheet.text(x, at, name, 15, INK if place == 0 else MUTED, width=200)
        sheet.text(x + 300, at, percent(share), 15, INK if place == 0 else MUTED, "ra")
        sheet.draw.rectangle((x, at + 23, x + 300, at + 28), fill=RULE)
        if share > 0:
            fill = (60, 92, 190) if place == 0 else (150, 160, 185)
            sheet.draw.rectangle((x, at + 23, x + round(300 * min(share, 1)), at + 28), fill=fill)


def _cut(array: np.ndarray, box: Sequence[int], outside) -> np.ndarray:
    """[H, W, 3] -> the box's part of it, with `outside` where it reaches past the edge."""
    height, width = array.shape[:2]
    y0, x0, y1, x1 = box
    part = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
    part[:] = outside
    top, left, bottom, right = max(y0, 0), max(x0, 0), min(y1, height), min(x1, width)
    if top < bottom and left < right:
        part[top - y0 : bottom - y0, left - x0 : right - x0] = array[top:bottom, left:right]
    return part


def _outlined(base: Image.Image, view: _View, scores: np.ndarray) -> Image.Image:
    sheet = Sheet(*base.size)
    sheet.picture(0, 0, base, frame=False)
    if np.isfinite(scores).any():
        row, column = np.unravel_index(np.nanargmin(scores), scores.shape)
        sheet.outline(view.placed(view.boxes[row, column]), (226, 74, 51))
    return sheet.image


def _projected(feature: FeatureProjection, size: tuple[int, int], outlined: bool) -> Image.Image:
    array = projection_picture(feature.pixels)
    resample = Image.Resampling.NEAREST if size[0] >= array.shape[1] else Image.Resampling.LANCZOS
    sheet = Sheet(*size)
    sheet.picture(0, 0, Image.fromarray(array).resize(size, resample), frame=False)
    if outlined:
        across, down = size[0] / array.shape[1], size[1] / array.shape[0]
        y0, x0, y1, x1 = (float(v) for v in feature.box)
        corners = (max(x0, 0) * across, max(y0, 0) * down, min(x1 * across, size[0]), min(y1 * down, size[1]))
        sheet.outline(corners, (20, 20, 20))
    return sheet.image


def _overlay(base: Image.Image, heat: np.ndarray, reach: float) -> Image.Image:
    """The picture in grey; the colours of `heat` [H, W] cover it as far as they differ from zero."""
    values = np.nan_to_num(heat) / (reach or 1.0)
    resample = Image.Resampling.NEAREST if base.width >= 2 * heat.shape[1] else Image.Resampling.BILINEAR
    values = np.asarray(Image.fromarray(values.astype(np.float32)).resize(base.size, resample))
    grey = luma(np.asarray(base, dtype=np.float64))[..., None]
    cover = 0.9 * np.abs(values)[..., None] ** 0.7
    return Image.fromarray(np.rint(grey * (1 - cover) + coloured(values, DIVERGING) * cover).astype(np.uint8))


def _classes(
    labels: np.ndarray, names: Sequence[str], clean: int, most: int = 6
) -> tuple[np.ndarray, list[tuple[np.ndarray, str]]]:
    """A colour for each class index, and the legend: the clean answer first, then by how often they won."""
    found, counts = np.unique(labels, return_counts=True)
    order = sorted(
        zip(found.tolist(), counts.tolist(), strict=True), key=lambda item: (item[0] != clean, -item[1])
    )
    shades = categorical(min(len(order), most))
    palette = np.full((int(found.max()) + 1, 3), 200, np.uint8)
    entries = []
    for (label, count), shade in zip(order[:most], shades, strict=True):
        palette[label] = shade
        entries.append((shade, f"{class_label(names, label)}  {percent(count / labels.size)}"))
    if len(order) > most:
        rest = sum(count for _, count in order[most:]) / labels.size
        entries.append(((200, 200, 200), f"{len(order) - most} others  {percent(rest)}"))
    return palette, entries


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _unit(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return (values - low) / (high - low) if high > low else np.where(np.isnan(values), np.nan, 0.5)


def _round_share(highest: float) -> float:
    """The end of a probability's scale: 1, or where all are small a round number not far above them."""
    ends = [1.0] + [digit * 10.0**-power for power in range(1, 7) for digit in (5, 2, 1)]
    return min((end for end in ends if end >= highest), default=1.0)


def _ticks(low: float, high: float, form=None) -> list[tuple[float, str]]:
    """Both ends and the middle; where no form is given, with digits enough to tell them apart."""
    if high <= low:
        return [(0.5, (form or number)(low))]
    if form is None:
        digits = max(2 - math.floor(math.log10(high - low)), 0)
        plain = digits <= 6 and abs(low) + abs(high) < 1e6
        form = (lambda value: f"{value:.{digits}f}") if plain else number
    return [(0.0, form(low)), (0.5, form((low + high) / 2)), (1.0, form(high))]


def _signed(value: float, probability: bool) -> str:
    sign = "+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else ""
    return f"{sign}{number(abs(100 * value))} points" if probability else f"{sign}{number(abs(value))}"
