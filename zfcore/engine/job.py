"""What both ways of projecting work from: the checked arguments of one call, and the seeds that they name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zfcore.network import Window
from zfcore.ops.conv_strongest import conv_strongest
from zfcore.ops.strongest import strongest

# What batch_size=None lets the signals of one batch of seeds take. A GPU holds more, and each batch is some tens of
# launches, whatever is in it.
SCRATCH_BYTES = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}


def scratch_bytes(device: torch.device) -> int:
    return SCRATCH_BYTES.get(device.type, SCRATCH_BYTES["cpu"])


class Job:
    """The arguments of one call, checked.

    images: [N, C, H, W] where and in what the model computes. units: [U] int64, on the CPU. positions: "max", "all",
    or int64 [N, U, 2] on the CPU. map_size: of the layer, (1, 1) of features.
    """

    model: nn.Module
    images: Tensor
    layer: str
    units: Tensor
    positions: str | Tensor
    rule: str
    seed: str
    overlap: str
    crop: bool
    batch_size: int | None
    device: torch.device
    dtype: torch.dtype
    map_size: tuple[int, int]

    def locate(
        self, maps: Tensor, begin: int, units: range | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The seeds of images [begin, begin + n).

        Returns positions [n, U, 2], values [n, U], and the activations that they report [n, U].

        maps: [n, C, H, W], the layer's. units: those of the job's, by place, None for all.
        """
        n, _, h, w = maps.shape
        own = self.units if units is None else self.units[units.start : units.stop]
        ids = self.here(own)
        if isinstance(self.positions, Tensor):
            positions = self.positions[begin : begin + n]
            positions = positions if units is None else positions[:, units.start : units.stop]
        elif self.positions == "all":
            totals = maps[:, ids].flatten(2).sum(-1)
            return torch.full((n, len(ids), 2), -1, device=self.device), totals, totals
        else:
            positions = _rows_and_columns(strongest(maps, own), w)
        positions = self.here(positions)
        values = maps[torch.arange(n, device=self.device)[:, None], ids, positions[..., 0], positions[..., 1]]
        return positions, self.seeds(values), values

    def locate_in_conv(
        self, images: Tensor, weight: Tensor, bias: Tensor | None, window: Window
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `locate` with positions="max", in the maps of a convolution of the images, which are not made."""
        index, values = conv_strongest(images, weight, bias, self.units, window, self.map_size)
        return _rows_and_columns(index, self.map_size[1]), self.seeds(values), values

    def here(self, indices: Tensor) -> Tensor:
        """Where the images are; a copy from plain memory to a GPU is not waited for."""
        return indices.to(self.device, non_blocking=self.device.type == "cuda")

    def seeds(self, values: Tensor) -> Tensor:
        return torch.ones_like(values) if self.seed == "one" else values

    def seed_maps(self, activations: Tensor) -> Tensor:
        """positions="all": the maps that seed the way down."""
        return torch.ones_like(activations) if self.seed == "one" else activations


def _rows_and_columns(index: Tensor, width: int) -> Tensor:
    return torch.stack((index // width, index % width), -1)


def times(signal: Tensor, slope: Tensor) -> Tensor:
    """signal * slope, a rectifier's derivative; as a mask it stops an infinity too."""
    if slope.dtype == torch.bool:
        return torch.where(slope, signal, torch.zeros((), dtype=signal.dtype, device=signal.device))
    return signal * slope
