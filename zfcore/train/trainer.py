"""Training a classifier by SGD as the paper does, so that an interrupted run continues bit for bit.

All randomness of a step (its dropout and augmentation) comes from a generator seeded with the run's seed and
the step's number, and the order of an epoch from the seed and the epoch's number. A checkpoint therefore
holds tensors and a step number, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from zfcore.errors import ArgumentError, DtypeError, ShapeError, WeightsError
from zfcore.models.weights import read_tensors, write_tensors

_ORDER, _STEP = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Settings:
    """How to train.

    epochs, batch_size: the last batch of an epoch may be smaller.
    lr:           the rate's peak. It climbs to it in a line over the first ``warmup`` (a share of all steps)
                  and falls back to 0 along a half cosine.
    momentum:     of SGD; the paper's 0.9.
    weight_decay: added to the gradient, times the weight.
    filter_rms:   after each step, a convolution's filters whose RMS exceeds this are scaled back to it. The
                  paper has 0.1 for pixels in about [-128, 128]. Infinity leaves them.
    flip:         mirror each picture left to right with probability 1/2.
    shift:        move each picture by up to so many pixels each way, zeros moving in.
    seed:         of the order, the augmentation and dropout; the initial weights are the caller's.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 3.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.15
    filter_rms: float = 0.1
    flip: bool = True
    shift: int = 0
    seed: int = 0

    def __post_init__(self):
        for name, good, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("momentum", 0 <= self.momentum < 1, "0 up to 1, without 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("warmup", 0 <= self.warmup <= 1, "0 to 1"),
            ("filter_rms", self.filter_rms > 0, "a positive number or infinity"),
            ("shift", self.shift >= 0, "at least 0"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not good:
                raise ArgumentError(f"{name}={getattr(self, name)!r}: expected {expected}")


@dataclass
class Epoch:
    """What an epoch of training saw, with dropout and augmentation on: the means over its pictures."""

    loss: float = 0.0
    accuracy: float = 0.0
    pictures: int = 0

    def add(self, loss: float, right: int, pictures: int) -> None:
        before, self.pictures = self.pictures, self.pictures + pictures
        self.loss = (self.loss * before + loss * pictures) / self.pictures
        self.accuracy = (self.accuracy * before + right) / self.pictures


def pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of ``images`` [N, C, H, W] uint8, scaled to 0..1."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.reshape(-1), minlength=256).double() / channel.numel()
        mean = share @ levels
        means.append(mean.item())
        deviations.append((share @ (levels - mean) ** 2).sqrt().item())
    return tuple(means), tuple(deviations)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 pixels [N, C, H, W] as the network takes them: float32 ``(pixels / 255 - mean) / std``."""
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    pixels = images.to(torch.float32, memory_format=torch.channels_last)
    return (pixels / 255 - mean) / std


def augment(images: Tensor, flip: bool, shift: int) -> Tensor:
    """Flip and shift each picture of ``images`` [N, C, H, W] by chance, from torch's CPU generator."""
    n, channels, height, width = images.shape
    if flip:
        images = torch.where(torch.rand(n, 1, 1, 1) < 0.5, images.flip(-1), images)
    if shift:
        padded = F.pad(images, (shift,) * 4)
        corner = torch.randint(0, 2 * shift + 1, (2, n, 1))
        rows, columns = corner[0] + torch.arange(height), corner[1] + torch.arange(width)  # [N, H], [N, W]
        picture, channel = torch.arange(n).view(n, 1, 1, 1), torch.arange(channels).view(1, channels, 1, 1)
        images = padded[picture, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]
    return images


@torch.no_grad()
def renormalise_filters(model: nn.Module, radius: float) -> None:
    """Scale every filter of the model's convolutions whose root mean square exceeds ``radius`` back to it.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 3 (there the radius is 0.1).
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            rms = layer.weight.square().mean((1, 2, 3), keepdim=True).sqrt()
            layer.weight.mul_((radius / rms).clamp(max=1))  # a zero filter: inf, clamped to 1


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """The rate of a step (from 0) of ``steps``: a line up to ``settings.lr``, then a half cosine to 0."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int = 500,
) -> float:
    """The share of pictures that the network, in eval mode for the call, names rightly.

    Args:
        images: [N, C, H, W] uint8. labels: [N] int64.
        mean, std: of each channel, of pixels scaled to 0..1.
    """
    training = model.training
    model.eval()
    try:
        right = 0
        for batch, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            right += (model(normalise(batch, mean, std)).argmax(1) == truth).sum().item()
    finally:
        model.train(training)
    return right / len(labels)


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    *,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_epoch: Callable[[int, Epoch], None] = lambda epoch, result: None,
    progress: bool = False,
) -> bool:
    """Train the model in place, on the CPU, with cross-entropy and SGD.

    The pixels are normalised by ``pixel_statistics(images)``. torch's global generator is left as it was. The
    same model, data, settings and thread count give the same weights, bit for bit, also when the run was
    stopped or killed and resumed in between.

    Args:
        model: takes float [N, C, H, W], gives logits [N, classes]. Left in eval mode.
        images: [N, C, H, W] uint8. labels: [N] int64, each below the number of logits.
        checkpoint: a ``.safetensors`` path, written atomically after each epoch and on ``stop``.
        resume: continue from the checkpoint, if it is there.
        stop: asked after each step; when true, the run is checkpointed and ended.
        on_epoch: called after each epoch with its number, from 1, and what it saw.
        progress: draw a bar.

    Returns:
        whether the training came to its end; False when it was stopped.

    Raises:
        ShapeError, DtypeError, ArgumentError: the data is empty, has wrong shapes or dtypes, or labels that
            the model has no logit for; or the loss became infinite or NaN; or the checkpoint is of other
            settings or other data.
        WeightsError: the checkpoint is damaged or belongs to another network.
    """
    _check_data(model, images, labels)
    run = _Run(model, images, labels, settings, checkpoint)
    if resume and checkpoint is not None and Path(checkpoint).exists():
        run.restore()
    mean, std = pixel_statistics(images)
    model.train()
    with (
        torch.random.fork_rng(devices=[]),
        tqdm(total=run.steps, initial=run.step, disable=not progress, unit="batch") as bar,
    ):
        while run.step < run.steps:
            batch = run.batch()
            torch.default_generator.manual_seed(_seed(settings.seed, _STEP, run.step))
            x = normalise(augment(images[batch], settings.flip, settings.shift), mean, std)
            run.learn(x, labels[batch])
            bar.update()
            stopping = stop()
            if run.at_epoch_end:
                finished, run.seen = run.seen, Epoch()
                run.save()
                bar.set_postfix(loss=f"{finished.loss:.4f}", accuracy=f"{finished.accuracy:.4f}")
                on_epoch(run.step // run.batches, finished)
            elif stopping:
                run.save()
            if stopping and run.step < run.steps:
                return False
    model.eval()
    return True


class _Run:
    """A training run: the model, its optimiser, and how far it has come."""

    def __init__(self, model, images, labels, settings, checkpoint):
        self.model, self.labels, self.settings, self.checkpoint = model, labels, settings, checkpoint
        self.optimiser = torch.optim.SGD(
            model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay
        )
        self.batches = math.ceil(len(labels) / settings.batch_size)  # in an epoch
        self.steps = self.batches * settings.epochs
        self.step = 0
        self.order = None  # of the epoch that is under way
        self.seen = Epoch()  # of the epoch that is under way
        digest = hashlib.sha256(images.numpy(force=True).tobytes())
        digest.update(labels.numpy(force=True).tobytes())
        self.origin = {"settings": asdict(settings), "data_sha256": digest.hexdigest()}

    @property
    def at_epoch_end(self) -> bool:
        return self.step % self.batches == 0

    def batch(self) -> Tensor:
        """The numbers of the pictures of this step's batch."""
        epoch, index = divmod(self.step, self.batches)
        if self.order is None or index == 0:
            generator = torch.Generator().manual_seed(_seed(self.settings.seed, _ORDER, epoch))
            self.order = torch.randperm(len(self.labels), generator=generator).split(self.settings.batch_size)
        return self.order[index]

    def learn(self, x: Tensor, labels: Tensor) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.settings, self.step, self.steps)
        logits = self.model(x)
        loss = F.cross_entropy(logits, labels)
        value = loss.item()
        if not math.isfinite(value):
            raise ArgumentError(
                f"lr={self.settings.lr}: the loss became {value} at step {self.step}; expected a rate at "
                "which the training stays stable"
            )
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        if self.settings.filter_rms < math.inf:
            renormalise_filters(self.model, self.settings.filter_rms)
        self.seen.add(value, (logits.argmax(1) == labels).sum().item(), len(labels))
        self.step += 1

    def save(self) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            momentum = self.optimiser.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        state = {**self.origin, "step": self.step, "seen": asdict(self.seen)}
        write_tensors(self.checkpoint, tensors, {"run": json.dumps(state)})

    def restore(self) -> None:
        tensors, metadata = read_tensors(self.checkpoint)
        where = f"checkpoint {str(self.checkpoint)!r}"
        state, step, seen = _run_of(metadata, where)
        if step > self.steps:
            raise WeightsError(f"{where}: step {step}; expected at most the run's {self.steps}")
        for name, value in self.origin["settings"].items():
            if state["settings"].get(name) != value:
                raise ArgumentError(
                    f"{name}={value!r}: the {where} is of a run with {state['settings'].get(name)!r}; resume "
                    "with the same settings"
                )
        if state["data_sha256"] != self.origin["data_sha256"]:
            raise ArgumentError(f"images: the {where} is of a run on other pictures or labels")
        own = self.model.state_dict()
        parameters = dict(self.model.named_parameters())
        expected = {f"model.{name}": value.shape for name, value in own.items()}
        expected |= {
            f"momentum.{name}": value.shape for name, value in parameters.items() if self.settings.momentum
        }
        dtypes = {f"model.{name}": value.dtype for name, value in own.items()}
        same = all(value.dtype == dtypes.get(name, torch.float32) for name, value in tensors.items())
        if {name: value.shape for name, value in tensors.items()} != expected or not same:
            raise WeightsError(f"{where} is of another network than {type(self.model).__name__}")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(tensors[f"model.{name}"])
        for name, parameter in parameters.items():
            if self.settings.momentum:
                buffer = torch.empty_like(parameter, requires_grad=False).copy_(tensors[f"momentum.{name}"])
                self.optimiser.state[parameter]["momentum_buffer"] = buffer
        self.step, self.seen = step, seen


def _run_of(metadata: dict[str, str], where: str) -> tuple[dict, int, Epoch]:
    """What a checkpoint says of its run: its settings and data, the step that it is at, and what the epoch has seen."""
    if "run" not in metadata:
        raise WeightsError(f"{where} is no checkpoint of a training run")
    try:
        state = json.loads(metadata["run"])
        settings, step, seen = state["settings"], state["step"], Epoch(**state["seen"])
        numbers = math.isfinite(seen.loss) and math.isfinite(seen.accuracy) and type(seen.pictures) is int
        if not (isinstance(settings, dict) and "data_sha256" in state and type(step) is int and step >= 0 and numbers):
            raise ValueError("a value of another type or range than is written")
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise WeightsError(f"{where}: what it says of its run is damaged ({type(error).__name__}: {error})") from error
    return state, step, seen


def _seed(seed: int, stream: int, number: int) -> int:
    """A seed of its own for each number of each stream of the run's seed."""
    return int(np.random.SeedSequence((seed, stream, number)).generate_state(1)[0])


def _check_data(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    if images.dim() != 4 or images.numel() == 0:
        raise ShapeError(f"images of shape {list(images.shape)}: expected [N, C, H, W], none of them 0")
    if labels.shape != images.shape[:1]:
        raise ShapeError(
            f"labels of shape {list(labels.shape)}: expected [{len(images)}], one for each picture"
        )
    if images.dtype is not torch.uint8 or labels.dtype is not torch.int64:
        raise DtypeError(
            f"images {images.dtype}, labels {labels.dtype}: expected torch.uint8 and torch.int64"
        )
    if (images == images[:, :, :1, :1]).all():
        raise ArgumentError("images: every picture is of one colour; expected pictures that differ within")
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(images[:1].float())
    model.train(training)
    if logits.dim() != 2 or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ArgumentError(
            f"labels run from {labels.min()} to {labels.max()}: the model's output of shape "
            f"{list(logits.shape)} needs 0 up to its number of logits"
        )
