"""Receptive-field arithmetic: where in the picture, or in any earlier map, a position of a later map looks.

Along an axis a position ``p`` of a map sees ``[p * jump + offset, p * jump + offset + size)`` of the picture.
One layer with kernel k, stride s, padding p and dilation d takes a field (size, jump, offset) of its output,
in its own input, one layer down:

    size' = (size - 1) * s + d * (k - 1) + 1        jump' = jump * s        offset' = offset * s - p
"""

from __future__ import annotations

from typing import NamedTuple

Pair = tuple[int, int]


class Window(NamedTuple):
    """A sliding window, rows then columns.

    ``padding`` is what lies above and left; what lies below may differ.
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair


class Field(NamedTuple):
    """What one position of a map sees of another map, rows then columns, in that map's positions."""

    size: Pair = (1, 1)
    jump: Pair = (1, 1)
    offset: Pair = (0, 0)

    def through(self, window: Window) -> Field:
        """The same field seen from one layer further down."""
        size, jump, offset = [], [], []
        for axis in (0, 1):
            k, s, p, d = (value[axis] for value in window)
            size.append((self.size[axis] - 1) * s + d * (k - 1) + 1)
            jump.append(self.jump[axis] * s)
            offset.append(self.offset[axis] * s - p)
        return Field(tuple(size), tuple(jump), tuple(offset))

    def above(self, window: Window) -> Field:
        """The field of one more layer, in the map that this field is about."""
        (ky, kx), (sy, sx), (py, px), (dy, dx) = window
        (jy, jx), (y, x) = self.jump, self.offset
        size = self.size[0] + dy * (ky - 1) * jy, self.size[1] + dx * (kx - 1) * jx
        return Field(size, (jy * sy, jx * sx), (y - py * jy, x - px * jx))

    def union(self, other: Field) -> Field | None:
        """The smallest field that holds both; None where their jumps differ: no box holds both everywhere."""
        if self.jump != other.jump:
            return None
        start = tuple(min(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        end = tuple(
            max(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.size, other.offset, other.size, strict=True)
        )
        return Field(tuple(e - s for s, e in zip(start, end, strict=True)), self.jump, start)


def pair(value) -> Pair:
    """An int or a sequence of one or two, as rows and columns."""
    if isinstance(value, int):
        return value, value
    if len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return tuple(value)
    value = tuple(int(v) for v in value)
    return value * 2 if len(value) == 1 else value
