"""One self-contained page that shows a run: figures, numbers, how they were made, and what failed.

The page holds no script and asks for nothing: pictures are data: URIs, the style is inline and named by its
hash in the page's own Content-Security-Policy, and every name is escaped.
"""

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from zfcore.report.drawing import plain_text

__all__ = ["Entry", "Figure", "Table", "render_page"]


@dataclass(frozen=True)
class Figure:
    """A PNG; file: its name beside the page; png: its bytes, or None to link the file instead of embedding
    it; size: (width, height); alt: what it shows, in words."""

    file: str
    png: bytes | None
    size: tuple[int, int]
    alt: str


@dataclass(frozen=True)
class Table:
    """heads: the columns' names. rows: texts; what looks like a number is aligned right."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Entry:
    """One input: its name, a line about it, its figures and tables, and notes on how it was read."""

    name: str
    summary: str
    figures: Sequence[Figure]
    tables: Sequence[Table] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def render_page(
    title: str,
    lead: str,
    entries: Sequence[Entry],
    settings: Sequence[tuple[str, str]],
    failures: Sequence[tuple[str, str]] = (),
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """The page's HTML.

    lead: a sentence under the title. facts: (value, what it counts), shown large. settings: (name, value) of
    how the run was made. failures: (file, reason).
    """
    style_hash = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src 'sha256-{style_hash}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    contents = ""
    if len(entries) > 1:
        names = enumerate((_text(entry.name) for entry in entries), 1)
        links = "".join(f'<li><a href="#picture-{index}">{name}</a></li>' for index, name in names)
        contents = f'<nav aria-label="Pictures"><ol>{links}</ol></nav>'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<p class="mark">zfcore</p>
<h1>{_text(title)}</h1>
<p class="lead">{_text(lead)}</p>
{_facts(facts)}
{contents}
</header>
<main>
{_failures(failures)}
{"".join(_article(index, entry) for index, entry in enumerate(entries, 1))}
<section id="how">
<h2>How this was made</h2>
<dl>{"".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in settings)}</dl>
</section>
</main>
</body>
</html>
"""


def _article(index: int, entry: Entry) -> str:
    figures = "".join(_figure(figure) for figure in entry.figures)
    tables = "".join(_table(table) for table in entry.tables)
    notes = "".join(f'<p class="note">{_text(note)}</p>' for note in entry.notes)
    return f"""<article id="picture-{index}">
<h2>{_text(entry.name)}</h2>
<p class="summary">{_text(entry.summary)}</p>
{notes}{figures}{tables}
</article>
"""


def _figure(figure: Figure) -> str:
    link = f'<a href="{_text(figure.file)}">{_text(figure.file)}</a>'
    if figure.png is None:
        return f'<p class="note">{_text(figure.alt)} The figure stands beside this page: {link}.</p>'
    data = base64.b64encode(figure.png).decode()
    width, height = figure.size
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="{_text(figure.alt)}"><figcaption>{_text(figure.alt)} {link}</figcaption></figure>'
    )


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col">{_text(head)}</th>' for head in table.heads)
    rows = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in table.rows)
    return f"<details><summary>{_text(table.caption)}</summary>{_grid(heads, rows)}</details>"


def _cell(value: str) -> str:
    digits = value.lstrip("-+<>\N{MINUS SIGN}")[:1].isdigit()
    return f'<td class="number">{_text(value)}</td>' if digits else f"<td>{_text(value)}</td>"


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<li><b>{_text(value)}</b> {_text(name)}</li>" for value, name in facts)
    return f'<ul class="facts">{items}</ul>' if items else ""


def _failures(failures: Sequence[tuple[str, str]]) -> str:
    if not failures:
        return ""
    rows = "".join(f"<tr><td>{_text(name)}</td><td>{_text(reason)}</td></tr>" for name, reason in failures)
    heads = '<th scope="col">Input</th><th scope="col">Why</th>'
    count = f"{len(failures)} input{'' if len(failures) == 1 else 's'} failed"
    return f'<section id="failed" class="failed"><h2>{count}</h2>{_grid(heads, rows)}</section>'


def _grid(heads: str, rows: str) -> str:
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _text(value: str) -> str:
    """Safe in text and in a quoted attribute; surrogates of undecodable file names become dots."""
    return html.escape(plain_text(value), quote=True)


_STYLE = """
:root{--page:#f5f6f8;--card:#fff;--ink:#181a1f;--muted:#5c616c;--rule:#dfe2e8;--link:#2b55b5;--warn:#a33a20;
--warn-back:#fdf1ed}
@media(prefers-color-scheme:dark){:root{--page:#121419;--card:#1b1e25;--ink:#e8eaee;--muted:#9ba1ad;
--rule:#2d323c;--link:#8fb0ff;--warn:#ff9d80;--warn-back:#2b1c18}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
header,main{max-width:1240px;margin:0 auto;padding:0 24px}
header{padding-top:44px}
.mark{margin:0;color:var(--muted);letter-spacing:.08em;font-size:14px;font-weight:600}
h1{margin:4px 0 6px;font-size:34px;line-height:1.2;letter-spacing:-.01em}
h2{margin:0;font-size:21px;line-height:1.3}
.lead{margin:0;max-width:46em;color:var(--muted)}
.facts{display:flex;flex-wrap:wrap;gap:8px 36px;margin:22px 0 0;padding:0;list-style:none;color:var(--muted)}
.facts b{display:block;color:var(--ink);font-size:24px;font-weight:600;line-height:1.2}
nav ol{display:flex;flex-wrap:wrap;gap:8px;margin:24px 0 0;padding:0;list-style:none;max-height:11em;
overflow:auto}
nav a{display:block;padding:3px 12px;border:1px solid var(--rule);border-radius:999px;background:var(--card);
font-size:14px;text-decoration:none}
a{color:var(--link)}
article,section{margin:28px 0;padding:26px;border:1px solid var(--rule);border-radius:14px;
background:var(--card)}
.summary,.note{margin:4px 0 0;color:var(--muted)}
.note{font-size:14px}
figure{margin:20px 0 0}
img{display:block;width:100%;height:auto;border-radius:8px;background:#fff}
figcaption{margin-top:8px;color:var(--muted);font-size:14px}
details{margin-top:16px;border-top:1px solid var(--rule);padding-top:12px}
summary{cursor:pointer;font-weight:600;font-size:15px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;margin-top:12px;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:5px 22px 5px 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}
th{color:var(--muted);font-weight:600}
td.number{text-align:right}
dl{display:grid;grid-template-columns:minmax(8em,max-content) 1fr;gap:6px 24px;margin:16px 0 0;font-size:14px}
dt{color:var(--muted)}
dd{margin:0;font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
.failed{border-color:var(--warn);background:var(--warn-back)}
.failed h2{color:var(--warn)}
@media(max-width:640px){header,main{padding-left:12px;padding-right:12px}article,section{padding:16px}
dl{grid-template-columns:1fr}dt{margin-top:8px}}
"""
