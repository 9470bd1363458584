"""Reads a network into stages with receptive-field geometry."""

from zfcore.network.geometry import Field, Window
from zfcore.network.guard import Kept, arithmetic, evaluating, exact_arithmetic, kept, observing
from zfcore.network.layers import fixed_batch, resolve_layer
from zfcore.network.reader import Network, read_network
from zfcore.network.stages import Rectifier, Stage, scale_of

__all__ = [
    "Field",
    "Kept",
    "Network",
    "Rectifier",
    "Stage",
    "Window",
    "arithmetic",
    "evaluating",
    "exact_arithmetic",
    "fixed_batch",
    "kept",
    "observing",
    "read_network",
    "resolve_layer",
    "scale_of",
]
