"""``python -m zfcore.train``: train ``zfnet_small`` on Fashion-MNIST."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from zfcore.data.fashion_mnist import FASHION_MNIST_CLASSES, find_fashion_mnist, load_fashion_mnist
from zfcore.errors import ArgumentError, ZfcoreError
from zfcore.models import ModelMeta, save_weights, zfnet_small
from zfcore.train.trainer import Settings, evaluate, pixel_statistics, train

EPILOG = """\
example:
  python -m zfcore.train --out fashion.safetensors --epochs 10

A run that is interrupted (Ctrl-C, SIGTERM, a power cut) goes on with the same command and --resume.
Exit codes: 0 trained, 1 failed, 2 wrong arguments, 130 or 143 interrupted.
"""


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the example's lines and adds the defaults."""


def parser() -> argparse.ArgumentParser:
    default = Settings()
    result = argparse.ArgumentParser(
        prog="python -m zfcore.train",
        description="Train zfnet_small on Fashion-MNIST.",
        epilog=EPILOG,
        formatter_class=_Help,
    )
    add = result.add_argument
    add(
        "--data",
        metavar="DIR",
        help="folder of the four IDX files; None: where Debian's dataset-fashion-mnist is",
    )
    add("--out", metavar="FILE", required=True, help="the weights to write, FILE.safetensors")
    add("--resume", action="store_true", help="continue from the checkpoint beside FILE, if there is one")
    add("--threads", type=int, help="of the CPU; None: torch's choice")
    add("--quiet", action="store_true", help="draw no progress bar")
    add = result.add_argument_group("settings").add_argument
    add("--epochs", type=int, default=default.epochs, help="passes over the training pictures")
    add("--batch-size", type=int, default=default.batch_size, help="pictures a step")
    add("--lr", type=float, default=default.lr, help="the learning rate's peak")
    add("--momentum", type=float, default=default.momentum, help="of SGD")
    add(
        "--weight-decay",
        type=float,
        default=default.weight_decay,
        help="added to the gradient, times the weight",
    )
    add("--warmup", type=float, default=default.warmup, help="share of the steps in which the rate climbs")
    add(
        "--filter-rms",
        type=float,
        default=default.filter_rms,
        help="filters' RMS is kept within it; inf: leave them",
    )
    add("--no-flip", dest="flip", action="store_false", help="no random mirroring")
    add("--shift", type=int, default=default.shift, metavar="PIXELS", help="random shift, at most")
    add("--seed", type=int, default=default.seed, help="of the initial weights and of the training")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's) and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    # A resumed run gives the weights of an unbroken one, so it did not need its --resume.
    command = ["python", "-m", "zfcore.train", *(argument for argument in argv if argument != "--resume")]
    try:
        with _Interrupt() as interrupt:
            return _train(options, shlex.join(command), interrupt)
    except (ZfcoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _train(options: argparse.Namespace, command: str, interrupt: _Interrupt) -> int:
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    out = Path(options.out)
    checkpoint = out.with_name(f"{out.stem}.checkpoint.safetensors")
    _check_out(out, checkpoint, options.resume)
    if options.threads is not None:
        if options.threads < 1:
            raise ArgumentError(f"threads={options.threads}: expected at least 1")
        torch.set_num_threads(options.threads)
    folder = find_fashion_mnist(options.data)
    images, labels = load_fashion_mnist("train", folder)
    test_images, test_labels = load_fashion_mnist("test", folder)
    for pictures in (images, test_images):
        if pictures.shape[1:] != images.shape[1:] or not all(28 <= side <= 64 for side in pictures.shape[2:]):
            height, width = pictures.shape[2:]
            raise ArgumentError(
                f"data={str(folder)!r}: pictures of {height} x {width}; expected one size, 28 to 64"
            )
    mean, std = pixel_statistics(images)

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model = zfnet_small(len(FASHION_MNIST_CLASSES)).to(memory_format=torch.channels_last)
    started = time.monotonic()

    def on_epoch(number, seen):
        accuracy = evaluate(model, test_images, test_labels, mean, std)
        print(
            f"epoch {number}/{settings.epochs}: training loss {seen.loss:.4f}, accuracy {seen.accuracy:.4f}; "
            f"test accuracy {accuracy:.4f}; {time.monotonic() - started:.0f} s",
            flush=True,
        )

    finished = train(
        model,
        images,
        labels,
        settings,
        checkpoint=checkpoint,
        resume=options.resume,
        stop=interrupt.asked,
        on_epoch=on_epoch,
        progress=not options.quiet,
    )
    if not finished:
        print(f"interrupted; {checkpoint} holds the run: give --resume to continue", file=sys.stderr)
        return 128 + interrupt.signal
    accuracy = evaluate(model, test_images, test_labels, mean, std)
    meta = ModelMeta(
        classes=FASHION_MNIST_CLASSES,
        input_size=tuple(images.shape[2:]),
        channels=images.shape[1],
        mean=mean,
        std=std,
        test_accuracy=accuracy,
        command=command,
    )
    save_weights(model, out, meta.to_metadata())
    checkpoint.unlink(missing_ok=True)
    print(f"{out}: test accuracy {accuracy:.4f}")
    return 0


def _check_out(out: Path, checkpoint: Path, resume: bool) -> None:
    """Find out before the training what would fail after it."""
    if out.suffix != ".safetensors":
        raise ArgumentError(f"out={str(out)!r}: expected a name ending in .safetensors")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK) or out.is_dir():
        raise ArgumentError(f"out={str(out)!r}: expected a file in a folder that can be written")
    if checkpoint.exists() and not resume:
        raise ArgumentError(
            f"out={str(out)!r}: {checkpoint} holds an unfinished run; give --resume to continue it, or "
            "remove it"
        )


class _Interrupt:
    """Inside the ``with``, the first SIGINT or SIGTERM is noted for ``asked``; a second ends the process."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.signal = 0

    def asked(self) -> bool:
        return self.signal != 0

    def _note(self, number, frame):
        self.signal = number
        self._restore()

    def _restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *error):
        self._restore()
