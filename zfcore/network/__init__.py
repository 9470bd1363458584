"""Reads a network into stages with receptive-field geometry."""

from zfcore.network.geometry import Field, Window
from zfcore.network.guard import evaluating
from zfcore.network.reader import Network, read_network, resolve_layer, rule_of_function
from zfcore.network.stages import Rectifier, Stage

__all__ = ["Field", "Network", "Rectifier", "Stage", "Window", "evaluating", "read_network", "resolve_layer",
           "rule_of_function"]
