"""Which positions of an occlusion map are measured: all of them, or a coarse grid and the fine one where it moves.

The approximate way measures positions half a box apart, then all positions of every cell of that coarse grid at whose
corners the answer differs, wherever it lies, and interpolates the rest. Some of the rest are measured as well, drawn
at random: what interpolation misses there is reported.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zfcore.engine.grid import Grid
from zfcore.engine.measuring import Measured

SAMPLE = 32  # interpolated positions of an image that are measured to see how far off they are


class Everything:
    """All positions, so that there is nothing to say of which were measured, nor how far off the others are."""

    measured = error = None

    def __init__(self, grid: Grid):
        self.positions = len(grid)

    def rounds(self, images: Tensor, measured: Measured):
        """Positions to be measured, image * Gy * Gx + position, as long as there are any; images: [k] int64."""
        each = torch.arange(self.positions, device=images.device)
        yield (images[:, None] * self.positions + each).reshape(-1)


class WhereItMoves:
    """Positions where the answer moves.

    tolerance: of the range of the answers, what the corners of a cell may differ by before all of it is measured.
    measured: [N, Gy, Gx] bool. error: [N] float, the largest difference at the sample; NaN where nothing is
    interpolated.
    """

    def __init__(self, grid: Grid, steps: tuple[int, int], tolerance: float, count: int, device: torch.device):
        self.grid, self.tolerance = grid, tolerance
        self.lines = [  # the coarse grid's; at least two, so that there are cells
            torch.tensor([0, *range(step, n - 1, step), n - 1], device=device)
            for n, step in zip((grid.rows, grid.columns), steps, strict=True)
        ]
        self.measured = torch.zeros((count, grid.rows, grid.columns), dtype=torch.bool, device=device)
        self.error = torch.full((count,), torch.nan, dtype=torch.float64, device=device)
        self.draw = torch.Generator().manual_seed(0)

    def rounds(self, images: Tensor, measured: Measured):
        rows, columns = self.lines
        self.measured[images[:, None, None], rows[:, None], columns] = True
        yield self.flat(self.measured, images)
        if len(images):
            hot = self.hot(images, measured) & ~self.measured[images]
            self.measured[images] |= hot
            yield self.flat(hot, images, own=True)
            yield from self.checked(images, measured)

    def flat(self, chosen: Tensor, images: Tensor, own: bool = False) -> Tensor:
        """Where chosen [N or k, Gy, Gx] is set, for the images [k]."""
        found, place = (chosen if own else chosen[images]).flatten(1).nonzero().unbind(1)
        return images[found] * len(self.grid) + place

    def hot(self, images: Tensor, measured: Measured) -> Tensor:
        """[k, Gy, Gx]: the cells, with their borders, at whose corners an answer differs."""
        scores, labels, activation = measured.occluded
        cells = torch.zeros(
            (len(images), len(self.lines[0]) - 1, len(self.lines[1]) - 1), dtype=torch.bool, device=images.device
        )
        for values in (scores, activation):
            if values is not None:
                corners = _corners(self.coarse(values, images))
                spread = corners.amax(0) - corners.amin(0)
                whole = self.coarse(values, images).flatten(1)
                extent = whole.amax(1) - whole.amin(1)
                cells |= ~(spread <= self.tolerance * extent[:, None, None])  # NaN is hot
        if labels is not None:
            corners = _corners(self.coarse(labels, images))
            cells |= (corners != corners[0]).any(0)
        hot = torch.zeros((len(images), self.grid.rows, self.grid.columns), dtype=torch.bool, device=images.device)
        for found, i, j in cells.nonzero().tolist():
            y, x = self.lines[0], self.lines[1]
            hot[found, y[i] : y[i + 1] + 1, x[j] : x[j + 1] + 1] = True
        return hot

    def coarse(self, values: Tensor, images: Tensor) -> Tensor:
        """[k, rows, columns] of the coarse grid, of values [N * Gy * Gx]."""
        whole = values.view(-1, self.grid.rows, self.grid.columns)
        return whole[images[:, None, None], self.lines[0][:, None], self.lines[1]]

    def checked(self, images: Tensor, measured: Measured):
        """Interpolates what was not measured, and measures some of it."""
        open_ = ~self.measured[images]
        for values in measured.occluded:
            if values is not None:
                whole = values.view(-1, self.grid.rows, self.grid.columns)
                between = self.interpolated(self.coarse(values, images), values.dtype)
                whole[images] = torch.where(open_, between, whole[images])
        sample = torch.zeros_like(open_)
        for i, own in enumerate(open_):
            places = own.flatten().nonzero().flatten().cpu()
            drawn = places[torch.randperm(len(places), generator=self.draw)[:SAMPLE]]
            sample[i].view(-1)[drawn.to(own.device)] = True
        index = self.flat(sample, images, own=True)
        guessed = measured.occluded[0][index].clone()
        yield index
        self.measured[images] |= sample
        missed = (measured.occluded[0][index] - guessed).abs().double()
        for image in images[open_.flatten(1).any(1)].tolist():
            self.error[image] = missed[index // len(self.grid) == image].max()

    def interpolated(self, corners: Tensor, dtype: torch.dtype) -> Tensor:
        """[k, Gy, Gx] from the coarse grid: between its points in proportion, labels from the nearest."""
        weights = []
        for line, length in zip(self.lines, (self.grid.rows, self.grid.columns), strict=True):
            place = torch.arange(length, device=line.device)
            after = torch.searchsorted(line, place).clamp(min=min(1, len(line) - 1))
            before = (after - 1).clamp(min=0)
            part = (place - line[before]).double() / (line[after] - line[before]).clamp(min=1)
            if not dtype.is_floating_point:
                part = part.round()
            weight = torch.zeros((length, len(line)), dtype=torch.float64, device=line.device)
            rows = torch.arange(length, device=line.device)
            weight[rows, before] += 1 - part
            weight[rows, after] += part
            weights.append(weight)
        return (weights[0] @ corners.double() @ weights[1].T).to(dtype)


def _corners(values: Tensor) -> Tensor:
    """[4, k, rows - 1, columns - 1], of values [k, rows, columns]."""
    return torch.stack([values[:, :-1, :-1], values[:, :-1, 1:], values[:, 1:, :-1], values[:, 1:, 1:]])
