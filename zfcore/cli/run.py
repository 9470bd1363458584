"""A run: every input is analysed or listed with why it was not; then the page is written."""

import argparse
import difflib
import os
import shlex
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from zfcore import models
from zfcore.cli.inputs import find_inputs
from zfcore.cli.interrupts import Interrupted, Interrupts
from zfcore.cli.records import (
    activation_table,
    as_json,
    counted,
    occlusion_record,
    occlusion_table,
    projection_record,
    versions,
)
from zfcore.cli.subject import Subject, each_channel, make_subject
from zfcore.console import Console, one_line, printable
from zfcore.console.arguments import LARGEST, numbers, shown
from zfcore.console.streams import natives_silenced
from zfcore.data import read_image, sample_images
from zfcore.data.class_names import class_label, classes_named, folded
from zfcore.errors import ArgumentError, UnitNotFound, ZfcoreError
from zfcore.report import analysis, figures
from zfcore.report.files import OutputError, OutputFolder, png, safe_name
from zfcore.report.page import Entry, Figure, render_page

__all__ = ["analyse_files", "analyse_samples"]

BOX_SHARE, STRIDE_SHARE = 4, 28  # the default box is a quarter of the shorter side, the stride a 28th
FILLS = {"grey": 0.5, "black": 0.0, "white": 1.0}
CLASSES_SHOWN = 5
EMBEDDED_BYTES = 24 * 2**20  # of figures within the page; the rest are linked
PATHS_SHOWN = 8  # in a line


@dataclass(frozen=True)
class _Input:
    path: str
    name: str  # as the page shows it


def analyse_files(options: argparse.Namespace, console: Console, interrupts: Interrupts) -> int:
    subject = make_subject(options, console)
    inputs = find_inputs(options.images, options.out)
    found = inputs.found
    if inputs.named:
        console.complain(
            f"note: {counted(len(inputs.named), 'picture')} of those named drawn by zfcore ({_listed(inputs.named)})"
        )
    if inputs.left:
        console.complain(
            f"note: {counted(len(inputs.left), 'picture')} in folders of results left out ({_listed(inputs.left)}); "
            "name them, or their folder, to have them read"
        )
    if not found.files and not found.skipped:
        drawn = ", other than figures that zfcore drew" if inputs.drawn else ""
        raise ArgumentError(f"IMAGE: {shlex.join(options.images)}; expected picture files, or folders with some{drawn}")
    run = _Run(options, subject, console, interrupts)
    run.others = len(found.others)
    for path, reason in found.skipped:
        run.fail(path, "Skipped", reason)
    return run.over([_Input(path, path) for path in found.files])


def analyse_samples(options: argparse.Namespace, console: Console, interrupts: Interrupts) -> int:
    samples = sample_images()
    # One of each class, then the second of each, and so on.
    ranks = {id(s): sum(t.label == s.label for t in samples[:i]) for i, s in enumerate(samples)}
    chosen = sorted(samples, key=lambda s: (ranks[id(s)], s.label))[: options.pictures]
    run = _Run(options, make_subject(options, console), console, interrupts)
    return run.over([_Input(str(s.path), f"{s.class_name}, {s.path.name}") for s in chosen])


@dataclass
class _Run:
    """One command: every input is analysed or listed with its failure; then the page is written."""

    options: argparse.Namespace
    subject: Subject
    console: Console
    interrupts: Interrupts
    entries: list[Entry] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)
    failures: list[dict] = field(default_factory=list)
    others: int = 0
    figures: int = 0
    embedded: int = 0  # bytes of the figures within the page

    def over(self, inputs: list[_Input]) -> int:
        """Analyse the inputs in turn; returns the exit code. Raises: Interrupted, and whatever nobody expected, both
        after what was done is written."""
        self.started, self.clock = datetime.now(timezone.utc), time.monotonic()
        self._prepare()
        taken, stop, unwritten = 0, None, []
        with OutputFolder(self.options.out) as self.folder:
            self.out = os.path.abspath(self.options.out)  # now, while there is a current folder
            try:
                with tqdm(inputs, unit="picture", disable=self.options.no_progress) as bar:
                    for item in bar:
                        self._one(taken + 1, item, alone=len(inputs) == 1)
                        taken += 1
            except KeyboardInterrupt:
                stop = Interrupted()
            except BaseException as error:
                stop = error
            left = [item.path for item in inputs[taken:]]
            try:
                with self.interrupts.held():
                    unwritten = self._finish(self._reasons(left, stop))
                    self._conclude(stop, left, unwritten)
            except Interrupted as error:
                stop = stop or error
        if isinstance(stop, Interrupted):
            rest = f"; not analysed: {_listed(left)}" if left else ""
            raise Interrupted(f"{stop}; what was finished is in {printable(self.options.out)}{rest}", stop.code)
        if stop is not None and not isinstance(stop, OutputError):
            raise stop
        return 1 if self.failures or left or unwritten else 0

    def fail(self, path: str, kind: str, message: object) -> None:
        message = one_line(str(message).removeprefix(f"{path!r}: "))
        self.failures.append({"path": path, "error": kind, "message": message})
        self.console.complain(f"{path!r}: {message}")

    def _reasons(self, left: list[str], stop: BaseException | None) -> list[dict]:
        """As failures, the inputs whose turn did not come or whose figures could not be written."""
        if isinstance(stop, OutputError):
            kind, message = "NotWritten", f"not written: {one_line(stop)}"
        elif isinstance(stop, Interrupted):
            kind, message = "Interrupted", f"not analysed: {stop}"
        else:
            kind, message = type(stop).__name__, "not analysed: the run ended before"
        return [{"path": path, "error": kind, "message": message} for path in left]

    def _conclude(self, stop: BaseException | None, left: list[str], unwritten: list[OutputError]) -> None:
        """Print the results, and say what could not be written and what to do."""
        if self.options.json:
            self.console.say(as_json(self.document))
        elif stop is None and not unwritten:
            failed = len(self.failures)
            counts = [counted(len(self.results), "picture"), counted(self.figures, "figure")]
            counts += [f"{failed} failed (errors.jsonl lists them)"] if failed else []
            self.console.say(f"{', '.join(counts)}: {printable(os.path.join(self.options.out, 'index.html'))}")
        problems = [stop] if isinstance(stop, OutputError) else []
        for error in unwritten:
            if error.only_this or not problems:  # else the reason has been given
                problems.append(error)
        if problems:
            written = [] if self.folder.is_gone() else [record["path"] for record in self.results]
            for problem in problems:
                self.console.complain(f"error: {problem}")
            missing = [_listed(left)] if left else []
            missing += [error.name for error in unwritten]
            self.console.complain(f"written: {_listed(written)}; not written: {', '.join(missing)}")
            if len(left) > PATHS_SHOWN and any(error.name == "errors.jsonl" for error in unwritten):
                for path in left:
                    self.console.complain(f"{path!r}: not written")
        elif not self.folder.is_at_its_path():
            self.console.complain(
                f"note: out: {self.options.out!r} was moved during the run; the results are where it is now"
            )

    def _prepare(self) -> None:
        """Whatever of the arguments would fail on every picture fails here, on a blank one."""
        subject, options = self.subject, self.options
        blank = subject.blank()
        try:
            order = analysis.forward_order(subject.model, blank)
        except ZfcoreError:
            raise
        except (Exception, SystemExit) as error:  # the model's own code
            raise ArgumentError(
                f"model: {options.model!r} fails on a picture {tuple(blank.shape)} ({one_line(error)}); "
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
        subject.check_classes(seen.output)
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
            values = (FILLS[text],) if text in FILLS else numbers(text)
        except argparse.ArgumentTypeError:
            raise ArgumentError(
                f"fill: {shown(text)}; expected mean, {', '.join(FILLS)}, or numbers in 0..1 with commas between"
            ) from None
        values = each_channel("fill", values, subject.channels, ())
        if not all(0 <= value <= 1 for value in values):
            raise ArgumentError(f"fill: {text!r}; expected numbers in 0..1")
        return subject.normalised(torch.tensor(values)[:, None, None])[0, :, 0, 0].cpu()

    def _target(self, output: object) -> int | None:
        """The class that --target names. Its digits are an index, wherever there is such a class; else a name."""
        text, names = self.options.target, self.subject.classes
        if text is None:
            return None
        found = classes_named(names, text)
        classes = output.shape[1] if isinstance(output, Tensor) and output.dim() == 2 else LARGEST
        if text.isascii() and text.isdigit():
            index = int(text) if len(text.lstrip("0")) < len(str(LARGEST)) else LARGEST
            if index < classes:
                others = [i for i in found if i != index]
                if others:
                    warnings.warn(
                        f"target: {text} is taken as the index of {class_label(names, index)!r}; it is also the name "
                        f"of class {others[0]}",
                        stacklevel=1,
                    )
                return index
            if not found:
                raise UnitNotFound(f"target: class {shown(text)[1:-1]}; expected 0 to {classes - 1}")
        if len(found) > 1:
            raise ArgumentError(
                f"target: {text!r} is the name of the classes {', '.join(map(str, found))}; expected the index of one"
            )
        if found:
            return found[0]
        near = difflib.get_close_matches(folded(text), map(folded, names), n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(names[classes_named(names, name)[0]] for name in near)}" if near else ""
        raise UnitNotFound(f"target: {shown(text)}; expected a class's index or name{hint}")

    def _one(self, index: int, item: _Input, alone: bool) -> None:
        begun = time.monotonic()
        try:
            record, summary, drawn, tables, notes = self._analyse(item, alone)
        except (Exception, SystemExit) as error:  # whatever one input's failure is, the next one's turn comes
            if self.options.traceback:
                traceback.print_exc(file=self.console.error)
            self.fail(item.path, type(error).__name__, error)
            return
        record["seconds"] = round(time.monotonic() - begun, 3)
        try:
            made = [self._drawn(safe_name(index, item.path, kind), *drawing) for kind, drawing in drawn.items()]
        except OutputError as error:
            if not error.only_this:
                raise
            self.fail(item.path, "NotWritten", error)
            return
        record["figures"] = [figure.file for figure in made]
        self.results.append(record)
        self.entries.append(Entry(item.name, summary, made, tables, notes))

    def _drawn(self, name: str, image: Image.Image, alt: str) -> Figure:
        data = png(image)
        self.folder.write(name, data)
        self.figures += 1
        self.embedded += len(data)
        # Past a page's worth they are linked, and their bytes need not be kept.
        return Figure(name, data if self.embedded <= EMBEDDED_BYTES else None, image.size, alt)

    def _analyse(self, item: _Input, alone: bool):
        subject, options = self.subject, self.options
        limit = {} if options.max_pixels is None else {"max_pixels": options.max_pixels}
        with natives_silenced():  # a damaged file is reported once, and not by what it holds
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
            tables.append(activation_table(layers))
            record["layers"] = projection_record(layers)
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
            record["occlusion"] = occlusion_record(o, feature)
            tables.append(occlusion_table(record["occlusion"], subject.classes))
        return record, summary, drawn, tables, list(picture.notes)

    def _probabilities(self, output: object) -> list[tuple[int, str, float]]:
        """The most probable classes: (index, name, probability); none when the output is no table."""
        if not (isinstance(output, Tensor) and output.dim() == 2 and output.is_floating_point()):
            return []
        if output.shape[1] < 2 or self.options.score == "logit":
            return []
        row = output[0].float()
        # Some networks end in a softmax of their own, and those whose classes do not exclude each other in a sigmoid.
        within = bool(((row >= 0) & (row <= 1)).all())
        finished = within and (abs(float(row.sum()) - 1) < 1e-3 or self._ends_in_sigmoid)
        shares, indices = (row if finished else row.softmax(0)).topk(min(CLASSES_SHOWN, len(row)))
        names = self.subject.classes
        return [(i, class_label(names, i), share) for i, share in zip(indices.tolist(), shares.tolist(), strict=True)]

    @cached_property
    def _ends_in_sigmoid(self) -> bool:
        return analysis.ends_in_sigmoid(self.subject.model, self.subject.blank())

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
            settings.append(("occlusion", f"{self._box_words()}, score {o['score']}, precision {o['precision']}"))
            settings.append(("feature map", f"{o['layer']}, {'strongest' if o['unit'] is None else o['unit']}"))
        return [
            *settings,
            ("device", f"{subject.device}, {torch.get_num_threads()} CPU threads"),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions())),
            ("started", self.started.strftime("%Y-%m-%d %H:%M:%S UTC")),
            ("took", f"{time.monotonic() - self.clock:.1f} s"),
        ]

    def _finish(self, left: list[dict]) -> list[OutputError]:
        """Write errors.jsonl, results.json and index.html; returns why one or the other could not be written."""
        titles = {"project": "Projections", "occlude": "Occlusion maps", "demo": "What a small network sees"}
        leads = {
            "project": "The strongest units of each layer, projected back to pixels by a deconvnet.",
            "occlude": "How the network's answer changes when a box covers part of the picture.",
            "demo": "Deconvnet projections and occlusion maps of Fashion-MNIST test pictures.",
        }
        mode = self.options.mode
        facts = [(str(len(self.results)), "pictures"), (str(self.figures), "figures")]
        failures = self.failures + left
        if failures:
            facts.append((str(len(failures)), "failed"))
        if self.others:
            facts.append((str(self.others), "other files passed over"))
        facts.append((f"{time.monotonic() - self.clock:.1f} s", "in all"))
        settings = self._settings()
        self.document = {
            "settings": dict(settings),
            "out": self.out,
            "results": self.results,
            "failures": failures,
        }
        page = render_page(
            titles[mode],
            leads[mode],
            self.entries,
            settings,
            [(failure["path"], failure["message"]) for failure in failures],
            facts,
        )
        lines = "".join(as_json(failure) + "\n" for failure in failures)
        unwritten = []
        for name, data in (
            ("errors.jsonl", lines.encode()),
            ("results.json", f"{as_json(self.document)}\n".encode()),
            ("index.html", page.encode()),
        ):
            try:
                self.folder.write(name, data)
            except OutputError as error:
                unwritten.append(error)
        return unwritten


def _listed(paths: Sequence[str]) -> str:
    """The first paths, and how many more there are."""
    more = f" and {len(paths) - PATHS_SHOWN} more" if len(paths) > PATHS_SHOWN else ""
    return ", ".join(map(repr, paths[:PATHS_SHOWN])) + more if paths else "none"
