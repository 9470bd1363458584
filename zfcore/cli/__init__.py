"""The ``zfcore`` command: figures of what a network saw in pictures, and a page that shows them.

Exit codes: 0 all went well; 1 some inputs failed (listed on stderr and in errors.jsonl) or the results could
not be written; 2 wrong arguments; 130 interrupted, 143 terminated (what was done is kept).
"""

import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence

from zfcore.cli.interrupts import Interrupted, Interrupts
from zfcore.cli.parser import make_parser
from zfcore.cli.run import analyse_files, analyse_samples
from zfcore.cli.subject import from_here
from zfcore.console import Console
from zfcore.errors import ZfcoreError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's); returns the exit code."""
    own = argv is None
    argv = list(sys.argv[1:] if own else argv)
    if argv[:1] == ["train"]:
        from zfcore.train.command import run as train

        with Console(own=own) as console:
            return train(argv[1:], console)
    with Console("zfcore: ", own) as console:
        options = make_parser({"project": analyse_files, "occlude": analyse_files, "demo": analyse_samples}).parse_args(
            argv
        )
        options.command_line = shlex.join(("zfcore", *argv))
        with Interrupts() as interrupts, warnings.catch_warnings(), from_here(), console.results_only():
            warnings.filterwarnings("ignore", module="PIL")  # about metadata that is not read
            warnings.showwarning = _Notes(console)
            code = _guarded(options, console, interrupts)
        return code or int(console.lost is not None)


def _guarded(options, console: Console, interrupts: Interrupts) -> int:
    try:
        return options.run(options, console, interrupts)
    except KeyboardInterrupt:
        error = Interrupted()
    except BaseException as caught:  # the last resort: a line, for whoever runs this in a job
        error = caught
    if isinstance(error, Interrupted):
        console.complain(str(error))
        return error.code
    if options.traceback:
        traceback.print_exception(error, file=console.error)
    if isinstance(error, (ZfcoreError, OSError)):
        console.complain(f"error: {error}")
    else:
        console.complain(f"error: {type(error).__name__}: {error} (--traceback shows where)")
    return 2 if isinstance(error, ZfcoreError) else 1


class _Notes:
    """Shows each warning once, in one line."""

    def __init__(self, console: Console) -> None:
        self.console, self.seen = console, set()

    def __call__(self, message: Warning, *_: object, **__: object) -> None:
        text = str(message).removeprefix("zfcore: ")
        if text not in self.seen:
            self.seen.add(text)
            self.console.complain(f"note: {text}")
