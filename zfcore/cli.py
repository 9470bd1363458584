"""The ``zfcore`` command: figures of what a network saw in pictures, and a page that shows them.

Exit codes: 0 all went well; 1 some inputs failed (listed on stderr and in errors.jsonl) or the results could
not be written; 2 wrong arguments; 130 interrupted, 143 terminated (what was done is kept).
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

import zfcore
from zfcore import models
from zfcore.data import find_images, read_image, sample_images
from zfcore.data.images import MAX_PIXELS
from zfcore.errors import ArgumentError, DeviceError, UnitNotFound, ZfcoreError
from zfcore.ops.conv_delta import PRECISIONS
from zfcore.report import analysis, figures
from zfcore.report.drawing import plain_text
from zfcore.report.files import OutputFolder, safe_name
from zfcore.report.page import Entry, Figure, Table, render_page

__all__ = ["main"]

DEFAULT_MODEL = "zfnet_small_fashion"
DEFAULT_SIDE = 224  # for networks that do not say what they expect
COLOUR_MEAN, COLOUR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in 0..1
LARGEST = 2**63 - 1  # of whole numbers
BOX_SHARE, STRIDE_SHARE = 4, 28  # the default box is a quarter of the shorter side, the stride a 28th
FILLS = {"grey": 0.5, "black": 0.0, "white": 1.0}
CLASSES_SHOWN = 5
EMBEDDED_BYTES = 24 * 2**20  # of figures within the page; the rest are linked


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's); returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        from zfcore.train import main as train

        return train(argv[1:])
    options = _parser().parse_args(argv)
    options.command_line = shlex.join(("zfcore", *argv))
    try:
        with _terminable(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # about metadata that is not read
            warnings.showwarning = _Notes()
            return options.run(options)
    except _Interrupted as error:
        finished = f"; what was finished is in {options.out}" if os.path.isdir(options.out) else ""
        _complain(f"{error}{finished}")
        return error.code
    except Exception as error:  # the last resort: a line, for whoever runs this in a job
        if options.traceback:
            traceback.print_exc()
        if isinstance(error, (ZfcoreError, OSError)):
            _complain(f"error: {error}")
        else:
            _complain(f"error: {type(error).__name__}: {error} (--traceback shows where)")
        return 2 if isinstance(error, ZfcoreError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zfcore",
        description="Show what a convolutional network saw in pictures: deconvnet projections of its units, "
        "and how a box moved over a picture changes its answer.",
        epilog="example:\n  zfcore demo --out demo\n\nexit codes:\n  0 all went well; 1 some inputs failed; "
        "2 wrong arguments; 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"zfcore {zfcore.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run, mode=name)
        return sub

    project = command(
        "project",
        _analyse_files,
        "project the strongest units of each layer back to pixels",
        "zfcore project shoes/ hat.jpg --layer conv3 --top 6 --out projections\n  "
        "zfcore project cat.jpg --model torchvision.models:vgg16 --weights vgg16.pth --layer features.28",
    )
    _add_inputs(project)
    _add_model(project)
    _add_projection(project)
    project.set_defaults(score="probability")
    _add_running(project, "zfcore-projections")

    occlude = command(
        "occlude",
        _analyse_files,
        "move a box over each picture and map how the answer changes",
        "zfcore occlude shoe.png --box 6 --stride 2 --out occlusion\n  "
        "zfcore occlude dog.jpg --model torchvision.models:alexnet --weights alexnet.pth --target 207",
    )
    _add_inputs(occlude)
    _add_model(occlude)
    _add_occlusion(occlude)
    _add_running(occlude, "zfcore-occlusion")

    demo = command(
        "demo",
        _analyse_samples,
        "project and occlude pictures that ship with the package, by the network that ships with it",
        "zfcore demo --out demo",
    )
    demo.add_argument(
        "--pictures",
        type=_positive,
        default=10,
        metavar="N",
        help="how many of the 100 (default: one a class)",
    )
    demo.set_defaults(
        model=DEFAULT_MODEL,
        weights=None,
        input_size=None,
        channels=None,
        mean=None,
        std=None,
        classes=None,
        layer=[],
        unit=[],
        top=9,
        rule="deconvnet",
        box=None,
        stride=None,
        fill="mean",
        target=None,
        score="probability",
        precision="exact",
        max_pixels=None,
    )
    _add_running(demo, "zfcore-demo")

    commands.add_parser(
        "train", help="train the small network on Fashion-MNIST (zfcore train --help)", add_help=False
    )
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, or folders of them")
    parser.add_argument(
        "--max-pixels", type=_positive, metavar="N", help="refuse larger pictures unread (default: 2^26)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("network").add_argument
    add(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help=f"{', '.join(models.names())}, or package.module:factory (default: {DEFAULT_MODEL})",
    )
    add("--weights", metavar="FILE", help=".safetensors, or a .pth of plain tensors")
    add("--input-size", type=_size, metavar="HxW", help=f"its pictures (default: its own, or {DEFAULT_SIDE})")
    add("--channels", type=int, choices=(1, 3), help="of its pictures (default: its first convolution's)")
    add(
        "--mean",
        type=_numbers,
        metavar="R,G,B",
        help="subtracted from pixels in 0..1 (default: its own, or ImageNet's for colour)",
    )
    add("--std", type=_numbers, metavar="R,G,B", help="then divided by")
    add("--classes", metavar="FILE", help="the classes' names, one a line")


def _add_projection(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("projection").add_argument
    add(
        "--layer",
        action="append",
        default=[],
        metavar="NAME",
        help="a layer's dotted name; give it again for more (default: every convolution)",
    )
    add(
        "--unit", type=_index, action="append", default=[], metavar="I", help="a unit; give it again for more"
    )
    add("--top", type=_positive, default=9, metavar="K", help="else the K strongest units (default: 9)")
    add(
        "--rule",
        choices=("deconvnet", "guided", "gradient"),
        default="deconvnet",
        help="how ReLUs are passed",
    )


def _add_occlusion(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("occlusion").add_argument
    add("--box", type=_pair, metavar="HxW", help="pixels (default: a quarter of the shorter side)")
    add("--stride", type=_pair, metavar="HxW", help="pixels (default: a 28th of the shorter side)")
    add(
        "--fill",
        default="mean",
        metavar="COLOUR",
        help="mean, grey, black, white, or numbers in 0..1: one, or one a channel (default: mean)",
    )
    add("--target", metavar="CLASS", help="a class's index or name (default: each picture's own top class)")
    add("--score", choices=("probability", "logit"), default="probability")
    add(
        "--layer",
        action="append",
        default=[],
        metavar="NAME",
        help="also map the total activation of this layer's strongest map (default: the last "
        "convolution, rectified)",
    )
    add("--unit", type=_index, action="append", default=[], metavar="I", help="that unit's map instead")
    add("--precision", choices=PRECISIONS, default="exact")


def _add_running(parser: argparse.ArgumentParser, out: str) -> None:
    add = parser.add_argument_group("running").add_argument
    add("--out", default=out, metavar="DIR", help=f"where figures and index.html go (default: {out})")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--batch-size", type=_positive, metavar="N", help="of the forwards (default: by memory)")
    add("--no-progress", action="store_true", help="draw no progress bar")
    add("--json", action="store_true", help="print the results as JSON")
    add("--traceback", action="store_true", help="show where in the program an error arose")


def _positive(text: str) -> int:
    value = _index(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1")
    return value


def _index(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 0")
    if len(text) > len(str(LARGEST)) or int(text) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at most {LARGEST}")
    return int(text)


def _pair(text: str) -> tuple[int, int]:
    sides = [_positive(part) for part in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r}; expected one number, or height x width such as 32x24")
    return sides[0], sides[-1]


def _size(text: str) -> tuple[int, int]:
    height, width = _pair(text)
    if height * width > MAX_PIXELS:
        raise argparse.ArgumentTypeError(f"{text!r}; expected at most {MAX_PIXELS} pixels")
    return height, width


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers with commas between") from None


class _Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; code is the exit code."""

    def __init__(self, words: str, code: int):
        super().__init__(words)
        self.code = code


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Ctrl-C and SIGTERM become `_Interrupted`, so that what was done can still be written."""

    def terminate(_number, _frame):
        raise _Interrupted("terminated", 143)

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread, where no signal arrives
        before = None
    try:
        yield
    except KeyboardInterrupt:
        raise _Interrupted("interrupted", 130) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class _Notes:
    """Shows each warning once, in one line."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, message: Warning, *_: object, **__: object) -> None:
        text = str(message).removeprefix("zfcore: ")
        if text not in self.seen:
            self.seen.add(text)
            _complain(f"note: {text}")


def _complain(message: str) -> None:
    tqdm.write(f"zfcore: {_one_line(message)}", file=sys.stderr)


def _one_line(value: object) -> str:
    return plain_text(" ".join(str(value).split()))


@dataclass(frozen=True)
class _Subject:
    """The network under study and how its pictures are made."""

    model: nn.Module
    spec: str
    classes: tuple[str, ...]
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

    def weights_hash(self) -> str:
        """SHA-256 over the names and bytes of the state dict."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def _subject(options: argparse.Namespace) -> _Subject:
    if options.model in models.shipped():
        model, meta = models.load(options.model)
    else:
        model, meta = models.create(options.model), None
    if options.weights is not None:
        metadata = models.load_weights(model, options.weights)
        if "input_size" in metadata:
            meta = models.ModelMeta.from_metadata(metadata)
    channels = options.channels or (meta.channels if meta else _first_channels(model))
    if meta:
        mean, std = meta.mean, meta.std
    else:
        mean, std = (COLOUR_MEAN, COLOUR_STD) if channels == 3 else ((0.0,), (1.0,))
    device = _device(options.device)
    return _Subject(
        model=model.to(device).eval(),
        spec=options.model,
        classes=_class_names(options.classes) if options.classes else (meta.classes if meta else ()),
        input_size=options.input_size or (meta.input_size if meta else (DEFAULT_SIDE, DEFAULT_SIDE)),
        channels=channels,
        mean=_each_channel("mean", options.mean, channels, mean),
        std=_each_channel("std", options.std, channels, std),
        device=device,
        dtype=next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32),
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


def _each_channel(name: str, given: tuple | None, channels: int, default: tuple) -> tuple[float, ...]:
    values = default if given is None else given
    values = values * channels if len(values) == 1 else values
    if len(values) != channels:
        raise ArgumentError(f"{name}: {values}; expected one number or {channels}, one a channel")
    if name == "std" and not all(value > 0 for value in values):
        raise ArgumentError(f"std: {values}; expected numbers above 0")
    return values


def _class_names(path: str) -> tuple[str, ...]:
    try:
        with open(path, encoding="utf-8") as file:
            return tuple(line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ArgumentError(f"classes: {path!r}; expected a text file, one name a line ({error})") from error


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device: {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device: {name!r}; this torch ({torch.__version__}) sees no CUDA device; expected cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device: {name!r}; expected cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device: {name!r}; expected cpu, cuda or cuda:N")
    return device


@dataclass(frozen=True)
class _Input:
    path: str
    name: str  # as the page shows it


def _analyse_files(options: argparse.Namespace) -> int:
    subject = _subject(options)
    found = find_images(options.images)
    if not found.files and not found.skipped:
        raise ArgumentError(
            f"IMAGE: {shlex.join(options.images)}; expected picture files, or folders with some"
        )
    run = _Run(options, subject)
    run.others = len(found.others)
    for path, reason in found.skipped:
        run.fail(path, "Skipped", reason)
    return run.over([_Input(path, path) for path in found.files])


def _analyse_samples(options: argparse.Namespace) -> int:
    samples = sample_images()
    # One of each class, then the second of each, and so on.
    ranks = {id(s): sum(t.label == s.label for t in samples[:i]) for i, s in enumerate(samples)}
    chosen = sorted(samples, key=lambda s: (ranks[id(s)], s.label))[: options.pictures]
    run = _Run(options, _subject(options))
    return run.over([_Input(str(s.path), f"{s.class_name}, {s.path.name}") for s in chosen])


@dataclass
class _Run:
    """One command: every input is analysed or listed with its failure; then the page is written."""

    options: argparse.Namespace
    subject: _Subject
    entries: list[Entry] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)
    failures: list[dict] = field(default_factory=list)
    others: int = 0
    figures: int = 0
    embedded: int = 0  # bytes of the figures within the page

    def over(self, inputs: list[_Input]) -> int:
        self.started, self.clock = datetime.now(timezone.utc), time.monotonic()
        self._prepare()
        with OutputFolder(self.options.out) as self.folder:
            try:
                with tqdm(inputs, unit="picture", disable=self.options.no_progress) as bar:
                    for index, item in enumerate(bar, 1):
                        self._one(index, item, alone=len(inputs) == 1)
            finally:  # also when interrupted
                page = self._finish()
        if self.options.json:
            print(_json(self.document))
        else:
            failed = len(self.failures)
            counts = [_counted(len(self.results), "picture"), _counted(self.figures, "figure")]
            counts += [f"{failed} failed (errors.jsonl lists them)"] if failed else []
            print(f"{', '.join(counts)}: {page}")
        return 1 if self.failures else 0

    def fail(self, path: str, kind: str, message: str) -> None:
        message = _one_line(message).removeprefix(f"{path!r}: ")
        self.failures.append({"path": path, "error": kind, "message": message})
        _complain(f"{path!r}: {message}")

    def _prepare(self) -> None:
        """Whatever of the arguments would fail on every picture fails here, on a blank one."""
        subject, options = self.subject, self.options
        blank = subject.normalised(torch.full((subject.channels, *subject.input_size), 0.5))
        try:
            order = analysis.forward_order(subject.model, blank)
        except ZfcoreError:
            raise
        except Exception as error:  # the model's own code
            raise ArgumentError(
                f"model: {options.model!r} fails on a picture {tuple(blank.shape)} ({_one_line(error)}); "
                "see --input-size and --channels"
            ) from error
        convolutions = analysis.conv_layers(subject.model, order)
        if options.mode == "occlude" and (len(options.layer) > 1 or len(options.unit) > 1):
            raise ArgumentError("layer, unit: given more than once; occlude maps one unit of one layer")
        if options.layer or not convolutions:
            feature = next(iter(options.layer), None)
        else:
            feature = analysis.rectified(subject.model, order, convolutions[-1])
        if options.mode == "occlude":
            self.layers = [feature] if feature else []
        else:
            self.layers = list(dict.fromkeys(options.layer)) or convolutions
        if not self.layers and options.mode == "project":
            raise ArgumentError(f"model: {options.model!r} runs no nn.Conv2d; name the layers with --layer")
        seen = analysis.look(subject.model, blank, self.layers)
        for name, maxima in seen.maxima.items():
            for unit in options.unit:
                if unit >= len(maxima):
                    raise UnitNotFound(f"unit: {unit} of layer {name!r}; expected 0 to {len(maxima) - 1}")
        if options.mode == "project":
            return
        shorter = min(subject.input_size)
        self.occlusion = {
            "box": options.box or (max(1, shorter // BOX_SHARE),) * 2,
            "stride": options.stride or (max(1, shorter // STRIDE_SHARE),) * 2,
            "fill": self._fill(),
            "score": options.score,
            "precision": options.precision,
            "layer": feature,
            "unit": options.unit[0] if options.unit else None,
            "target": self._target(seen.output),
            "batch_size": options.batch_size,
        }
        analysis.occlude(subject.model, blank, **{**self.occlusion, "box": subject.input_size})

    def _fill(self) -> Tensor:
        """The box's colour as the network takes it: [C]."""
        text, subject = self.options.fill, self.subject
        if text == "mean":
            return torch.zeros(subject.channels)
        try:
            values = (FILLS[text],) if text in FILLS else _numbers(text)
        except argparse.ArgumentTypeError:
            raise ArgumentError(
                f"fill: {text!r}; expected mean, {', '.join(FILLS)}, or numbers in 0..1 with commas between"
            ) from None
        values = _each_channel("fill", values, subject.channels, ())
        if not all(0 <= value <= 1 for value in values):
            raise ArgumentError(f"fill: {text!r}; expected numbers in 0..1")
        return subject.normalised(torch.tensor(values)[:, None, None])[0, :, 0, 0].cpu()

    def _target(self, output: object) -> int | None:
        text, names = self.options.target, self.subject.classes
        if text is None:
            return None
        classes = output.shape[1] if isinstance(output, Tensor) and output.dim() == 2 else None
        if text.isascii() and text.isdigit():
            if classes is not None and int(text) >= classes:
                raise UnitNotFound(f"target: class {text}; expected 0 to {classes - 1}")
            return int(text)
        folded = [name.casefold() for name in names]
        if text.casefold() in folded:
            return folded.index(text.casefold())
        near = difflib.get_close_matches(text.casefold(), folded, n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(names[folded.index(name)] for name in near)}" if near else ""
        raise UnitNotFound(f"target: {text!r}; expected a class's index or name{hint}")

    def _one(self, index: int, item: _Input, alone: bool) -> None:
        begun = time.monotonic()
        try:
            record, summary, drawn, tables, notes = self._analyse(item, alone)
        except Exception as error:  # one input's failure, whatever it is, is listed and the next one's turn
            if self.options.traceback:
                traceback.print_exc()
            self.fail(item.path, type(error).__name__, _one_line(error))
            return
        record["seconds"] = round(time.monotonic() - begun, 3)
        shown = []
        for kind, (image, alt) in drawn.items():
            png = _png(image)
            name = safe_name(index, item.path, kind)
            self.folder.write(name, png)
            self.figures += 1
            self.embedded += len(png)
            # Past a page's worth they are linked, and their bytes need not be kept.
            kept = png if self.embedded <= EMBEDDED_BYTES else None
            shown.append(Figure(name, kept, image.size, alt))
        record["figures"] = [figure.file for figure in shown]
        self.results.append(record)
        self.entries.append(Entry(item.name, summary, shown, tables, notes))

    def _analyse(self, item: _Input, alone: bool):
        subject, options = self.subject, self.options
        limit = {} if options.max_pixels is None else {"max_pixels": options.max_pixels}
        picture = read_image(item.path, size=subject.input_size, channels=subject.channels, **limit)
        image = subject.normalised(picture.pixels)
        seen = analysis.look(subject.model, image, self.layers)
        classes = self._probabilities(seen.output)
        height, width = picture.size
        read = f"{picture.format} {picture.mode}, {height} × {width} pixels"
        answer = ", ".join(f"{name} {figures.percent(share)}" for _, name, share in classes[:3])
        summary = " · ".join(part for part in (answer, read) if part)
        record = {
            "path": item.path,
            "classes": [{"index": i, "name": name, "probability": share} for i, name, share in classes],
            "notes": list(picture.notes),
        }
        drawn, tables = {}, []
        if options.mode in ("project", "demo"):
            layers = analysis.project(
                subject.model,
                image,
                seen,
                units=options.unit,
                top=options.top,
                rule=options.rule,
                batch_size=options.batch_size,
            )
            figure = figures.projection_figure(
                picture.pixels,
                layers,
                title=item.name,
                subtitle=f"{subject.spec} · {read}",
                classes=[(name, share) for _, name, share in classes],
            )
            drawn["project"] = figure, f"Projections of {item.name}, layer by layer."
            tables.append(_activation_table(layers))
            record["layers"] = [
                {
                    "layer": layer.layer,
                    "units": [
                        {"unit": unit, "activation": activation, "box": [int(v) for v in box]}
                        for unit, activation, box in zip(
                            layer.units, layer.activations, layer.boxes, strict=True
                        )
                    ],
                }
                for layer in layers
            ]
        if options.mode in ("occlude", "demo"):
            progress = alone and not options.no_progress
            o, feature = analysis.occlude(subject.model, image, **self.occlusion, progress=progress)
            figure = figures.occlusion_figure(
                picture.pixels,
                o,
                title=item.name,
                subtitle=f"{subject.spec} · {self._box_words()}",
                class_names=subject.classes,
                score=options.score,
                feature=feature,
            )
            drawn["occlude"] = figure, f"What a moving box does to the answer on {item.name}."
            record["occlusion"] = _occlusion_record(o, feature)
            tables.append(_occlusion_table(record["occlusion"], subject.classes))
        return record, summary, drawn, tables, list(picture.notes)

    def _probabilities(self, output: object) -> list[tuple[int, str, float]]:
        """The most probable classes: (index, name, probability); none when the output is no table."""
        if not (isinstance(output, Tensor) and output.dim() == 2 and output.is_floating_point()):
            return []
        if output.shape[1] < 2 or self.options.score == "logit":
            return []
        row = output[0].float()
        # Some networks end in a softmax of their own.
        distribution = bool((row >= 0).all()) and abs(float(row.sum()) - 1) < 1e-3
        shares, indices = (row if distribution else row.softmax(0)).topk(min(CLASSES_SHOWN, len(row)))
        names = self.subject.classes
        return [
            (i, names[i] if i < len(names) else f"class {i}", share)
            for i, share in zip(indices.tolist(), shares.tolist(), strict=True)
        ]

    def _box_words(self) -> str:
        (bh, bw), (sy, sx) = self.occlusion["box"], self.occlusion["stride"]
        return f"box {bh} × {bw}, stride {sy} × {sx}, fill {self.options.fill}"

    def _settings(self) -> list[tuple[str, str]]:
        subject, options = self.subject, self.options
        height, width = subject.input_size
        default = "shipped" if subject.spec in models.shipped() else "none: as the model was made"
        settings = [
            ("command", options.command_line),
            ("model", subject.spec),
            ("weights file", options.weights or default),
            ("weights SHA-256", subject.weights_hash()),
            (
                "pictures",
                f"{subject.channels} × {height} × {width}, (pixels - {subject.mean}) / {subject.std}",
            ),
        ]
        if options.mode in ("project", "demo"):
            chosen = f"units {options.unit}" if options.unit else f"the {options.top} strongest units"
            settings.append(("projection", f"rule {options.rule}, {chosen} of {', '.join(self.layers)}"))
        if options.mode in ("occlude", "demo"):
            o = self.occlusion
            settings.append(
                ("occlusion", f"{self._box_words()}, score {o['score']}, precision {o['precision']}")
            )
            settings.append(
                ("feature map", f"{o['layer']}, {'strongest' if o['unit'] is None else o['unit']}")
            )
        return [
            *settings,
            ("device", f"{subject.device}, {torch.get_num_threads()} CPU threads"),
            ("versions", ", ".join(f"{name} {version}" for name, version in _versions())),
            ("started", self.started.strftime("%Y-%m-%d %H:%M:%S UTC")),
            ("took", f"{time.monotonic() - self.clock:.1f} s"),
        ]

    def _finish(self) -> str:
        """Write errors.jsonl, results.json and index.html; returns the page's path."""
        titles = {"project": "Projections", "occlude": "Occlusion maps", "demo": "What a small network sees"}
        leads = {
            "project": "The strongest units of each layer, projected back to pixels by a deconvnet.",
            "occlude": "How the network's answer changes when a box covers part of the picture.",
            "demo": "Deconvnet projections and occlusion maps of Fashion-MNIST test pictures.",
        }
        mode = self.options.mode
        facts = [(str(len(self.results)), "pictures"), (str(self.figures), "figures")]
        if self.failures:
            facts.append((str(len(self.failures)), "failed"))
        if self.others:
            facts.append((str(self.others), "other files passed over"))
        facts.append((f"{time.monotonic() - self.clock:.1f} s", "in all"))
        settings = self._settings()
        self.document = {
            "settings": dict(settings),
            "out": os.path.abspath(self.options.out),
            "results": self.results,
            "failures": self.failures,
        }
        page = render_page(
            titles[mode],
            leads[mode],
            self.entries,
            settings,
            [(failure["path"], failure["message"]) for failure in self.failures],
            facts,
        )
        lines = "".join(_json(failure) + "\n" for failure in self.failures)
        self.folder.write("errors.jsonl", lines.encode())
        self.folder.write("results.json", (_json(self.document) + "\n").encode())
        return self.folder.write("index.html", page.encode())


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _versions() -> list[tuple[str, str]]:
    return [
        ("zfcore", zfcore.__version__),
        ("torch", torch.__version__),
        ("Python", platform.python_version()),
    ]


def _json(value: object) -> str:
    """JSON on one line; what is not finite has no number there and becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), allow_nan=False)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _activation_table(layers: Sequence[figures.LayerProjections]) -> Table:
    rows = [
        (
            layer.layer,
            str(unit),
            figures.number(activation),
            "{}, {} to {}, {}".format(*(int(v) for v in box)),
        )
        for layer in layers
        for unit, activation, box in zip(layer.units, layer.activations, layer.boxes, strict=True)
    ]
    return Table("Activations", ("Layer", "Unit", "Activation", "Receptive field (y, x to y, x)"), rows)


def _occlusion_record(o, feature) -> dict:
    scores = o.scores[0].flatten()
    lowest = int(scores.argmin())
    record = {
        "grid": list(o.scores.shape[1:]),
        "target": int(o.targets[0]),
        "clean": float(o.clean[0]),
        "lowest": float(scores[lowest]),
        "lowest_box": o.boxes.flatten(0, 1)[lowest].tolist(),
        "mean": float(scores.mean()),
        "label_changed_share": float((o.labels[0] != o.clean_labels[0]).float().mean()),
        "scores": o.scores[0].tolist(),
        "labels": o.labels[0].tolist(),
    }
    if feature is not None:
        record["feature"] = {
            "layer": feature.layer,
            "unit": feature.unit,
            "clean_activation": float(o.clean_activation[0]),
            "activation": o.activation[0].tolist(),
        }
    return record


def _occlusion_table(record: dict, names: Sequence[str]) -> Table:
    target = record["target"]
    rows = [
        ("grid", "{} × {} box positions".format(*record["grid"])),
        ("target", names[target] if target < len(names) else f"class {target}"),
        ("score with no box", figures.number(record["clean"])),
        ("lowest score", figures.number(record["lowest"])),
        ("with the box at", "{}, {} to {}, {}".format(*record["lowest_box"])),
        ("mean score", figures.number(record["mean"])),
        ("positions that change the answer", figures.percent(record["label_changed_share"])),
    ]
    return Table("Occlusion in numbers", ("", ""), rows)
