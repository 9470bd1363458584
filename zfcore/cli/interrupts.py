"""SIGINT and SIGTERM as exceptions, so that what was done can still be written."""

import contextlib
import signal
from collections.abc import Iterator

__all__ = ["Interrupted", "Interrupts"]

_KINDS = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}


class Interrupted(BaseException):
    """A signal arrived; code is the exit code."""

    def __init__(self, words: str = "interrupted", code: int = 130):
        super().__init__(words)
        self.code = code


class Interrupts:
    """Inside the ``with``, the signals raise Interrupted; one that the process was started to ignore stays ignored."""

    def __init__(self) -> None:
        self._holding, self._noted = False, None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The first signal that arrives inside is raised at the end, the second at once."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._noted is not None:
            raise Interrupted(*_KINDS[self._noted])

    def _arrive(self, number: int, _frame: object) -> None:
        if self._holding and self._noted is None:
            self._noted = number
        else:
            raise Interrupted(*_KINDS[number])

    def __enter__(self) -> "Interrupts":
        self._before = {}
        for number in _KINDS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                with contextlib.suppress(ValueError):  # not the main thread, where no signal arrives
                    self._before[number] = signal.signal(number, self._arrive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
