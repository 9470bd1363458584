"""A folder that results are written to: whole files or none, and never a file outside of it."""

import contextlib
import errno
import fcntl
import io
import os
import re
import secrets
import stat
import unicodedata

from PIL import Image, PngImagePlugin

from zfcore.errors import ArgumentError
from zfcore.files import open_regular

__all__ = ["OutputError", "OutputFolder", "is_figure", "is_output_folder", "png", "safe_name"]

_LONGEST_NAME = 60
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
_PNG, _MARK = b"\x89PNG\r\n\x1a\n", b"tEXtSoftware\0zfcore"
_RESULTS = b'{"settings": {"command": "zfcore '  # how every results.json begins
_HEAD = 256  # bytes, within which the mark stands
_TO_DO = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EROFS: "make it writable",
}


def safe_name(index: int, path: str, kind: str, suffix: str = ".png") -> str:
    """A file name for the `index`-th input: "0007-red-shoe-project.png", whatever the input is called."""
    stem = os.path.splitext(os.path.basename(path))[0]
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_stem.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    return "-".join(part for part in (f"{index:04d}", slug, kind) if part) + suffix


def png(image: Image.Image) -> bytes:
    """A figure's file, marked as ours, so that `is_figure` knows it by whatever name."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", "zfcore")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=mark)
    return buffer.getvalue()


def is_figure(path: str) -> bool:
    """Whether the file is a figure that was drawn here."""
    head = _head(path)
    return head.startswith(_PNG) and _MARK in head


def is_output_folder(path: str) -> bool:
    """Whether the results of a run were written to the folder."""
    return _head(os.path.join(path, "results.json")).startswith(_RESULTS)


def _head(path: str) -> bytes:
    """The first bytes of a regular file; none of anything else."""
    try:
        with open_regular(path) as file:
            return file.read(_HEAD)
    except (OSError, ValueError):
        return b""


class OutputError(OSError):
    """A file was not written; the message says why, and what to do.

    name:      the file's.
    only_this: the name is taken by something that cannot be replaced; other files can still be written.
    """

    def __init__(self, number: int, message: str, name: str, only_this: bool = False):
        super().__init__(number, message)
        self.name, self.only_this = name, only_this

    def __str__(self) -> str:
        return self.strerror


class OutputFolder:
    """Writes files into one folder, made if it is not there.

    The folder is held open, so that every file goes where the folder was when it was opened, whatever its
    path leads to later. A file is written under a temporary name and renamed when it is whole and on the
    disk; the rename replaces a symbolic link of that name and does not follow it. Temporary files that killed
    processes have left are removed when the folder is opened; those of living ones are locked, and stay.

    Raises: ArgumentError when the folder cannot be made or written to; OutputError when a write fails.
    """

    def __init__(self, path: "str | os.PathLike[str]"):
        self.path = os.fspath(path)
        try:
            os.makedirs(self.path, exist_ok=True)
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise ArgumentError(f"out: {self.path!r}; expected a folder to write to ({reason})") from error
        self._sweep()

    def write(self, name: str, data: bytes) -> str:
        """Write a file; returns its path."""
        if not _NAME.fullmatch(name):
            raise ArgumentError(f"name: {name!r}; expected letters, digits, dots, dashes and underlines")
        try:
            with self._temporary() as (temporary, file):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
            os.fsync(self.descriptor)
        except OSError as error:
            raise self._explained(name, error) from error
        return os.path.join(self.path, name)

    def is_at_its_path(self) -> bool:
        """Whether the path still leads to the folder that files were written to."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except OSError:
            return False

    def is_gone(self) -> bool:
        """Whether the folder was removed."""
        return os.fstat(self.descriptor).st_nlink == 0

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _temporary(self):
        """A new file, locked for as long as it is open, and removed if the block does not succeed."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            name = f".{secrets.token_hex(8)}.tmp"
            file = os.fdopen(os.open(name, flags, 0o666, dir_fd=self.descriptor), "wb")
            try:
                with file:
                    with contextlib.suppress(OSError):  # a file system without locks, where nothing is swept either
                        fcntl.flock(file, fcntl.LOCK_EX)
                    if not os.fstat(file.fileno()).st_nlink:
                        continue  # another run took it for an orphan before it was locked
                    yield name, file
                return
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self.descriptor)
                raise

    def _sweep(self) -> None:
        """Remove temporary files that no living process holds."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self.descriptor):
                if _TEMPORARY.fullmatch(name):
                    self._remove_orphan(name)

    def _remove_orphan(self, name: str) -> None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with contextlib.suppress(OSError), os.fdopen(os.open(name, flags, dir_fd=self.descriptor), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=self.descriptor)

    def _explained(self, name: str, error: OSError) -> OutputError:
        reason = error.strerror or str(error)
        if self.is_gone() or (error.errno == errno.ENOENT and not self.is_at_its_path()):
            return OutputError(
                errno.ENOENT,
                f"out: {self.path!r} was removed while it was written to, with all that was in it; run again, with a "
                "folder that stays",
                name,
            )
        if self._is_folder(name):
            return OutputError(
                error.errno or errno.EISDIR,
                f"out: {os.path.join(self.path, name)!r} is a folder, where a file of that name is written; remove or "
                "rename it, or choose another folder",
                name,
                only_this=True,
            )
        todo = _TO_DO.get(error.errno, "see whether its disk works")
        return OutputError(
            error.errno or errno.EIO,
            f"out: {self.path!r}: {name} could not be written ({reason}); {todo}, or choose another folder",
            name,
        )

    def _is_folder(self, name: str) -> bool:
        try:
            return stat.S_ISDIR(os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_mode)
        except OSError:
            return False
