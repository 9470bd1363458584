"""Occlusion by plain forwards: every position is a row of a batch, and positions of several images share one.

One scratch buffer holds the batch for the whole call: a row gets its image once, and from one position to the next
only the pixels under the old and the new box are written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zfcore.call import fitting
from zfcore.engine.costs import MOST_VALUES, VALUE_BYTES
from zfcore.engine.grid import Grid
from zfcore.engine.measuring import Answers, FeatureTotals, Parts
from zfcore.network import Kept, fixed_batch

# What batch_size=None lets one batch's pixels and feature maps take on a GPU.
SCRATCH_BYTES = 256 * 2**20
# On a CPU a batch's largest map is to stay in the cache, and under the 32 MB from which on malloc takes fresh pages for
# every result, all of which have to be cleared. But the parameters are read by each batch, and this share of their bytes
# is as much as that may be: large full layers want more rows.
PARAMETERS = 16
UNSEEN = 8  # where results cannot be seen, how many times larger than the picture the largest is taken to be


class Forwards:
    """Measures positions of some images by a forward for each.

    chosen: [k] int64, the images. grid, answers, totals: of the call; images, fill: [N, C, H, W], all of it. held: the
    model, `kept`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        fill: Tensor,
        grid: Grid,
        chosen: Tensor,
        batch_size: int | None,
        answers: Answers,
        totals: FeatureTotals | None,
        held: Kept,
    ):
        self.model, self.images, self.fill, self.grid = model, images, fill, grid
        self.chosen, self.answers, self.totals, self.held = chosen, answers, totals, held
        self.rows = fixed_batch(model)
        self.batch_size = self.rows or batch_size

    def groups(self) -> Iterator[Tensor]:
        """The images, in the groups that `clean` and then `measure` are asked for."""
        yield self.chosen

    def look(self, rows: Tensor, owners: Tensor, clean: bool) -> Parts:
        """One forward: the rows' scores, labels and activation; owners [rows] are their image indices."""
        count = len(owners)
        if self.rows is not None and count:  # an exported program takes no fewer
            index = torch.arange(self.rows, device=rows.device).clamp(max=count - 1)
            rows, owners = rows[index], owners[index]
        if self.totals is not None:
            self.totals.expect(owners, clean)
        with fitting(self.model, rows):
            output = self.model(rows)
        scores, labels = self.answers.read(output, owners, clean)
        parts = [scores, labels, None if self.totals is None else self.totals.take()]
        return [part if part is None else part[:count] for part in parts]

    def clean(self, group: Tensor) -> Iterator[tuple[Tensor, Parts]]:
        """The images without a box: their indices, and what is measured of them."""
        if not len(group) and len(self.images):
            return
        # Indexed, so copies: a network may write to its input.
        with self.held.watching():
            first = self.fitted(group[:1], True)
        yield group[:1], first
        for owners in group[1:].split(self.batch_size):
            if len(owners):
                yield owners, self.look(self.images[owners], owners, True)

    def fitted(self, owners: Tensor, clean: bool) -> Parts:
        """One image's parts; how many rows a batch has follows from what is seen of that forward, where nobody said."""
        rows = self.images[owners]
        if not len(owners):
            self.batch_size = self.batch_size or 1
        if self.batch_size is not None:
            return self.look(rows, owners, clean)
        if is_compiled(self.model):  # a mode would be compiled into it
            parts, largest = self.look(rows, owners, clean), UNSEEN * rows.nbytes
        else:
            with LargestResult() as seen:
                parts = self.look(rows, owners, clean)
            largest = max(seen.bytes, rows.nbytes)
        if self.images.device.type == "cpu":
            parameters = sum(p.nbytes for p in self.model.parameters()) // PARAMETERS
            room = max(VALUE_BYTES["cpu"], parameters)
            self.batch_size = max(1, min(MOST_VALUES["cpu"], room // largest))
        else:  # a row is its pixels and an operation's input and output
            self.batch_size = max(1, SCRATCH_BYTES // (rows.nbytes + 2 * largest))
        return parts

    def measure(self, index: Tensor) -> Iterator[tuple[Tensor, Parts]]:
        """Positions [k], image * Gy * Gx + position, batch by batch."""
        if len(index) and self.batch_size is None:
            self.fitted(index[:1] // len(self.grid), False)
        done = 0
        for rows in occluded_batches(self.images, self.fill, self.grid, index.tolist(), self.batch_size):
            own = index[done : done + len(rows)]
            done += len(rows)
            yield own, self.look(rows, own // len(self.grid), False)


def occluded_batches(
    images: Tensor, fill: Tensor, grid: Grid, index: list[int], batch_size: int
) -> Iterator[Tensor]:
    """Images with boxes, in the order of `index`, image * Gy * Gx + position: rows [B, C, H, W] of a reused buffer.

    fill: [N, C, H, W] (expanded, so it costs nothing where it is one colour).
    """
    if not index:
        return
    scratch = torch.empty_like(
        images[:1].expand(min(batch_size, len(index)), -1, -1, -1), memory_format=_format(images)
    )
    holds = [(-1, 0)] * len(scratch)  # the image and position that each row of the buffer shows
    for start in range(0, len(index), batch_size):
        used = index[start : start + batch_size]
        for row, place in enumerate(used):
            image, position = divmod(place, len(grid))
            shown, covered = holds[row]
            if shown == image:
                y, x = grid[covered]
                scratch[row, :, y, x] = images[image, :, y, x]
            else:
                scratch[row] = images[image]
            y, x = grid[position]
            scratch[row, :, y, x] = fill[image, :, y, x]
            holds[row] = (image, position)
        version = scratch._version
        yield scratch[: len(used)]
        if scratch._version != version:  # the network wrote to its input, as an in-place first layer does
            holds = [(-1, 0)] * len(scratch)


class LargestResult(TorchFunctionMode):
    """Notes the largest tensor that any operation returns, while entered, in this thread only."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not torch.compiler.is_compiling():
            self.bytes = max(self.bytes, result.nbytes)
        return result


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile made it, or a part of it."""
    return any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules()
    )


def _format(images: Tensor) -> torch.memory_format:
    dense = images.is_contiguous()
    last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not dense else torch.contiguous_format
