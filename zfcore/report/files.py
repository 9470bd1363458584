"""A folder that results are written to: whole files or none, and never a file outside of it."""

import contextlib
import os
import re
import secrets
import unicodedata

from zfcore.errors import ArgumentError

__all__ = ["OutputFolder", "safe_name"]

_LONGEST_NAME = 60
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def safe_name(index: int, path: str, kind: str, suffix: str = ".png") -> str:
    """A file name for the `index`-th input: "0007-red-shoe-project.png", whatever the input is called."""
    stem = os.path.splitext(os.path.basename(path))[0]
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_stem.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    return "-".join(part for part in (f"{index:04d}", slug, kind) if part) + suffix


class OutputFolder:
    """Writes files into one folder, made if it is not there.

    The folder is held open, so that every file goes where the folder was when it was opened, whatever its
    path leads to later. A file is written under a temporary name and renamed when it is whole and on the
    disk; the rename replaces a symbolic link of that name and does not follow it.

    Raises: ArgumentError when the folder cannot be made or written to; OSError when a write fails.
    """

    def __init__(self, path: "str | os.PathLike[str]"):
        self.path = os.fspath(path)
        try:
            os.makedirs(self.path, exist_ok=True)
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise ArgumentError(f"out: {self.path!r}; expected a folder to write to ({reason})") from error

    def write(self, name: str, data: bytes) -> str:
        """Write a file; returns its path."""
        if not _NAME.fullmatch(name):
            raise ArgumentError(f"name: {name!r}; expected letters, digits, dots, dashes and underlines")
        temporary = f".{secrets.token_hex(8)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(temporary, flags, 0o666, dir_fd=self.descriptor), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=self.descriptor)
            raise
        os.fsync(self.descriptor)
        return os.path.join(self.path, name)

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
