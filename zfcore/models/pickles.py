"""What a pickled weights file would build, looked at before torch builds it."""

from __future__ import annotations

import io
import os
import pickletools
import zipfile
from typing import BinaryIO

from torch.serialization import _is_zipfile, _open_zipfile_reader

_DEEPEST = 100  # levels of tuples; those of torch's files have four
_LEGACY_PICKLES = 5  # one after the other, in the files of torch before 1.6


def check_pickled(file: BinaryIO) -> None:
    """ValueError for what would take the process down with it. Leaves the file at its start.

    Records that are longer than the file, as compressed ones may be: torch writes none. And tuples in tuples in
    tuples: torch's restricted unpickler takes them for keys, and Python's hash of 150,000 levels overflows
    the stack.
    """
    if _is_zipfile(file):
        size = os.fstat(file.fileno()).st_size
        held = sum(record.file_size for record in zipfile.ZipFile(file).infolist())
        if held > size:
            raise ValueError(f"its records take {held} bytes, the file {size}; expected an uncompressed archive")
        file.seek(0)
        with _open_zipfile_reader(file) as archive:
            _check(io.BytesIO(archive.get_record("data.pkl")))
    else:
        for _ in range(_LEGACY_PICKLES):
            _check(file)
    file.seek(0)


def _check(pickled: BinaryIO) -> None:
    """Follows the stack of torch's unpickler up to the end of one pickle, with depths for values."""
    stack: list[int] = []
    below: list[list[int]] = []  # what lay under the marks
    memo: dict[int, int] = {}
    for code, argument, _ in pickletools.genops(pickled):
        match code.name:
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE":
                stack, items = below.pop(), stack
                stack.append(1 + max(items, default=0))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(code.name[-1])
                stack[-count:] = [1 + max(stack[-count:])]
            case "APPENDS" | "SETITEMS":
                stack = below.pop()
            case "APPEND" | "BUILD":
                stack.pop()
            case "SETITEM":
                del stack[-2:]
            case "REDUCE" | "NEWOBJ":
                stack[-2:] = [max(stack[-2:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "PROTO" | "BINPERSID" | "STOP":
                pass
            case _:
                stack.append(0)
        if stack and stack[-1] > _DEEPEST:
            raise ValueError(f"it holds tuples within tuples, more than {_DEEPEST} levels of them")
