"""The network under study: where it comes from, how its pictures are made, and what its classes are called."""

import argparse
import contextlib
import hashlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder

import torch
from torch import Tensor, nn

from zfcore import models
from zfcore.cli.interrupts import Interrupted
from zfcore.cli.parser import DEFAULT_SIDE
from zfcore.console import Console
from zfcore.data.class_names import read_class_names
from zfcore.errors import ArgumentError, DeviceError

__all__ = ["Subject", "each_channel", "from_here", "make_subject"]

COLOUR_MEAN, COLOUR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in 0..1


@dataclass(frozen=True)
class Subject:
    """classes: a name for each output, or none at all; classes_from: what gave them, as a message says it."""

    model: nn.Module
    spec: str
    classes: tuple[str, ...]
    classes_from: str
    input_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    dtype: torch.dtype

    def normalised(self, pixels: Tensor) -> Tensor:
        """[C, H, W] in 0..1 -> [1, C, H, W] as the network takes it."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((pixels - mean) / std)[None].to(self.device, self.dtype)

    def blank(self) -> Tensor:
        """A grey picture as the network takes it: [1, C, H, W]."""
        return self.normalised(torch.full((self.channels, *self.input_size), 0.5))

    def weights_hash(self) -> str:
        """SHA-256 over the names and bytes of the state dict."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def check_classes(self, output: object) -> None:
        """Refuse names of another number than the outputs: they would be other classes' names."""
        if not self.classes:
            return
        if not (isinstance(output, Tensor) and output.dim() == 2):
            warnings.warn("the classes' names are not used: the network's output is no table of classes", stacklevel=1)
            return
        count, outputs = len(self.classes), output.shape[1]
        if count != outputs:
            header = f"; is the first, {self.classes[0]!r}, a header?" if count == outputs + 1 else ""
            raise ArgumentError(
                f"{self.classes_from} has {count} names for the network's {outputs} outputs; expected {outputs}, one a "
                f"line{header}"
            )


def make_subject(options: argparse.Namespace, console: Console) -> Subject:
    """The network that the options name, on its device, in eval mode."""
    if options.model in models.shipped():
        model, meta = models.load(options.model)
    else:
        model, meta = _created(options.model, console), None
    if options.weights is not None:
        metadata = models.load_weights(model, options.weights)
        if "input_size" in metadata:
            meta = models.ModelMeta.from_metadata(metadata, f"weights {str(options.weights)!r}")
    channels = options.channels or (meta.channels if meta else _first_channels(model))
    if meta:
        mean, std = meta.mean, meta.std
    else:
        mean, std = (COLOUR_MEAN, COLOUR_STD) if channels == 3 else ((0.0,), (1.0,))
    if channels not in (1, 3):  # of a weights file; the option is one of them
        raise ArgumentError(f"weights: {options.weights!r} is of a network for {channels} channels; expected 1 or 3")
    device = _device(options.device)
    if options.classes is not None:
        classes, classes_from = read_class_names(options.classes), f"classes: {options.classes!r}"
    else:
        classes, classes_from = (meta.classes, f"weights: {options.weights!r}") if meta else ((), "")
    subject = Subject(
        model=model.to(device).eval(),
        spec=options.model,
        classes=classes,
        classes_from=classes_from,
        input_size=options.input_size or (meta.input_size if meta else (DEFAULT_SIDE, DEFAULT_SIDE)),
        channels=channels,
        mean=_of_pixels("mean", options.mean, channels, mean),
        std=_of_pixels("std", options.std, channels, std),
        device=device,
        dtype=next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32),
    )
    for level in (0.0, 1.0):
        if not subject.normalised(torch.full((channels, 1, 1), level)).isfinite().all():
            raise ArgumentError(
                f"std: {subject.std}; expected larger numbers: in {subject.dtype}, pixels divided by them are infinite"
            )
    return subject


def each_channel(name: str, given: tuple | None, channels: int, default: tuple) -> tuple[float, ...]:
    """A number for each channel, of one for all or of as many; `default` where none was given."""
    values = default if given is None else given
    values = values * channels if len(values) == 1 else values
    if len(values) != channels:
        raise ArgumentError(f"{name}: {values}; expected one number or {channels}, one a channel")
    return values


def _of_pixels(name: str, given: tuple | None, channels: int, default: tuple) -> tuple[float, ...]:
    """`each_channel` of a mean or a deviation of pixels in 0..1; what is given of 0..255 would pass unnoticed."""
    values = each_channel(name, given, channels, default)
    if name == "std" and not all(value > 0 for value in values):
        raise ArgumentError(f"std: {values}; expected numbers above 0")
    if given is not None and not all(0 <= value <= 1 for value in values):
        raise ArgumentError(
            f"{name}: {values}; expected numbers in 0..1, of pixels in 0..1 (divide those of 0..255 by 255)"
        )
    return values


@contextlib.contextmanager
def from_here() -> Iterator[None]:
    """Inside, modules of the current folder can be imported, those that nothing installed has the name of.

    ``python -m`` puts the folder first instead; then a random.py or torch.py in it would be imported for the library.
    """
    try:
        folder = os.getcwd()
    except OSError:  # it was removed
        folder = None
    if folder is None or folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the model's code took it out
            sys.path.remove(folder)


def _created(spec: str, console: Console) -> nn.Module:
    """`models.create`, of code that may do to the process whatever it likes."""
    _say_which(spec)
    try:
        with console.lent():
            return models.create(spec)
    except (Exception, KeyboardInterrupt, Interrupted):
        raise
    except BaseException as error:  # SystemExit above all, as of a script that reads the arguments itself
        raise ArgumentError(
            f"model: {spec!r}: its code ended with {type(error).__name__}: {error}; expected a factory that returns "
            "an nn.Module"
        ) from error


def _say_which(spec: str) -> None:
    """Warn where the current folder has a module of the name and another one will be imported."""
    top = spec.partition(":")[0].partition(".")[0]
    with contextlib.suppress(ImportError, ValueError, OSError):  # what is wrong with it, the import will say
        local, found = PathFinder.find_spec(top, [os.getcwd()]), importlib.util.find_spec(top)
        if local and found and local.origin and found.origin and not os.path.samefile(local.origin, found.origin):
            warnings.warn(
                f"model: {top!r} is {found.origin}; {local.origin} of the current folder has the same name, and what "
                "is installed comes first",
                stacklevel=1,
            )


def _first_channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels not in (1, 3):
                raise ArgumentError(
                    f"model: its first convolution takes {module.in_channels} channels; expected 1 or 3"
                )
            return module.in_channels
    return 3


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise DeviceError(f"device: {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device: {name!r}; this torch ({torch.__version__}) sees no CUDA device; expected cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device: {name!r}; expected cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise DeviceError(f"device: {name!r}; expected cpu, cuda or cuda:N")
    return device
