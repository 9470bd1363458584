"""Parsers of arguments: numbers in plain ASCII within their bounds, or exit code 2 and words that say what is wrong."""

import argparse
import math
import re
from collections.abc import Callable

from zfcore.console.streams import one_line

__all__ = ["LARGEST", "Parser", "number", "numbers", "pair", "positive", "shown", "whole"]

LARGEST = 2**63 - 1  # of whole numbers
_SHOWN = 60  # characters of a value that a message repeats
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors repeat no character that a terminal would obey."""

    def error(self, message: str) -> None:
        super().error(one_line(message))


def shown(text: str) -> str:
    """A value as a message repeats it: quoted, and no longer than a line."""
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}... ({len(text)} characters)"


def whole(low: int = 0, high: int = LARGEST) -> Callable[[str], int]:
    """The parser of a whole number in low..high, written in the digits 0 to 9."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()):
            raise argparse.ArgumentTypeError(f"{shown(text)}; expected a whole number of at least {low}")
        # Counted first: Python refuses to convert thousands of digits, in words of its own.
        value = LARGEST + 1 if len(text.lstrip("0")) > len(str(LARGEST)) else int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{shown(text)}; expected a whole number of at least {low}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{shown(text)}; expected a whole number of at most {high}")
        return value

    return parse


positive = whole(1)


def pair(text: str) -> tuple[int, int]:
    """ "32x24" -> (32, 24); "32" -> (32, 32)."""
    sides = text.lower().split("x")
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{shown(text)}; expected one number, or height x width such as 32x24")
    return positive(sides[0]), positive(sides[-1])


def number(text: str) -> float:
    """A finite number, written in ASCII: "0.5", "-1", "5e-4"."""
    if not _NUMBER.fullmatch(text.strip(" ")):
        raise argparse.ArgumentTypeError(f"{shown(text)}; expected a number")
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)}; expected a finite number")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """Finite numbers with commas between."""
    parts = text.split(",")
    if not all(_NUMBER.fullmatch(part.strip(" ")) for part in parts):
        raise argparse.ArgumentTypeError(f"{shown(text)}; expected numbers with commas between")
    return tuple(number(part) for part in parts)
