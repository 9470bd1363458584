"""Reads a network into stages with receptive-field geometry."""

from zfcore.network.geometry import Field, Window
from zfcore.network.guard import Kept, arithmetic, evaluating, exact_arithmetic, kept, observing
from zfcore.network.operations import rule_of_call
from zfcore.network.reader import Network, read_network, resolve_layer
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
    "kept",
    "observing",
    "read_network",
    "resolve_layer",
    "rule_of_call",
    "scale_of",
]
