"""Networks by name: those with trained weights in the package, the paper's, and anybody's factory."""

from __future__ import annotations

import difflib
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from zfcore.errors import ArgumentError, WeightsError
from zfcore.models.alexnet import alexnet
from zfcore.models.weights import load_weights
from zfcore.models.zfnet import ZFNet, zfnet_small

ASSETS = Path(__file__).resolve().parent.parent / "data" / "assets"

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "zfnet": ZFNet,
    "zfnet_small": zfnet_small,
    "alexnet": alexnet,
}
_SHIPPED: dict[str, Callable[[], nn.Module]] = {"zfnet_small_fashion": zfnet_small}


@dataclass(frozen=True)
class ModelMeta:
    """What a trained network expects and knows.

    classes:       a name for each logit.
    input_size:    (H, W) of its pictures, pixels.
    channels:      of its pictures.
    mean, std:     a number for each channel, of pixels scaled to 0..1: feed ``(pixels - mean) / std``.
    test_accuracy: the share of test pictures that it names rightly, 0..1.
    command:       what trained it.
    """

    classes: tuple[str, ...]
    input_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test_accuracy: float
    command: str

    def to_metadata(self) -> dict[str, str]:
        """As the metadata of a weights file: a JSON text for each field."""
        return {name: json.dumps(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> ModelMeta:
        """The inverse of ``to_metadata``; WeightsError names a field that is missing or of another kind."""
        fields = {}
        for name in cls.__dataclass_fields__:
            try:
                value = json.loads(metadata[name])
            except (KeyError, json.JSONDecodeError, RecursionError) as error:
                raise WeightsError(f"the weights' metadata has no readable {name!r}: {error!r}") from error
            fields[name] = tuple(value) if isinstance(value, list) else value
        meta = cls(**fields)
        for name, fits, expected in _EXPECTED:
            if not fits(meta):
                raise WeightsError(
                    f"the weights' metadata has {name}={getattr(meta, name)!r}, expected {expected}"
                )
        return meta


def _all(values: object, kind: type) -> bool:
    """Whether this is a tuple of nothing but ``kind``, numbers positive where whole and finite where not."""
    if not isinstance(values, tuple) or not all(type(value) is kind for value in values):
        return False
    return kind is str or all(value > 0 if kind is int else math.isfinite(value) for value in values)


# Checked in this order: a field, whether it is as it must be, and how that is.
_EXPECTED: tuple[tuple[str, Callable[[ModelMeta], bool], str], ...] = (
    ("classes", lambda meta: _all(meta.classes, str) and len(meta.classes) > 0, "names"),
    (
        "input_size",
        lambda meta: _all(meta.input_size, int) and len(meta.input_size) == 2,
        "two numbers of pixels",
    ),
    ("channels", lambda meta: _all((meta.channels,), int), "a number of channels"),
    (
        "mean",
        lambda meta: _all(meta.mean, float) and len(meta.mean) == meta.channels,
        "a number for each channel",
    ),
    (
        "std",
        lambda meta: _all(meta.std, float) and len(meta.std) == meta.channels,
        "a number for each channel",
    ),
    ("std", lambda meta: min(meta.std) > 0, "positive numbers"),
    ("test_accuracy", lambda meta: _all((meta.test_accuracy,), float), "a number"),
    ("command", lambda meta: _all((meta.command,), str), "a text"),
)


def shipped() -> tuple[str, ...]:
    """The names that ``load`` takes: networks whose trained weights are part of the package."""
    return tuple(_SHIPPED)


def names() -> tuple[str, ...]:
    """The names that ``create`` takes: the shipped networks, then those with untrained weights."""
    return (*_SHIPPED, *_MODELS)


def load(name: str) -> tuple[nn.Module, ModelMeta]:
    """A shipped network with its trained weights, in eval mode, and what it expects.

    Args:
        name: one of ``shipped()``.

    Raises:
        ArgumentError: there is no shipped network of that name.
        WeightsError: the installed weights are damaged.
    """
    if name not in _SHIPPED:
        raise ArgumentError(f"name={name!r}: expected one of the shipped networks {', '.join(_SHIPPED)}")
    model = _SHIPPED[name]()
    metadata = load_weights(model, ASSETS / f"{name}.safetensors")
    return model.eval(), ModelMeta.from_metadata(metadata)


def create(spec: str) -> nn.Module:
    """The network that a text names, in eval mode.

    Args:
        spec: a shipped name (trained, see ``load``), a model's name (``"zfnet"``, untrained), or
            ``"package.module:factory"``: the module is imported and the factory called without arguments
            (``"torchvision.models:alexnet"``).

    Raises:
        ArgumentError: nothing has that name, or the module or the factory raised (its error is the cause).
    """
    if not isinstance(spec, str):
        raise ArgumentError(f"spec={spec!r}: expected a text")
    if spec in _SHIPPED:
        return load(spec)[0]
    if spec in _MODELS:
        return _MODELS[spec]().eval()
    module_name, colon, factory_name = spec.partition(":")
    if not colon:
        near = difflib.get_close_matches(spec, names(), n=3, cutoff=0.4) or names()
        raise ArgumentError(
            f"spec={spec!r}: there is no network of that name; expected {', '.join(near)} or "
            '"package.module:factory"'
        )
    if not all(part.isidentifier() for part in (*module_name.split("."), *factory_name.split("."))):
        raise ArgumentError(f'spec={spec!r}: expected "package.module:factory"')
    model = _call(spec, _find(spec, module_name, factory_name))
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"spec={spec!r}: the factory returned a {type(model).__name__}, expected an nn.Module"
        )
    return model.eval()


def _find(spec: str, module_name: str, factory_name: str) -> Callable[[], object]:
    try:
        found = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: whatever its import raises
        raise ArgumentError(f"spec={spec!r}: importing {module_name} failed: {_said(error)}") from error
    for part in factory_name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ArgumentError(f"spec={spec!r}: {module_name} has no {part!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ArgumentError(f"spec={spec!r}: {factory_name} is a {type(found).__name__}, expected a factory")
    return found


def _call(spec: str, factory: Callable[[], object]) -> object:
    try:
        return factory()
    except Exception as error:  # the factory is the user's
        raise ArgumentError(f"spec={spec!r}: the factory failed: {_said(error)}") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
