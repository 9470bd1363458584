"""What the commands have in common: types of arguments, and streams that carry results and messages."""

from zfcore.console.streams import Console, one_line, printable

__all__ = ["Console", "one_line", "printable"]
