"""Networks by name: those with trained weights in the package, the paper's, and anybody's factory."""

from __future__ import annotations

import difflib
import importlib
import json
import math
import reprlib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from zfcore.data.images import MAX_PIXELS
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
    command:       what trained it, one line.
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
    def from_metadata(cls, metadata: Mapping[str, str], source: str = "the weights") -> ModelMeta:
        """The inverse of ``to_metadata``, of a file that nobody has looked at.

        Args:
            metadata: a JSON text for each field.
            source: whose metadata the error says that it is.

        Raises:
            WeightsError: it names the field that is missing, of another kind, or out of range.
        """
        fields = {}
        for name in cls.__dataclass_fields__:
            try:
                if len(metadata[name]) > _LONGEST_FIELD:
                    raise ValueError(f"{len(metadata[name])} characters, expected at most {_LONGEST_FIELD}")
                value = json.loads(metadata[name])
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise WeightsError(f"{source}: metadata has no readable {name!r}: {error!r}") from error
            fields[name] = tuple(value) if isinstance(value, list) else value
        meta = cls(**fields)
        for name, fits, expected in _EXPECTED:
            if not fits(meta):
                value = reprlib.repr(getattr(meta, name))
                raise WeightsError(f"{source}: metadata has {name}={value}, expected {expected}")
        return meta


def _all(values: object, kind: type) -> bool:
    """Whether this is a tuple of nothing but ``kind``."""
    return isinstance(values, tuple) and all(type(value) is kind for value in values)


def _numbers(values: object, count: int, low: float, high: float) -> bool:
    return _all(values, float) and len(values) == count and all(low <= value <= high for value in values)


def _plain(text: str) -> bool:
    """Whether a terminal and a page can show it: no control characters, no halves of surrogate pairs."""
    return len(text) <= _LONGEST_NAME and not any(unicodedata.category(each) in ("Cc", "Cs") for each in text)


_LONGEST_FIELD = 2**22  # characters of JSON: the names of ImageNet's 21,843 classes take a tenth
_LONGEST_NAME = 10_000  # characters
_MOST_CHANNELS = 1024
_LEAST_STD, _LARGEST_STD = 1e-4, 1e4  # a picture divided by it is finite in float16 too

# Checked in this order: a field, whether it is as it must be, and how that is.
_EXPECTED: tuple[tuple[str, Callable[[ModelMeta], bool], str], ...] = (
    (
        "classes",
        lambda meta: _all(meta.classes, str) and len(meta.classes) > 0 and all(map(_plain, meta.classes)),
        f"names of at most {_LONGEST_NAME} characters, without control characters",
    ),
    (
        "input_size",
        lambda meta: _all(meta.input_size, int) and len(meta.input_size) == 2 and min(meta.input_size) > 0
        and math.prod(meta.input_size) <= MAX_PIXELS,
        f"a height and a width, with at most {MAX_PIXELS} pixels",
    ),
    (
        "channels",
        lambda meta: _all((meta.channels,), int) and 0 < meta.channels <= _MOST_CHANNELS,
        f"a number of channels, at most {_MOST_CHANNELS}",
    ),
    (
        "mean",
        lambda meta: _numbers(meta.mean, meta.channels, 0, 1),
        "a number for each channel, of pixels in 0..1",
    ),
    (
        "std",
        lambda meta: _numbers(meta.std, meta.channels, _LEAST_STD, _LARGEST_STD),
        f"a number for each channel, {_LEAST_STD} to {_LARGEST_STD}",
    ),
    ("test_accuracy", lambda meta: _numbers((meta.test_accuracy,), 1, 0, 1), "a number in 0..1"),
    ("command", lambda meta: _all((meta.command,), str) and _plain(meta.command), "a line of text"),
)  # fmt: skip


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
    path = ASSETS / f"{name}.safetensors"
    metadata = load_weights(model, path)
    return model.eval(), ModelMeta.from_metadata(metadata, f"weights {str(path)!r}")


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
