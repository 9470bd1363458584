"""The rectangles of a map that boxes change."""

from __future__ import annotations

from typing import NamedTuple

from zfcore.network import Window

Pair = tuple[int, int]


class Rects(NamedTuple):
    """A rectangle of a map for each box: rows from y[i], columns from x[j] for box (i, j), all of one size."""

    y: tuple[int, ...]
    x: tuple[int, ...]
    size: Pair

    @classmethod
    def fitted(cls, y: list[Pair], x: list[Pair], shape: Pair) -> Rects:
        """Around spans [begin, end) of each axis, inside a map of `shape`."""
        starts, sizes = [], []
        for spans, length in zip((y, x), shape, strict=True):
            size = max(end - begin for begin, end in spans)
            starts.append(tuple(min(begin, length - size) for begin, _ in spans))
            sizes.append(size)
        return cls(*starts, tuple(sizes))

    def spans(self, axis: int) -> list[Pair]:
        return [(start, start + self.size[axis]) for start in self[axis]]

    def whole(self, shape: Pair) -> Rects:
        """The whole of a map of `shape` for each box."""
        return Rects((0,) * len(self.y), (0,) * len(self.x), tuple(shape))

    def reached(self, window: Window, shape: Pair) -> Rects:
        """The outputs, of a map of `shape`, whose window touches the rectangle."""
        axes = []
        for axis, length in enumerate(shape):
            k, s, p, d = (value[axis] for value in window)
            spans = []
            for start, end in self.spans(axis):
                begin = min(max(0, -((d * (k - 1) - p - start) // s)), length - 1)
                spans.append((begin, max(begin + 1, min(length, (end - 1 + p) // s + 1))))
            axes.append(spans)
        return Rects.fitted(*axes, shape)

    def pairs(self, window: Window, shape: Pair) -> float:
        """How many pairs of a pixel and a tap reach an output, in the mean over the boxes."""
        product = 1.0
        for axis, length in enumerate(shape):
            k, s, p, d = (value[axis] for value in window)
            count = 0
            for start, end in self.spans(axis):
                for base in range(p, p - k * d, -d):
                    first, last = max(0, -(-(start + base) // s)), min(length - 1, (end - 1 + base) // s)
                    count += max(0, last - first + 1)
            product *= count / len(self[axis])
        return product
