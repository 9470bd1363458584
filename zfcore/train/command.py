"""``python -m zfcore.train``: train ``zfnet_small`` on Fashion-MNIST."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from zfcore.console import Console, printable
from zfcore.console.arguments import Parser, number, positive, whole
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


_MOST_THREADS = 1024  # many more end the process
_LARGEST_SIDE = 64  # of the pictures that zfnet_small takes


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the example's lines and adds the defaults."""


def parser() -> argparse.ArgumentParser:
    default = Settings()
    result = Parser(
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
    add("--threads", type=whole(1, _MOST_THREADS), help="of the CPU; None: torch's choice")
    add("--quiet", action="store_true", help="draw no progress bar")
    add = result.add_argument_group("settings").add_argument
    add("--epochs", type=positive, default=default.epochs, help="passes over the training pictures")
    add("--batch-size", type=positive, default=default.batch_size, help="pictures a step")
    add("--lr", type=number, default=default.lr, help="the learning rate's peak")
    add("--momentum", type=number, default=default.momentum, help="of SGD")
    add(
        "--weight-decay",
        type=number,
        default=default.weight_decay,
        help="added to the gradient, times the weight",
    )
    add("--warmup", type=number, default=default.warmup, help="share of the steps in which the rate climbs")
    add(
        "--filter-rms",
        type=_number_or_infinity,
        default=default.filter_rms,
        help="filters' RMS is kept within it; inf: leave them",
    )
    add("--no-flip", dest="flip", action="store_false", help="no random mirroring")
    add("--shift", type=whole(0, _LARGEST_SIDE), default=default.shift, metavar="PIXELS", help="random shift, at most")
    add("--seed", type=whole(), default=default.seed, help="of the initial weights and of the training")
    return result


def _number_or_infinity(text: str) -> float:
    return math.inf if text == "inf" else number(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's) and return its exit code."""
    own = argv is None
    with Console(own=own) as console:
        return run(sys.argv[1:] if own else argv, console)


def run(argv: Sequence[str], console: Console) -> int:
    """`main`, on streams that are set up already."""
    options = parser().parse_args(argv)
    # A resumed run gives the weights of an unbroken one, so it did not need its --resume.
    command = ["python", "-m", "zfcore.train", *(argument for argument in argv if argument != "--resume")]
    try:
        with _Interrupt() as interrupt:
            return _train(options, shlex.join(command), interrupt, console)
    except (ZfcoreError, OSError) as error:
        console.complain(f"error: {error}")
        return 2 if isinstance(error, ArgumentError) else 1


def _train(options: argparse.Namespace, command: str, interrupt: _Interrupt, console: Console) -> int:
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    out = Path(options.out)
    checkpoint = out.with_name(f"{out.stem}.checkpoint.safetensors")
    _check_out(out, checkpoint, options.resume)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = find_fashion_mnist(options.data)
    images, labels = load_fashion_mnist("train", folder)
    test_images, test_labels = load_fashion_mnist("test", folder)
    for pictures in (images, test_images):
        height, width = pictures.shape[2:]
        fit = all(28 <= side <= _LARGEST_SIDE for side in (height, width))
        if pictures.shape[1:] != images.shape[1:] or not fit:
            raise ArgumentError(
                f"data={str(folder)!r}: pictures of {height} x {width}; expected one size, 28 to {_LARGEST_SIDE}"
            )
    mean, std = pixel_statistics(images)

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model = zfnet_small(len(FASHION_MNIST_CLASSES)).to(memory_format=torch.channels_last)
    started = time.monotonic()

    def on_epoch(epoch, seen):
        accuracy = evaluate(model, test_images, test_labels, mean, std)
        console.say(
            f"epoch {epoch}/{settings.epochs}: training loss {seen.loss:.4f}, accuracy {seen.accuracy:.4f}; "
            f"test accuracy {accuracy:.4f}; {time.monotonic() - started:.0f} s"
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
        console.complain(
            f"interrupted; {printable(str(checkpoint))} holds the run: give --resume to continue"
        )
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
    console.say(f"{printable(str(out))}: test accuracy {accuracy:.4f}")
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

    def _note(self, signum, frame):
        self.signal = signum
        self._restore()

    def _restore(self):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def __enter__(self):
        self.before = {signum: signal.signal(signum, self._note) for signum in self.SIGNALS}
        return self

    def __exit__(self, *error):
        self._restore()
