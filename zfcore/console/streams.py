"""The standard streams of a command: stdout carries results and nothing else, and no stream that fails ends the work.

A stream may be closed (2>&-), a pipe whose reader has gone, or a file on a full disk.
"""

import contextlib
import ctypes
import os
import re
import select
import sys
from collections import deque
from collections.abc import Iterator
from typing import TextIO

from tqdm.auto import tqdm

__all__ = ["Console", "natives_silenced", "one_line", "printable"]

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_LONGEST = 1500  # characters of a message's line
# Python's print holds no reference to sys.stdout: an object that is replaced while another thread prints must live on.
_in_use: "deque[object]" = deque(maxlen=64)
_NATIVE_TRACE = re.compile(r"\s*(?:Exception raised from |C\+\+ CapturedTraceback|frame #0: )")


def printable(text: str) -> str:
    r"""The text with whatever a terminal would obey or could not show escaped: "\x1b", "\n", "\u202e", "\udcff"."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(value: object) -> str:
    """A message on one line of bearable length, without the C++ stack that torch appends to some."""
    text = _NATIVE_TRACE.split(str(value), maxsplit=1)[0]
    text = printable(" ".join(text.split()))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


@contextlib.contextmanager
def natives_silenced() -> Iterator[None]:
    """Inside, what goes to the process's stderr is dropped: lines of C libraries, which no Python handler sees."""
    kept = os.dup(_STDERR)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), _STDERR)
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)


class Console:
    """The streams of a command, inside the ``with``.

    prefix: what messages begin with.
    own:    the process is the command's: what is printed after it, at exit, has no more place in its results than
            what is printed before, so the streams stay as they are.

    `error` is the stream of messages; it stands in for `sys.stderr`.
    """

    def __init__(self, prefix: str = "", own: bool = False):
        self.prefix, self.own = prefix, own
        self.lost: OSError | None = None  # why results could not be written to stdout

    def __enter__(self) -> "Console":
        _open_closed()
        self._before = sys.stdout, sys.stderr
        self._descriptor: int | None = None
        self.error = sys.stderr = _Forgiving(sys.stderr)
        self._stray = _Forgiving(self.error)
        _in_use.extend((self.error, self._stray))
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()
        if not self.own:
            sys.stdout, sys.stderr = self._before

    def say(self, line: str) -> None:
        """Write a line of results to stdout. One that cannot be written is `lost`, unless its reader has gone."""
        stream, _ = self._before
        if stream is None or self.lost is not None:
            return
        text = _encodable(f"{line}\n", stream)
        try:
            if self._descriptor is None:
                stream.write(text)
                stream.flush()
            else:
                _write(self._descriptor, text.encode(stream.encoding or "utf-8"))
        except BrokenPipeError:  # it wanted no more
            self.settle()
        except OSError as error:
            self.lost = error
            self.settle()
            self.complain(f"error: stdout could not be written to ({error.strerror or error})")

    def complain(self, message: str) -> None:
        """Write a message to stderr, in one line."""
        tqdm.write(f"{self.prefix}{one_line(message)}", file=self.error)

    def settle(self) -> None:
        """Write out what stdout still holds; what cannot be written is dropped, so that Python's exit does not fail."""
        stream, _ = self._before
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            if self.own:
                _discard(stream)

    @contextlib.contextmanager
    def results_only(self) -> Iterator[None]:
        """Inside, what others write to stdout goes to stderr, be it from Python, from C or from a child process."""
        self.settle()
        stream, _ = self._before
        kept = os.dup(_STDOUT)
        if _number(stream) == _STDOUT:
            self._descriptor = kept
        os.dup2(_STDERR, _STDOUT)
        sys.stdout = self._stray
        try:
            yield
        finally:
            if not self.own:
                _flush_all(stream)
                os.dup2(kept, _STDOUT)
                os.close(kept)
                self._descriptor = None
                sys.stdout = stream

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, somebody else's code runs: the streams that it replaces are put back, and it waits for no input, but
        where stdin is a terminal, at which somebody may answer."""
        if os.isatty(_STDIN):
            empty, kept, before = None, -1, None
        else:
            kept, before = os.dup(_STDIN), sys.stdin
            empty = sys.stdin = open(os.devnull)  # noqa: SIM115 (closed below)
            os.dup2(empty.fileno(), _STDIN)
        try:
            yield
        finally:
            _in_use.extend((sys.stdout, sys.stderr))
            sys.stdout, sys.stderr = self._stray, self.error
            if empty is not None:
                sys.stdin = before
                os.dup2(kept, _STDIN)
                os.close(kept)
                empty.close()


class _Forgiving:
    """A text stream on which writing never fails: once it cannot be written to, what is written is dropped."""

    def __init__(self, stream: "TextIO | _Forgiving | None"):
        self._stream = stream

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._stream.write(_encodable(text, self._stream))
            except (OSError, ValueError):  # ValueError: closed
                self._drop()
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._drop()

    def close(self) -> None:
        """Nothing: a model's code that closes its stdout must not close the messages' stream."""

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:
            return False

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if _number(stream) == _STDERR:
            _discard(stream)


def _encodable(text: str, stream) -> str:
    """The text with what the stream's encoding does not have escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # a pipe that somebody made non-blocking, and full
            select.select([], [descriptor], [])


def _number(stream) -> int | None:
    """The stream's descriptor, where it has one."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def _open_closed() -> None:
    """Open the null device as each closed standard stream: else the next file opened would be one of them."""
    for number in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)


def _discard(stream) -> None:
    """Let what the stream still holds, and whatever follows, go to the null device."""
    number = _number(stream)
    if number is not None:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), number)


def _flush_all(stream) -> None:
    """Write out what Python and C hold for stdout while it still leads elsewhere."""
    for held in (stream, sys.__stdout__):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            held.flush()
    ctypes.CDLL(None).fflush(None)
