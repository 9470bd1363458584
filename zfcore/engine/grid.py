"""The grid of box positions of an occlusion map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The box positions of one image: per axis the first pixel and the one past the last."""

    size: tuple[int, int]
    y: tuple[tuple[int, int], ...]
    x: tuple[tuple[int, int], ...]

    @classmethod
    def over(cls, size: tuple[int, int], box: tuple[int, int], stride: tuple[int, int]) -> Grid:
        axes = []
        for length, side, step in zip(size, box, stride, strict=True):
            count = -(-max(length - side, 0) // step) + 1  # ceil((length - side) / step) + 1
            starts = [min(i * step, length) for i in range(count)]
            axes.append(tuple((start, min(start + side, length)) for start in starts))
        return cls(tuple(size), *axes)

    @property
    def rows(self) -> int:
        return len(self.y)

    @property
    def columns(self) -> int:
        return len(self.x)

    def __len__(self) -> int:
        return self.rows * self.columns

    def __getitem__(self, position: int) -> tuple[slice, slice]:
        row, column = divmod(position, self.columns)
        return slice(*self.y[row]), slice(*self.x[column])

    def boxes(self) -> Tensor:
        y = torch.tensor(self.y, device="cpu")[:, None].expand(-1, self.columns, -1)  # [Gy, Gx, 2]
        x = torch.tensor(self.x, device="cpu")[None].expand(self.rows, -1, -1)
        return torch.stack([y[..., 0], x[..., 0], y[..., 1], x[..., 1]], dim=-1)
