"""Finding picture files: what is named, and what lies in folders."""

import os
import stat
from collections.abc import Iterable
from typing import NamedTuple

from zfcore.files import not_regular

__all__ = ["SUFFIXES", "FoundImages", "find_images"]

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
     ".ppm", ".pgm", ".pbm", ".pnm")
)  # fmt: skip


class FoundImages(NamedTuple):
    """files: paths to read, in order. skipped: (path, reason) of what looked like a picture and is none,
    or of a folder that could not be read. others: paths in folders whose names are not a picture's."""

    files: list[str]
    skipped: list[tuple[str, str]]
    others: list[str]


def find_images(paths: "Iterable[str | os.PathLike[str]]") -> FoundImages:
    """The picture files among `paths`: files as they are named, folders searched all the way down.

    A file named by itself is always returned, whatever its name; in a folder only names that end as a
    picture's do (FORMATS). Folders are read in name order; symbolic links are followed, each folder once,
    so loops end. FIFOs, sockets, devices, dangling links and folders that cannot be read are skipped, and
    listed with the reason.
    """
    found = FoundImages([], [], [])
    seen: set[tuple[int, int]] = set()
    for path in paths:
        path = os.fspath(path)
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if _is_folder(path):
            _search(path, found, seen)
        else:
            found.files.append(path)
    return found


def _search(folder: str, found: FoundImages, seen: set[tuple[int, int]]) -> None:
    pending = [folder]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            found.skipped.append((folder, f"cannot be read ({error.strerror})"))
            continue
        folders = []
        for entry in entries:
            if _is_folder(entry.path):
                folders.append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
                found.others.append(entry.path)
            elif reason := _not_a_file(entry.path):
                found.skipped.append((entry.path, reason))
            else:
                found.files.append(entry.path)
        pending.extend(reversed(folders))


def _is_folder(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _not_a_file(path: str) -> str | None:
    """Why a path is no file to read, or None."""
    try:
        return not_regular(os.stat(path).st_mode)
    except OSError as error:
        return "a symbolic link that leads nowhere" if os.path.islink(path) else str(error.strerror)
