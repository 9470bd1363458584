"""The dense path: networks that cannot be read, on whole maps, by autograd with the rules on its graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from zfcore.call import fitting, observable, running, writable
from zfcore.engine.job import Job, scratch_bytes
from zfcore.engine.numbers import numbers
from zfcore.engine.rules import Hidden, as_nodes, flush_torchscript, put_rules
from zfcore.errors import LayerNotFound, ShapeError, UnsupportedOperation
from zfcore.kinds import check_memory, plain, unusual
from zfcore.network import Kept, fixed_batch, kept, observing

Result = TypeVar("Result")


class Dense:
    """Whole maps and autograd: for networks that cannot be read.

    The layer's output comes from a hook on it alone.
    """

    def __init__(self, job: Job, name: str, call: int | None):
        self.job, self.call = job, call
        self.overwritten = False  # whether the model works in place on what autograd saved
        self.apart = False  # whether it works in place on one of several views that one operation made
        self.flushed = False  # whether TorchScript's functions were made to forget how they run
        self.model = writable(job.model)
        self.module = observable(self.model, name)
        self.rows = fixed_batch(self.model)
        images = job.images[:1] if len(job.images) else job.images.new_zeros((1, *job.images.shape[1:]))
        with fitting(self.model, images):
            output = self.trying(lambda: self.first(images))
        self.layer_shape, self.layer_dtype = tuple(output.shape[1:]), output.dtype
        self.picture_shape = tuple(job.images.shape[1:])

    def seeds_at_once(self) -> int:
        if self.job.batch_size is not None:
            return self.job.batch_size
        pixels = torch.Size(self.job.images.shape[1:]).numel()
        return max(1, scratch_bytes(self.job.device) // (pixels * self.job.images.element_size()))

    def image_batches(self) -> Iterator[tuple[int, int]]:
        step = self.rows or max(1, min(8, self.seeds_at_once() // len(self.job.units)))
        for begin in range(0, len(self.job.images), step):
            yield begin, min(begin + step, len(self.job.images))

    def trying(self, work: Callable[[], Result]) -> Result:
        """What some work on the model gives, as often as a failure says how the model has to be run."""
        with running(self.model):
            while True:
                try:
                    return work()
                except (RuntimeError, Hidden) as error:
                    if not self.runs_otherwise(error):
                        raise

    def runs_otherwise(self, error: Exception) -> bool:
        """Whether the model is to be run otherwise after this error, and was not yet."""
        words = str(error)
        if isinstance(error, Hidden):
            if self.flushed:
                raise UnsupportedOperation(f"layer={self.job.layer!r}: {words}") from error
            flush_torchscript(self.model)
            self.flushed = True
        elif "modified by an inplace operation" in words and not self.overwritten:
            self.overwritten = True
        elif "is a view and " in words and "modified inplace" in words and not self.apart:
            self.apart = True
        else:
            return False
        return True

    @contextlib.contextmanager
    def working(self) -> Iterator[Kept]:
        """Around the model's own code, which a backward may run again; the model is left as it was."""
        with kept(self.model) as held:
            yield held

    def first(self, images: Tensor) -> Tensor:
        with self.working() as held:
            return self.up(images, held)[1].detach()

    def up(self, images: Tensor, held: Kept) -> tuple[Tensor, Tensor]:
        """The images as a leaf of autograd's graph, and the layer's output, with the rules on what leads there."""
        job, outputs, spared = self.job, [], []

        def keep(output):
            # A copy: an in-place operation after the layer must not change what was kept.
            outputs.append(plain(output.clone()) if isinstance(output, Tensor) and not unusual(output) else output)

        with torch.enable_grad(), as_nodes(self.apart, spared):
            leaf = images.detach().clone().requires_grad_()
            given = leaf.clone()  # a copy: the model may work on its input in place
            if self.rows is not None:
                given = torch.cat([given, given[-1:].expand(self.rows - len(given), -1, -1, -1)])
            with observing(self.module, keep), held.watching(), self.saving():
                self.model(given)
            name = job.layer
            if not outputs:
                raise LayerNotFound(f"layer={name!r}: expected a layer that the model calls")
            if self.call is not None and self.call >= len(outputs):
                raise LayerNotFound(f"layer={name!r}: the model calls it {len(outputs)} times, from @0")
            output = outputs[-1 if self.call is None else self.call]
            if isinstance(output, Tensor) and (what := unusual(output)):
                raise UnsupportedOperation(f"layer={name!r} returns {what}; expected a layer that returns a plain tensor")
            if not isinstance(output, Tensor) or output.dim() not in (2, 4):
                what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ShapeError(f"layer={name!r} returns {what}: expected a tensor [N, C, H, W] or [N, F]")
            if self.rows is not None:
                output = output[: len(images)]
            reached = put_rules(output, leaf, job.rule, job.overlap, spared)
        if not reached:
            raise UnsupportedOperation(
                f"layer={name!r}: its output is cut off from the images; expected a model without no_grad() "
                "and detach()"
            )
        return leaf, output

    def saving(self) -> contextlib.AbstractContextManager:
        """Keeps copies of what autograd saves, for models that work in place on what their gradient needs."""
        if not self.overwritten:
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(_copied, lambda x: x)

    def run(self, begin: int, end: int, pixels: Tensor | None) -> Iterator[dict[str, Tensor]]:
        step = len(self.job.units) if end - begin > 1 else self.seeds_at_once()
        for first in range(0, len(self.job.units), step):
            units = range(first, min(first + step, len(self.job.units)))
            part = self.trying(lambda units=units: self.work(begin, end, units))
            if pixels is not None:
                pixels[first * (end - begin) :][: len(part["pixels"])] = part["pixels"]
            yield part

    def work(self, begin: int, end: int, units: range) -> dict[str, Tensor]:
        with self.working() as held:
            return self.part(begin, end, units, held)

    def part(self, begin: int, end: int, units: range, held: Kept) -> dict[str, Tensor]:
        """Some units, by their place in the job's, of images [begin, end)."""
        job = self.job
        leaf, output = self.up(job.images[begin:end], held)
        if output.shape[0] != end - begin:
            raise ShapeError(
                f"layer={job.layer!r} returns {tuple(output.shape)}: expected {end - begin} images first"
            )
        maps = output.detach()
        maps = maps[:, :, None, None] if maps.dim() == 2 else maps
        ids = job.units[units.start : units.stop]
        positions, seeds, reported = job.locate(maps, begin, units)
        n, u = reported.shape
        pixels = leaf.new_empty((n, u, *leaf.shape[1:]))
        rows = torch.arange(n, device=job.device)
        check_memory("the gradient", list(self.model.parameters()))  # which hooks may have freed since the forward
        for i, unit in enumerate(ids.tolist()):
            seed = torch.zeros_like(maps)
            if job.positions == "all":
                seed[:, unit] = job.seed_maps(maps[:, unit])
            else:
                at = positions[:, i]
                seed[rows, unit, at[:, 0], at[:, 1]] = seeds[:, i]
            with as_nodes(self.apart, []):  # checkpoints run again
                (g,) = torch.autograd.grad(
                    output, leaf, seed.reshape(output.shape), retain_graph=i + 1 < u, allow_unused=True
                )
            if g is not None and (what := unusual(g)):
                raise UnsupportedOperation(f"layer={job.layer!r}: its gradient is {what}; expected a plain tensor")
            pixels[:, i] = 0 if g is None else g
        height, width = leaf.shape[-2:]
        return {
            "pixels": pixels.flatten(0, 1),
            "boxes": numbers((0, 0, height, width), job.device).repeat(n * u, 1),
            "activations": reported.reshape(-1).clone(),
            "positions": positions.reshape(-1, 2),
            "images": (rows + begin).repeat_interleave(u),
            "units": job.here(ids).repeat(n),
        }


def _copied(x: Tensor) -> Tensor:
    """What autograd saves: a model may write to its buffers too, which are leaves as its parameters are."""
    return x if isinstance(x, nn.Parameter) else x.clone()
