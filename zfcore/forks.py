"""What a forked process needs: locks that nobody holds, a model as it was before calls that stayed behind, one thread.

A fork copies the thread that asks for it and no other. Locks that others held would be held for ever, what their calls
had changed would stay changed, and torch waits for ever for its own threads, whose number it remembers.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import torch

forked = False  # whether this process is a fork of one that had imported zfcore
_renewals: list[Callable[[], None]] = []
_open: dict[Callable[[], None], int] = {}  # what takes each change back, and the thread that made it


def renewed(renew: Callable[[], None]) -> None:
    """Has `renew`, which makes locks anew, called in every process that is forked from here on."""
    _renewals.append(renew)


def entered(leave: Callable[[], None]) -> None:
    """Notes what takes a change back that this thread is about to make, inside of a try that ends with `left(leave)`.

    leave: can be called again where an exception, as of Ctrl-C, ended it half way.
    """
    _open[leave] = threading.get_ident()


def left(leave: Callable[[], None]) -> None:
    """Takes the change back, unless that is done already."""
    if leave in _open:
        try:
            leave()
        except BaseException:
            leave()
            raise
        finally:
            _open.pop(leave, None)


def of_this_thread() -> list[Callable[[], None]]:
    """What takes back the changes that this thread has made and not taken back, the first one first."""
    here = threading.get_ident()
    return [leave for leave, thread in _open.copy().items() if thread == here]


class _Threads:
    """torch's number of threads, while calls have set it to one: the last of them sets it back."""

    def __init__(self) -> None:
        self.lock, self.users, self.before = threading.Lock(), 0, 1

    def enter(self) -> None:
        with self.lock:
            if not self.users:
                self.before = torch.get_num_threads()
            self.users += 1
            torch.set_num_threads(1)  # of each thread on its own, too

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                torch.set_num_threads(self.before)


_threads = _Threads()


@contextlib.contextmanager
def one_thread_if_forked() -> Iterator[None]:
    """In a forked process torch works in one thread inside: it would wait for others that stayed in the parent."""
    if not forked:
        yield
        return
    threads = _threads
    threads.enter()
    try:
        yield
    finally:
        threads.leave()


def _after_fork() -> None:
    global forked, _threads
    forked, _threads = True, _Threads()
    for renew in _renewals:
        renew()
    here = threading.get_ident()
    behind = [leave for leave, thread in _open.items() if thread != here]
    if behind:
        with one_thread_if_forked():
            for leave in reversed(behind):
                left(leave)


os.register_at_fork(after_in_child=_after_fork)
