"""The dense path: networks that cannot be read, on whole maps, by autograd and a mode that applies the rules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zfcore.engine.job import Job, scratch_bytes, times
from zfcore.engine.numbers import numbers
from zfcore.errors import ArgumentError, LayerNotFound, ShapeError, UnsupportedOperation
from zfcore.network import observing
from zfcore.ops import max_pool2d_with_switches, unpool2d


class _Rectify(torch.autograd.Function):
    """A member of the ReLU family, with a rule for its way down."""

    @staticmethod
    def forward(ctx, z, rectifier, rule):
        ctx.rectifier, ctx.rule = rectifier, rule
        if rule != "deconvnet":
            ctx.save_for_backward(rectifier.derivative(z))
        return rectifier.forward(z)

    @staticmethod
    def backward(ctx, g):
        if ctx.rule != "gradient":
            g = ctx.rectifier.rectify(g)
        if ctx.rule != "deconvnet":
            g = times(g, ctx.saved_tensors[0])
        return g, None, None


class _PassOver(torch.autograd.Function):
    """Contrast normalisation on the way up, nothing on the way down."""

    @staticmethod
    def forward(ctx, x, run):
        return run(x)

    @staticmethod
    def backward(ctx, g):
        return g, None


class _PoolLast(torch.autograd.Function):
    """Max-pooling whose way down keeps the last of the windows that name one place."""

    @staticmethod
    def forward(ctx, x, window, ceil_mode):
        y, switches = max_pool2d_with_switches(
            x, window.kernel, window.stride, window.padding, window.dilation, ceil_mode
        )
        ctx.window, ctx.size = window, x.shape[-2:]
        ctx.save_for_backward(switches)
        return y

    @staticmethod
    def backward(ctx, g):
        w = ctx.window
        return (
            unpool2d(g, *ctx.saved_tensors, w.kernel, w.stride, w.padding, w.dilation, ctx.size, "last"),
            None, None,
        )  # fmt: skip


class _Rules(TorchFunctionMode):
    """Applies the rules to each operation as it happens, in this thread only and with no hooks."""

    def __init__(self, rule: str, overlap: str):
        super().__init__()
        self.rule, self.overlap = rule, overlap

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.overlap == "last" and function in _POOLS:
            return self.pool(function, args, kwargs)
        stage, in_place = rule_of_call(function, args, kwargs)
        x = args[0] if args else kwargs.get("input")
        if stage is None or not isinstance(x, Tensor):
            return function(*args, **kwargs)
        if stage.kind == "relu":
            if not in_place:
                return _Rectify.apply(x, stage.options["rectifier"], self.rule)
            return x.copy_(_Rectify.apply(x.clone(), stage.options["rectifier"], self.rule))
        if stage.kind == "lrn":
            return _PassOver.apply(x, stage.run)
        return function(*args, **kwargs)

    @staticmethod
    def pool(function, args, kwargs):
        """A pool whose way down keeps the last, and the indices or switches that the function returns."""
        plain = {name: value for name, value in kwargs.items() if name != "return_indices"}
        stage, _ = rule_of_call(F.max_pool2d, args, plain)
        if stage is None:
            raise ArgumentError(
                "overlap='last': expected windows of at most 255 taps; the model's are larger"
            )
        pooled = _PoolLast.apply(
            args[0] if args else kwargs["input"], stage.window, stage.options["ceil_mode"]
        )
        return pooled if function in _PLAIN_POOLS else (pooled, function(*args, **kwargs)[1])


_PLAIN_POOLS = (F.max_pool2d, torch.max_pool2d)
_POOLS = (*_PLAIN_POOLS, F.max_pool2d_with_indices, max_pool2d_with_switches)


class Dense:
    """Whole maps and autograd: for networks that cannot be read.

    The layer's output comes from a hook on it alone.
    """

    def __init__(self, job: Job, name: str, call: int | None):
        self.job, self.call = job, call
        self.overwritten = False  # whether the model works in place on what autograd saved
        for path, module in job.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise UnsupportedOperation(
                    f"'{path or type(job.model).__name__}' is a TorchScript module, whose operations cannot "
                    "be seen; "
                    "expected a model of Python modules"
                )
        self.module = job.model.get_submodule(name)
        images = job.images[:1] if len(job.images) else job.images.new_zeros((1, *job.images.shape[1:]))
        output = self.up(images)[1]
        self.layer_shape, self.layer_dtype = tuple(output.shape[1:]), output.dtype
        self.picture_shape = tuple(job.images.shape[1:])

    def seeds_at_once(self) -> int:
        if self.job.batch_size is not None:
            return self.job.batch_size
        pixels = torch.Size(self.job.images.shape[1:]).numel()
        return max(1, scratch_bytes(self.job.device) // (pixels * self.job.images.element_size()))

    def image_batches(self) -> Iterator[tuple[int, int]]:
        step = max(1, min(8, self.seeds_at_once() // len(self.job.units)))
        for begin in range(0, len(self.job.images), step):
            yield begin, min(begin + step, len(self.job.images))

    def up(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The images as a leaf of autograd's graph, and the layer's output."""
        job, outputs = self.job, []

        def keep(output):
            # A copy: an in-place operation after the layer must not change what was kept.
            outputs.append(output.clone() if isinstance(output, Tensor) else output)

        # A model that draws random numbers in eval mode does not move the caller's generators.
        devices = [job.device] if job.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices):
            leaf = images.detach().clone().requires_grad_()
            with observing(self.module, keep), _Rules(job.rule, job.overlap), self.saving():
                job.model(leaf.clone())  # a copy: the model may work on its input in place
        name = self.job.layer
        if not outputs:
            raise LayerNotFound(f"layer={name!r}: expected a layer that the model calls")
        if self.call is not None and self.call >= len(outputs):
            raise LayerNotFound(f"layer={name!r}: the model calls it {len(outputs)} times, from @0")
        output = outputs[-1 if self.call is None else self.call]
        if not isinstance(output, Tensor) or output.dim() not in (2, 4):
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ShapeError(f"layer={name!r} returns {what}: expected a tensor [N, C, H, W] or [N, F]")
        if not output.requires_grad:
            raise UnsupportedOperation(
                f"layer={name!r}: its output is cut off from the images; expected a model without no_grad() "
                "and detach()"
            )
        return leaf, output

    def saving(self) -> contextlib.AbstractContextManager:
        """Keeps copies of what autograd saves, for models that work in place on what their gradient needs."""
        if not self.overwritten:
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(lambda x: x if x.is_leaf else x.clone(), lambda x: x)

    def run(self, begin: int, end: int, pixels: Tensor | None) -> Iterator[dict[str, Tensor]]:
        step = len(self.job.units) if end - begin > 1 else self.seeds_at_once()
        for first in range(0, len(self.job.units), step):
            units = range(first, min(first + step, len(self.job.units)))
            try:
                part = self.part(begin, end, units)
            except RuntimeError as error:
                if self.overwritten or "modified by an inplace operation" not in str(error):
                    raise
                self.overwritten = True
                part = self.part(begin, end, units)
            if pixels is not None:
                pixels[first * (end - begin) :][: len(part["pixels"])] = part["pixels"]
            yield part

    def part(self, begin: int, end: int, units: range) -> dict[str, Tensor]:
        """Some units, by their place in the job's, of images [begin, end)."""
        job = self.job
        leaf, output = self.up(job.images[begin:end])
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
        for i, unit in enumerate(ids.tolist()):
            seed = torch.zeros_like(maps)
            if job.positions == "all":
                seed[:, unit] = job.seed_maps(maps[:, unit])
            else:
                at = positions[:, i]
                seed[rows, unit, at[:, 0], at[:, 1]] = seeds[:, i]
            (g,) = torch.autograd.grad(
                output, leaf, seed.reshape(output.shape), retain_graph=i + 1 < u, allow_unused=True
            )
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
