"""Figures of analyses, and the page that shows them, drawn with Pillow and numpy."""

from zfcore.report.figures import FeatureProjection, LayerProjections, occlusion_figure, projection_figure
from zfcore.report.files import OutputFolder
from zfcore.report.page import Entry, Figure, Table, render_page

__all__ = [
    "Entry",
    "FeatureProjection",
    "Figure",
    "LayerProjections",
    "OutputFolder",
    "Table",
    "occlusion_figure",
    "projection_figure",
    "render_page",
]
