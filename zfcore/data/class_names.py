"""The names of a network's classes: a text file with one a line, read so that no name moves to another class."""

import os
import re
import unicodedata
from collections.abc import Sequence

from zfcore.errors import ArgumentError, DtypeError
from zfcore.files import open_regular

__all__ = ["as_class_names", "class_label", "classes_named", "read_class_names"]

MAX_BYTES = 2**24  # of a file; ImageNet-21k's names with all their synonyms take 1 MB
MAX_LENGTH = 1000  # of a name, in characters

_BOM = "\ufeff"
_WIDE_BOMS = (  # the longer ones first
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_NUMBERED = re.compile(r"\W{0,2}([0-9]{1,9})['\"]?(?:\s*[:;,|=.)\t-]\s*|\s+)\S")


def read_class_names(path: "str | os.PathLike[str]") -> tuple[str, ...]:
    """The names in a file: line i, counted from 0, is the name of class i.

    path: a regular file of UTF-8 text, with or without a byte order mark, whose lines end in LF, CRLF or CR. White
          space around a name is not part of it; empty lines at the file's end are not lines.

    Raises: ArgumentError for a file that is missing, no regular file, larger than 16 MB, not UTF-8 or empty, that has
    an empty line among the names (which class would have none?), a name of more than 1,000 characters, or lines whose
    own numbers are in another order than the lines.
    """
    shown = repr(os.fsdecode(path))

    def refused(why: object) -> ArgumentError:
        return ArgumentError(f"classes: {shown}; expected a text file, one name a line ({why})")

    try:
        data = _bytes_of(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise refused(getattr(error, "strerror", None) or error) from error
    for mark, encoding in _WIDE_BOMS:
        if data.startswith(mark):
            raise refused(f"it is {encoding}; expected UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise refused(f"line {line} is not UTF-8") from error
    if "\0" in text:
        raise refused("it holds NUL characters, as UTF-16 does; expected UTF-8")
    # Not splitlines, which also breaks at form feeds and other characters that may stand within a name.
    lines = [_bare(line) for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise refused("it is empty")
    for number, line in enumerate(lines, 1):
        if not _visible(line):
            raise refused(f"line {number} of {len(lines)} is empty, and every class needs a name")
        if len(line) > MAX_LENGTH:
            raise refused(f"line {number} has {len(line)} characters; expected at most {MAX_LENGTH}")
    if _are_numbered_otherwise(lines):
        raise refused(f"its lines are numbered, and not in order: line 1 is {lines[0]!r}; expected class 0 first")
    return tuple(lines)


def as_class_names(names: Sequence[str]) -> Sequence[str]:
    """Names as an argument, checked: a sequence of texts. Raises: DtypeError."""
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
        raise DtypeError(f"class_names: a {type(names).__name__}; expected a sequence of texts, one a class")
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise DtypeError(f"class_names[{index}]: a {type(name).__name__}; expected a text")
    return names


def class_label(names: Sequence[str], index: int) -> str:
    """What to call a class: its name, with the index where another class has the same, or "class 7" if it has none."""
    name = names[index] if index < len(names) else ""
    if not _visible(name):
        return f"class {index}"
    return f"{name} ({index})" if names.count(name) > 1 else name


def classes_named(names: Sequence[str], text: str) -> list[int]:
    """The classes of that name; where there are none, those of that name in other letters (A for a, é composed)."""
    return [i for i, name in enumerate(names) if name == text] or [
        i for i, name in enumerate(names) if folded(name) == folded(text)
    ]


def folded(name: str) -> str:
    """The name for comparing: without regard to case, or to how accents are encoded."""
    return unicodedata.normalize("NFC", name.casefold())


def _bytes_of(path: "str | os.PathLike[str]") -> bytes:
    """A regular file's bytes; reading ends at the limit."""
    with open_regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return data


def _bare(line: str) -> str:
    return line.strip().strip(_BOM).strip()  # marks within: of files that were joined


def _visible(name: str) -> bool:
    return any(not c.isspace() and unicodedata.category(c)[0] != "C" for c in name)


def _are_numbered_otherwise(lines: Sequence[str]) -> bool:
    """Whether each line begins with a number, these are 0, 1, 2, ... or 1, 2, 3, ..., and they are not in order."""
    matches = [_NUMBERED.match(line) for line in lines]
    if not all(matches):
        return False
    found = [int(match[1]) for match in matches]
    return found != sorted(found) and sorted(found) in (list(range(len(found))), list(range(1, len(found) + 1)))
