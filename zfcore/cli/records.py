"""What a run found, as JSON and as the page's tables."""

import json
import math
import platform
from collections.abc import Sequence

import torch

import zfcore
from zfcore.data.class_names import class_label
from zfcore.report import figures
from zfcore.report.page import Table

__all__ = [
    "activation_table", "as_json", "counted", "occlusion_record", "occlusion_table", "projection_record", "versions",
]  # fmt: skip


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def versions() -> list[tuple[str, str]]:
    return [
        ("zfcore", zfcore.__version__),
        ("torch", torch.__version__),
        ("Python", platform.python_version()),
    ]


def as_json(value: object) -> str:
    r"""JSON on one line, in ASCII; what is not finite has no number there and becomes null, and what is no character
    (bytes of a file's name that are not UTF-8) has none either and becomes text like "\udcff"."""

    def plain(value):
        if isinstance(value, dict):
            return {plain(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, str):
            return value.encode("utf-8", "backslashreplace").decode()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), allow_nan=False)


def activation_table(layers: Sequence[figures.LayerProjections]) -> Table:
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


def projection_record(layers: Sequence[figures.LayerProjections]) -> list[dict]:
    return [
        {
            "layer": layer.layer,
            "units": [
                {"unit": unit, "activation": activation, "box": [int(v) for v in box]}
                for unit, activation, box in zip(layer.units, layer.activations, layer.boxes, strict=True)
            ],
        }
        for layer in layers
    ]


def occlusion_record(o, feature) -> dict:
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


def occlusion_table(record: dict, names: Sequence[str]) -> Table:
    target = record["target"]
    rows = [
        ("grid", "{} × {} box positions".format(*record["grid"])),
        ("target", class_label(names, target)),
        ("score with no box", figures.number(record["clean"])),
        ("lowest score", figures.number(record["lowest"])),
        ("with the box at", "{}, {} to {}, {}".format(*record["lowest_box"])),
        ("mean score", figures.number(record["mean"])),
        ("positions that change the answer", figures.percent(record["label_changed_share"])),
    ]
    return Table("Occlusion in numbers", ("", ""), rows)
