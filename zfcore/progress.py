"""Progress bars."""

from __future__ import annotations

import threading
from typing import Protocol

from tqdm.auto import tqdm

from zfcore import forks


class Bar(Protocol):
    total: int
    disable: bool

    def __enter__(self) -> Bar: ...

    def __exit__(self, *error: object) -> None: ...

    def update(self, count: int) -> object: ...


class Drawn(tqdm):
    """A bar that has a lock of its own in a forked process, where another thread may have held the one of all bars."""


forks.renewed(lambda: Drawn.set_lock(threading.RLock()))


class Silent:
    """No bar, and no lock of tqdm's."""

    total, disable = 0, True

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: int) -> None:
        pass


def bar_of(drawn: bool, total: int, unit: str, desc: str | None = None) -> Bar:
    """One that counts to `total`, if it is to be drawn."""
    return Drawn(total=total, unit=unit, desc=desc) if drawn else Silent()
