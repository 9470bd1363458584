"""Files that lie at paths from outside, opened with care."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
    _FLAGS |= getattr(os, _name, 0)


class NotRegular(ValueError):
    """What lies at a path is a folder, a FIFO, a socket or a device, as the message says."""


def not_regular(mode: int) -> str | None:
    """What a path is, where it is no file; None for a file."""
    if stat.S_ISREG(mode):
        return None
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return f"{name}, not a file"
    return "not a file"


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """The regular file at the path, for reading.

    Opening never waits for the other end of a FIFO, and what lies there is looked at once it is open: it may be exchanged at
    any time.

    Raises: OSError, and ValueError for a path with a NUL; NotRegular.
    """
    descriptor = os.open(path, _FLAGS)
    if what := not_regular(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegular(what)
    return os.fdopen(descriptor, "rb")
