"""What a model says of itself: its layers by name, and how many images it takes."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor, nn

from zfcore.errors import LayerNotFound


def resolve_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, int | None]:
    """The dotted name of a layer, and which of its calls is meant: None for the last.

    Args:
        layer: a module of the model, or its name; "name@i" means the i-th call, from 0. The model itself
            stands for its output, and so does its name, "".

    Raises:
        LayerNotFound: the model has no such module; the message lists the nearest names.
    """
    names = dict(model.named_modules(remove_duplicate=False))
    if isinstance(layer, nn.Module):
        for name, module in names.items():
            if module is layer:
                return name, None
        raise LayerNotFound(
            f"layer={type(layer).__name__}(...): expected a module of the model, which this is not"
        )
    if not isinstance(layer, str):
        raise LayerNotFound(
            f"layer={layer!r}: expected a module's name or a module, got {type(layer).__name__}"
        )
    name, at, call = layer.rpartition("@")
    if layer in names or not (at and call.isdecimal()):
        name, call = layer, ""
    if name in names:
        first = next(n for n, module in names.items() if module is names[name])  # the name that a module has first
        return first, int(call) if call else None
    known = [n for n in names if n]
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:8]
    raise LayerNotFound(
        f"layer={layer!r}: the model has no such module; the nearest names are {', '.join(near)}"
    )


def fixed_batch(model: nn.Module) -> int | None:
    """How many images a model takes at a time, if that is one number: of an exported program."""
    if not isinstance(model, torch.fx.GraphModule):
        return None
    value = next((node.meta.get("val") for node in model.graph.nodes if node.op == "placeholder"), None)
    return value.shape[0] if isinstance(value, Tensor) and value.dim() and type(value.shape[0]) is int else None
