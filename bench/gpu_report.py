"""Brings what the stages of gpu_check.sh left together: python gpu_report.py WORK OUT writes OUT/results.json and results.md.

WORK holds stages.tsv (name, seconds, result of each stage), the tables of the benchmarks and tune.json, as far as the
stages came.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import table

TABLES = ("analyses", "ops", "changes", "kernels", "steps")


def collected(work: Path) -> dict[str, object]:
    """What was measured on, the stages, the rows, what was left out and why, and the configurations' times."""
    stages = []
    for line in (work / "stages.tsv").read_text().splitlines():
        name, seconds, result = line.split("\t")
        stages.append({"stage": name, "seconds": int(seconds), "result": result})
    together = {"measured_on": {}, "stages": stages, "left_out": {}, "rows": [], "tuning": []}
    for path in (work / f"{name}.json" for name in TABLES):
        if path.exists():
            stored = json.loads(path.read_text())
            together["measured_on"] = together["measured_on"] or stored["measured_on"]
            together["left_out"] |= stored["left_out"]
            together["rows"] += stored["rows"]
    if (work / "tune.json").exists():
        together["tuning"] = json.loads((work / "tune.json").read_text())
    return together


def page(together: dict[str, object]) -> str:
    """The same as Markdown."""
    lines = ["", "| stage | seconds | result |", "| --- | ---: | --- |"]
    lines += [f"| {stage['stage']} | {stage['seconds']} | {stage['result']} |" for stage in together["stages"]]
    if together["tuning"]:
        lines += ["", "| kernel | layer | asked for | rule | best | rule / best |"]
        lines += ["| --- | --- | --- | --- | --- | ---: |"]
    for found in together["tuning"]:
        asked = ", ".join(f"{name} {value}" for name, value in found["asked"].items())
        tiles = (" ".join(map(str, found[which])) for which in ("rule", "best"))
        row = (found["kernel"], f"{found['network']} {found['layer']}", asked, *tiles, f"{found['rule_over_best']:.2f}")
        lines.append(f"| {' | '.join(row)} |")
    return table.page(together) + "\n".join(lines) + "\n"


def main(work: Path, out: Path) -> None:
    together = collected(work)
    (out / "results.json").write_text(json.dumps(together, indent=1) + "\n")
    (out / "results.md").write_text(page(together))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
