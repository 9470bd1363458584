"""The tables of a run of `zoo.py`, as Markdown."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

Record = Mapping[str, object]

LAYERS = ("mid", "late")
DECONV_ERRORS = tuple(f"{layer}_{rule}_error" for rule in ("gradient", "deconvnet") for layer in LAYERS)
ERRORS = (*DECONV_ERRORS, "occlusion_error", "plain_error")
RATIOS = ("occlusion_to_captum", "occlusion_to_plain", "mid_to_captum", "late_to_captum")
LEFT = ("library", "reason", "which", "error", "network", "path", "worst")
LARGE = 1e-4  # an error to look at
WORST = 10  # networks that are named
NAMES = 6  # networks that a reason is shown with


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    rule = ["---" if header in LEFT else "---:" for header in headers]
    return [f"| {' | '.join(map(str, line))} |" for line in (headers, rule, *rows)]


def grouped(records: Iterable[Record], of: str) -> dict[object, list[Record]]:
    groups = defaultdict(list)
    for record in records:
        groups[record[of]].append(record)
    return groups


def share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.0f} %)" if whole else "0"


def on_engine(record: Record, what: str) -> bool:
    return record.get(f"{what}_path") == "engine"


def read_whole(record: Record) -> bool:
    """Whether the network is read to its output; a score may be what reads a dict."""
    return bool(record.get("whole")) or on_engine(record, "occlusion")


def anything(record: Record) -> bool:
    return read_whole(record) or any(on_engine(record, layer) for layer in LAYERS)


def paths(records: Sequence[Record]) -> list[str]:
    """By library, which paths are taken. Networks that could not be made or run by themselves are not counted."""

    def row(name: str, group: Sequence[Record]) -> list[object]:
        looked = [record for record in group if record["status"] in ("done", "killed", "too long")]
        counts = [
            sum(map(read_whole, looked)),
            sum(on_engine(record, "occlusion") for record in looked),
            *(sum(on_engine(record, layer) for record in looked) for layer in LAYERS),
            sum(not anything(record) for record in looked),
        ]
        ends = [sum(record["status"] == status for record in group) for status in ("killed", "too long")]
        left_out = len(group) - len(looked)
        return [name, len(looked), *(share(c, len(looked)) for c in counts), *ends, left_out]

    headers = (
        "library", "networks", "whole network reads", "occlusion on the engine", "deconv engine: middle layer",
        "late layer", "none of these", "process killed", "too long", "not made or run",
    )  # fmt: skip
    rows = [row(name, group) for name, group in grouped(records, "library").items()]
    return table(headers, [*rows, row("all", records)])


def families(records: Sequence[Record]) -> str:
    looked = [record for record in records if record["status"] in ("done", "killed", "too long")]
    groups = defaultdict(list)
    for record in looked:
        groups[record["library"], record["family"]].append(read_whole(record))
    all_of, none_of = (sum(1 for group in groups.values() if f(group)) for f in (all, lambda g: not any(g)))
    return (
        f"Families read to the output: {all_of} of {len(groups)} with all of their networks, "
        f"{len(groups) - all_of - none_of} with some, {none_of} with none."
    )


def ended(records: Sequence[Record]) -> list[str]:
    """A line for every network that was not looked at to the end."""
    lines = []
    for record in records:
        if record["status"] != "done":
            where = f" ({record['where'][0]})" if record.get("where") else ""
            why = f"at {record.get('step')}: {record.get('error')}{where}"
            lines.append(f"- {record['key']}: {record['status']}, {why}")
    lines += [
        f"- {record['key']}: {name.removesuffix('_failed')}: {value}"
        for record in records
        for name, value in record.items()
        if name.endswith("_failed") and not name.startswith("captum")
    ]
    return lines


def kind_of(reason: str) -> str:
    """A reason without what is one network's own: names of its modules, numbers and sizes."""
    reason = reason.splitlines()[0] if reason else "no reason given"
    reason = re.sub(r"^'[^']*' \(\w+\) (calls|returns|cannot)", r"\1", reason)
    reason = re.sub(r"^'[^']*' \((\w+)\)", r"\1", reason)
    reason = re.sub(r"'[^']*'", "'...'", reason)
    reason = re.sub(r"\((\d+, ?)*\d*\)|\b\d+(\.\d+)?(e-?\d+)?\b", "...", reason)
    return reason[:160].replace("|", "\\|")


def reasons(records: Sequence[Record], fields: Sequence[tuple[str, str]]) -> list[str]:
    """How many networks each kind of reason keeps off. fields: (path, reason), of which a network's first is taken."""
    found = defaultdict(list)
    for record in records:
        for path, reason in fields:
            if path in record and record[path] not in ("engine", True):
                found[kind_of(str(record.get(reason, "")))].append(record["name"])
                break
    rows = []
    for reason, names in sorted(found.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(names[:NAMES]) + (" ..." if len(names) > NAMES else "")
        rows.append((reason, len(names), shown))
    return table(("reason", "networks", "which"), rows)


def exactness(records: Sequence[Record]) -> list[str]:
    """Errors, and the networks whose are the largest."""
    rows = []
    for name in (*DECONV_ERRORS, "occlusion_error", "occlusion_error_of_largest", "plain_error"):
        values = [(record[name], record["name"]) for record in records if name in record]
        if values:
            numbers = [value for value, _ in values]
            worst, which = max(values)
            over = sum(value > LARGE for value in numbers)
            rows.append((name, len(values), f"{statistics.median(numbers):.1e}", f"{worst:.1e} ({which})", over))
    lines = table(("error", "networks", "median", "worst", f"over {LARGE:.0e}"), rows)

    def excess(record):
        """A map's error beside that of a plain float32 loop: what is not float32's own noise."""
        return record["occlusion_error"] / max(record["plain_error"], 1e-7)

    maps = sorted((r for r in records if "occlusion_error" in r and r["occlusion_error"] > LARGE), key=excess)
    lines += [
        f"- {r['key']}: occlusion {r['occlusion_error']:.1e} of the range ({r['occlusion_exact_path']}), a loop of "
        f"float32 forwards {r['plain_error']:.1e}"
        for r in maps[: -WORST - 1 : -1]
    ]
    for record in records:
        bad = [f"{name} {record[name]:.1e}" for name in DECONV_ERRORS if record.get(name, 0) > LARGE]
        if bad:
            lines.append(f"- {record['key']}: {', '.join(bad)}")
        if record.get("changed") or record.get("training"):
            lines.append(f"- {record['key']}: not as it was: {record['changed'] or 'training'}")
    return lines


def speeds(records: Sequence[Record]) -> list[str]:
    """Ratios, the slowest first; below 1 zfcore is the slower side."""

    def number(record, name):
        value = record.get(name)
        return "" if value is None else f"**{value:.2f}**" if value < 1 else f"{value:.2f}"

    timed = [record for record in records if any(name in record for name in RATIOS)]
    timed.sort(key=lambda record: record.get("occlusion_to_plain", 0))
    headers = (
        "network", "occlusion / captum", "/ plain", "path", "plain batch", "deconv mid / captum", "late / captum"
    )  # fmt: skip
    rows = [
        (
            record["key"], *(number(record, name) for name in RATIOS[:2]), record.get("occlusion_speed_path", ""),
            record.get("plain_batch", ""), *(number(record, name) for name in RATIOS[2:]),
        )
        for record in timed
    ]  # fmt: skip
    slower = Counter(name for record in timed for name in RATIOS if record.get(name, 1) < 1)
    known = Counter(name for record in timed for name in RATIOS if name in record)
    said = ", ".join(f"{name} {slower[name]} of {known[name]}" for name in RATIOS)
    return [*table(headers, rows), "", f"Slower than the other side: {said}."]


def page(records: Sequence[Record]) -> list[str]:
    lines = []
    read = [record for record in records if "read" in record["what"]]
    if read:
        lines += ["## Paths", "", *paths(read), "", families(read)]
    if any(record.get("occlusion_path") not in (None, "engine") for record in read):
        lines += ["", "## What keeps occlusion off the engine", ""]
        lines += reasons(read, [("occlusion_path", "occlusion_reason")])
    if any(record.get(f"{layer}_path") not in (None, "engine") for record in read for layer in LAYERS):
        lines += ["", "## What keeps a middle or a late layer off the deconvnet's engine", ""]
        lines += reasons(read, [(f"{layer}_path", f"{layer}_reason") for layer in LAYERS])
    if ends := ended(records):
        lines += ["", "## Not looked at to the end", "", *ends]
    if any(name in record for record in records for name in ERRORS):
        lines += ["", "## Exactness", "", *exactness(records)]
    if any(name in record for record in records for name in RATIOS):
        lines += ["", "## Speed", "", *speeds(records)]
    return lines
