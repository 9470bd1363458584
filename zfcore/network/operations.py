"""What each torch function and module is as a stage.

An operation takes the arguments of the torch function that it stands for, stages in place of the maps, and
returns a stage. What it cannot express it refuses with `Unknown`; a map that does not fit it refuses with
`ShapeError`.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfcore import ops
from zfcore.errors import ShapeError
from zfcore.network.geometry import Window, pair
from zfcore.network.stages import Rectifier, Stage

BATCH = 3  # the batch size that sizes are worked out for; any number above one would do
MAX_TAPS = 255  # a switch is one byte


class Unknown(Exception):
    """The operation, with these arguments, is not one that the engines know."""


def _stage(value: object, ranks: tuple[int, ...] | None = None) -> Stage:
    """`value`, which must be a stage; ranks: how many axes it may have besides the batch."""
    if not isinstance(value, Stage):
        raise Unknown("it does not read a map")
    if ranks is not None and len(value.shape) not in ranks:
        raise Unknown(f"it reads an input of {len(value.shape) + 1} axes")
    return value


def _parameter(value: object) -> Tensor | None:
    if value is not None and not isinstance(value, Tensor):
        raise Unknown("its parameters are computed from the image")
    return value


def _sliding(size: int, window: Window, axis: int, ceil_mode: bool = False) -> int:
    k, s, p, d = (value[axis] for value in window)
    spare = size + 2 * p - d * (k - 1) - 1
    if not ceil_mode:
        return spare // s + 1
    count = -(-spare // s) + 1
    return count - 1 if (count - 1) * s >= size + p else count  # no window starts in the far padding


def _slid(stage: Stage, window: Window, ceil_mode: bool = False) -> tuple[int, int]:
    size = tuple(_sliding(stage.shape[1 + a], window, a, ceil_mode) for a in (0, 1))
    if min(size) < 1:
        raise ShapeError(
            f"images: their map of {tuple(stage.shape[1:])} before this layer is smaller than its window "
            f"{window.kernel}; expected larger images"
        )
    return size


# ---- Filters -----------------------------------------------------------------------------------------------


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Stage:
    x = _stage(input, (3,))
    weight, bias = _parameter(weight), _parameter(bias)
    if weight is None or weight.dim() != 4:
        raise Unknown("its weight is not [K, C / groups, kh, kw]")
    stride, dilation, kernel = pair(stride), pair(dilation), tuple(weight.shape[2:])
    before = after = (0, 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = tuple(t // 2 for t in total)
        after = tuple(t - b for t, b in zip(total, before, strict=True))
    elif padding != "valid":
        before = after = pair(padding)
    if x.shape[0] != weight.shape[1] * groups:
        raise ShapeError(
            f"images: they give this layer {x.shape[0]} channels; it takes {weight.shape[1] * groups}"
        )
    window = Window(kernel, stride, before, dilation)
    wide = [n + a - b for n, a, b in zip(x.shape[1:], after, before, strict=True)]
    size = tuple(_sliding(n, window, axis) for axis, n in enumerate(wide))
    if min(size) < 1:
        raise ShapeError(
            f"images: their map of {tuple(x.shape[1:])} before this layer is smaller than its filters "
            f"{kernel}; "
            "expected larger images"
        )
    return Stage(
        kind="conv",
        inputs=[x],
        run=lambda x: F.conv2d(x, weight, bias, stride, padding, dilation, groups),
        shape=(len(weight), *size),
        window=window,
        options={
            "weight": lambda: weight,
            "bias": lambda: bias,
            "groups": int(groups),
            "even_padding": before == after,
        },
    )


def linear(input, weight, bias=None) -> Stage:
    x = _stage(input, (1,))
    weight, bias = _parameter(weight), _parameter(bias)
    if x.shape[0] != weight.shape[1]:
        raise ShapeError(f"images: they give this layer {x.shape[0]} features; it takes {weight.shape[1]}")
    return _whole([x], lambda x: F.linear(x, weight, bias), (len(weight),), matrix=lambda: weight)


def _whole(inputs: list[Stage], run: Callable[..., Tensor], shape: tuple[int, ...], **options) -> Stage:
    """An operation whose way down needs whole maps and is the plain gradient of `run`."""
    return Stage(kind="map", inputs=inputs, run=run, shape=tuple(shape), options=options)


# ---- Rectifiers and other functions of each value ----------------------------------------------------------


def _rectified(input, rectifier: Rectifier) -> Stage:
    x = _stage(input)
    return Stage(
        kind="relu", inputs=[x], run=rectifier.forward, shape=x.shape, options={"rectifier": rectifier}
    )


def relu(input) -> Stage:
    return _rectified(input, Rectifier(F.relu))


def relu6(input) -> Stage:
    return _rectified(input, Rectifier(F.relu6, upper=6.0))


def hardtanh(input, min_val=-1.0, max_val=1.0) -> Stage:
    if min_val != 0 or max_val <= 0:
        raise Unknown("it does not rectify at 0")
    return _rectified(input, Rectifier(lambda x: F.hardtanh(x, 0.0, max_val), upper=float(max_val)))


def clamp(input, min=None, max=None) -> Stage:
    if any(isinstance(limit, Tensor | Stage) for limit in (min, max)) or min is None or min != 0:
        raise Unknown("it does not rectify at 0")
    return relu(input) if max is None else hardtanh(input, 0.0, max)


def clamp_min(input, min) -> Stage:
    return clamp(input, min)


def threshold(input, threshold, value) -> Stage:
    if threshold != 0 or value != 0:
        raise Unknown("it does not rectify at 0")
    return relu(input)


def leaky_relu(input, negative_slope=0.01) -> Stage:
    if not 0 <= negative_slope <= 1:
        raise Unknown(f"its slope is {negative_slope}, not within 0 and 1")
    return _rectified(
        input, Rectifier(lambda x: F.leaky_relu(x, negative_slope), slope=float(negative_slope))
    )


def _pointwise(function: Callable[..., Tensor]) -> Callable[..., Stage]:
    def operation(input, *args, **kwargs) -> Stage:
        x = _stage(input)
        if any(isinstance(a, Tensor | Stage) for a in (*args, *kwargs.values())):
            raise Unknown
        return _whole([x], lambda x: function(x, *args, **kwargs), x.shape)

    return operation


def softmax(input, dim=None, _stacklevel=3, dtype=None) -> Stage:
    return _softmax(F.softmax, input, dim, dtype)


def log_softmax(input, dim=None, _stacklevel=3, dtype=None) -> Stage:
    return _softmax(F.log_softmax, input, dim, dtype)


def _softmax(function, input, dim, dtype) -> Stage:
    x = _stage(input)
    dim = 1 if dim is None and len(x.shape) == 1 else dim
    if dim is None or dtype is not None or _axis(x, dim) == 0:
        raise Unknown
    return _whole([x], lambda x: function(x, dim=dim), x.shape)


# ---- Pools -------------------------------------------------------------------------------------------------


def max_pool2d(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> Stage:
    x = _stage(input, (3,))
    window = _window(kernel_size, stride, padding, dilation)
    if return_indices:
        raise Unknown("it returns indices")
    if window.kernel[0] * window.kernel[1] > MAX_TAPS:
        raise Unknown(f"its window has more than {MAX_TAPS} taps")
    return Stage(
        kind="max_pool",
        inputs=[x],
        run=lambda x: ops.max_pool2d_with_switches(x, *window, bool(ceil_mode))[0],
        shape=(x.shape[0], *_slid(x, window, ceil_mode)),
        window=window,
        options={"ceil_mode": bool(ceil_mode)},
    )


def max_pool2d_with_switches(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    return max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode), Unknown(
        "switches are read by pools only"
    )


def avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
) -> Stage:
    x = _stage(input, (3,))
    window = _window(kernel_size, stride, padding, 1)

    def run(x):
        return F.avg_pool2d(
            x, window.kernel, window.stride, window.padding, ceil_mode, count_include_pad, divisor_override
        )

    def share(like: Tensor) -> Tensor:
        """[1, 1, Oh, Ow]: what each of a window's pixels counts. At the edge a window may divide by fewer."""
        ones = like.new_ones((1, 1, *x.shape[1:]))
        taps = F.avg_pool2d(ones, window.kernel, window.stride, window.padding, ceil_mode, True, 1)
        return run(ones) / taps

    shape = (x.shape[0], *_slid(x, window, ceil_mode))
    padded = window.padding != (0, 0) and not count_include_pad
    if divisor_override is not None or not (padded or ceil_mode):
        share = 1.0 / (divisor_override or window.kernel[0] * window.kernel[1])
    return Stage(kind="avg_pool", inputs=[x], run=run, shape=shape, window=window, options={"share": share})


def adaptive_avg_pool2d(input, output_size) -> Stage:
    return _adaptive(F.adaptive_avg_pool2d, input, output_size)


def adaptive_max_pool2d(input, output_size, return_indices=False) -> Stage:
    if return_indices:
        raise Unknown("it returns indices")
    return _adaptive(F.adaptive_max_pool2d, input, output_size)


def _adaptive(function, input, output_size) -> Stage:
    x = _stage(input, (3,))
    wanted = output_size if isinstance(output_size, tuple | list) else (output_size, output_size)
    size = tuple(int(w) if w is not None else n for w, n in zip(wanted, x.shape[1:], strict=True))
    if (
        function is F.adaptive_avg_pool2d
        and size != (1, 1)
        and not any(n % w for n, w in zip(x.shape[1:], size))
    ):
        kernel = tuple(n // w for n, w in zip(x.shape[1:], size, strict=True))
        return avg_pool2d(input, kernel)
    mean = function is F.adaptive_avg_pool2d and size == (1, 1)
    return _whole([x], lambda x: function(x, size), (x.shape[0], *size), mean=mean)


def _window(kernel_size, stride, padding, dilation) -> Window:
    kernel = pair(kernel_size)
    return Window(
        kernel,
        kernel if stride is None or stride in ((), []) else pair(stride),
        pair(padding),
        pair(dilation),
    )


# ---- Normalisation -----------------------------------------------------------------------------------------


def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Stage:
    x = _stage(input)
    if training or running_mean is None:
        raise Unknown("it normalises by the batch's own statistics")
    mean, var, weight, bias = map(_parameter, (running_mean, running_var, weight, bias))
    if len(mean) != x.shape[0]:
        raise ShapeError(f"images: they give this layer {x.shape[0]} channels; it takes {len(mean)}")

    def run(x):
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    if len(x.shape) != 3:
        return _whole([x], run, x.shape)

    def scale() -> Tensor:
        inverse = torch.rsqrt(var + eps)
        return inverse if weight is None else inverse * weight

    return Stage(kind="batch_norm", inputs=[x], run=run, shape=x.shape, options={"scale": scale})


def local_response_norm(input, size, alpha=1e-4, beta=0.75, k=1.0) -> Stage:
    x = _stage(input, (3,))
    return Stage(
        kind="lrn",
        inputs=[x],
        run=lambda x: F.local_response_norm(x, size, alpha, beta, k),
        shape=x.shape,
        options={"lrn": (int(size), float(alpha), float(beta), float(k))},
    )


def dropout(input, p=0.5, training=True) -> Stage:
    if training:  # F.dropout's own default, whatever the model's mode
        raise Unknown("it drops values in eval mode too")
    return _stage(input)


# ---- Arithmetic --------------------------------------------------------------------------------------------


def add(input, other, *, alpha=1) -> Stage:
    if alpha != 1:
        raise Unknown("it adds a multiple")
    if isinstance(input, Stage) and isinstance(other, Stage) and input.shape == other.shape:
        return Stage(kind="add", inputs=[input, other], run=torch.add, shape=input.shape)
    return _combined(torch.add, input, other, (1.0, 1.0))


def sub(input, other, *, alpha=1) -> Stage:
    if alpha != 1:
        raise Unknown("it subtracts a multiple")
    return _combined(torch.sub, input, other, (1.0, -1.0))


def rsub(input, other, *, alpha=1) -> Stage:
    return sub(other, input, alpha=alpha)


def mul(input, other) -> Stage:
    return _combined(torch.mul, input, other, (other, input))


def div(input, other, *, rounding_mode=None) -> Stage:
    if rounding_mode is not None:
        raise Unknown("it rounds")
    if isinstance(other, BatchSize) or (isinstance(other, int | float) and other == 0):
        raise Unknown(f"it divides by {other}")
    inverse = None if isinstance(other, Stage) else 1.0 / other
    return _combined(torch.div, input, other, (inverse, None))


def neg(input) -> Stage:
    return mul(input, -1.0)


def _combined(function, left, right, slopes) -> Stage:
    """function(left, right), elementwise; slopes: its derivatives where the other operand is a constant."""
    if isinstance(left, Stage) and isinstance(right, Stage):
        shape = torch.broadcast_shapes((BATCH, *left.shape), (BATCH, *right.shape))
        if len(left.shape) != len(right.shape):
            raise Unknown("its operands have different axes")
        return _whole([left, right], function, shape[1:])
    first = isinstance(left, Stage)
    x, constant, slope = (left, right, slopes[0]) if first else (right, left, slopes[1])
    if not isinstance(x, Stage) or isinstance(constant, BatchSize | bool | complex):
        raise Unknown
    if isinstance(constant, Tensor):
        shape = (BATCH, *x.shape)
        one = constant.dim() <= len(x.shape) or len(constant) == 1
        if not one or torch.broadcast_shapes(shape, constant.shape) != shape:
            raise Unknown("its constant is larger than the map")
        constant = constant.detach()
        if constant.dim() and not constant.is_floating_point():
            raise Unknown("its constant is not of floating point")

    def run(x):
        result = function(x, constant) if first else function(constant, x)
        if result.dtype != x.dtype:
            raise ShapeError(
                f"a constant of {constant.dtype} turns the map from {x.dtype} into {result.dtype}"
            )
        return result

    if slope is None:
        return _whole([x], run, x.shape)
    if isinstance(slope, Tensor):
        slope = slope.detach()
        by_channel = len(x.shape) == 3 and slope.dim() >= 3 and slope.shape[-2:] == (1, 1)
        if slope.dim() == 0:
            slope = float(slope)
        elif by_channel:
            slope = slope.reshape(-1, 1, 1).expand(x.shape[0], 1, 1)
        else:
            return _whole([x], run, x.shape)
    return Stage(kind="scale", inputs=[x], run=run, shape=x.shape, options={"factor": slope})


# ---- Shapes ------------------------------------------------------------------------------------------------


class BatchSize(int):
    """The number of images, or what follows from it.

    A stage serves any batch, so only sizes may depend on it.
    """

    def _compared(self, other, compare):
        if not isinstance(other, BatchSize):
            raise Unknown("the control flow depends on the batch size")
        return compare(int(self), int(other))


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "neg"):
    _plain = getattr(int, f"__{_name}__")
    setattr(BatchSize, f"__{_name}__", lambda *values, _plain=_plain: BatchSize(_plain(*values)))
for _name in ("lt", "le", "gt", "ge"):
    _compare = getattr(operator, _name)
    setattr(BatchSize, f"__{_name}__", lambda self, other, _compare=_compare: self._compared(other, _compare))


class Sizes(tuple):
    """A map's shape, the batch first."""

    def numel(self) -> int:
        return functools.reduce(operator.mul, self, 1)


def size(input, dim=None):
    sizes = Sizes((BatchSize(BATCH), *_stage(input).shape))
    return sizes if dim is None else sizes[dim]


def _axis(x: Stage, dim: int) -> int:
    """`dim` counted from the front, 0 being the batch."""
    return dim + len(x.shape) + 1 if dim < 0 else dim


def _reshaped(function: Callable[..., Tensor]) -> Callable[..., Stage]:
    """view, flatten and the like: what keeps the batch axis and the order of the values."""

    def operation(input, *args, **kwargs) -> Stage:
        x = _stage(input)
        try:
            result = function(torch.empty((BATCH, *x.shape), device="meta"), *args, **kwargs).shape
        except RuntimeError as error:
            raise ShapeError(
                f"images: their map {tuple(x.shape)} does not take this shape: {error}"
            ) from error
        if (
            len(result) < 2
            or result[0] != BATCH
            or torch.Size(result[1:]).numel() != torch.Size(x.shape).numel()
        ):
            raise Unknown("it does not keep the batch axis")
        tail = tuple(result[1:])
        if tail == x.shape:
            return Stage(kind="identity", inputs=[x], run=lambda x: x, shape=x.shape)
        return _whole([x], lambda x: x.reshape(len(x), *tail), tail, flat=len(tail) == 1)

    return operation


def copied(input, *, memory_format=None) -> Stage:
    x = _stage(input)
    return Stage(kind="identity", inputs=[x], run=lambda x: x, shape=x.shape)


def contiguous(input, *, memory_format=None) -> Stage:
    return copied(input)


def squeeze(input, *dims) -> Stage:
    if not dims:
        raise Unknown("it would squeeze a batch of one")
    return _reshaped(torch.squeeze)(input, *dims)


def getitem(input, index):
    if not isinstance(input, Stage):
        return operator.getitem(input, index)
    x, everything = _stage(input), slice(None)
    index = index if isinstance(index, tuple) else (index,)
    if index[:1] != (everything,):
        raise Unknown("it picks images")
    if not all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in index):
        raise Unknown("it picks by what is no number")
    if any(
        isinstance(part, BatchSize)
        for i in index
        if isinstance(i, slice)
        for part in (i.start, i.stop, i.step)
    ):
        raise Unknown("it picks by the batch size")
    if all(i is None or i == everything or (isinstance(i, int) and i in (0, -1)) for i in index):
        with contextlib.suppress(Unknown):
            return _reshaped(operator.getitem)(
                x, index
            )  # [:, :, None, None], and [:, :, 0, 0] of a 1 x 1 map
    shape = torch.empty((BATCH, *x.shape), device="meta")[index].shape
    if 0 in shape:
        raise Unknown("it picks nothing")
    return _whole([x], lambda x: x[index], shape[1:])


def split(input, split_size_or_sections, dim=0) -> tuple[Stage, ...]:
    return _parts(torch.split, input, split_size_or_sections, dim)


def chunk(input, chunks, dim=0) -> tuple[Stage, ...]:
    return _parts(torch.chunk, input, chunks, dim)


def _parts(function, input, sections, dim) -> tuple[Stage, ...]:
    x = _stage(input)
    axis = _axis(x, dim)
    if axis == 0:
        raise Unknown("it splits the batch axis")
    lengths = [
        part.shape[axis] for part in function(torch.empty((BATCH, *x.shape), device="meta"), sections, axis)
    ]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]

    def part(start: int, length: int) -> Stage:
        shape = (*x.shape[: axis - 1], length, *x.shape[axis:])
        return _whole([x], lambda x: x.narrow(axis, start, length), shape)

    return tuple(map(part, starts, lengths))


def permute(input, *dims) -> Stage:
    x = _stage(input)
    dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    if _axis(x, dims[0]) != 0:
        raise Unknown("it moves the batch axis")
    shape = torch.empty((BATCH, *x.shape), device="meta").permute(dims).shape
    return _whole([x], lambda x: x.permute(dims), shape[1:])


def transpose(input, dim0, dim1) -> Stage:
    x = _stage(input)
    if 0 in (_axis(x, dim0), _axis(x, dim1)):
        raise Unknown("it moves the batch axis")
    shape = torch.empty((BATCH, *x.shape), device="meta").transpose(dim0, dim1).shape
    return _whole([x], lambda x: x.transpose(dim0, dim1), shape[1:])


def expand_as(input, other) -> Stage:
    return expand(input, *size(other))


def expand(input, *sizes) -> Stage:
    x = _stage(input)
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    if len(sizes) != len(x.shape) + 1 or not (isinstance(sizes[0], BatchSize) or sizes[0] == -1):
        raise Unknown("it changes the batch axis")
    shape = torch.empty((BATCH, *x.shape), device="meta").expand(sizes).shape[1:]
    return _whole([x], lambda x: x.expand(len(x), *shape), shape)


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Stage]:
    def operation(input, dim=None, keepdim=False, *, dtype=None) -> Stage:
        x = _stage(input)
        dims = [dim] if isinstance(dim, int) else dim
        if not dims or dtype is not None or any(_axis(x, d) == 0 for d in dims):
            raise Unknown("it reduces the batch axis too")
        dims = tuple(int(d) for d in dims)
        shape = function(torch.empty((BATCH, *x.shape), device="meta"), dims, keepdim).shape
        mean = function is torch.mean and len(x.shape) == 3 and {_axis(x, d) for d in dims} == {2, 3}
        return _whole([x], lambda x: function(x, dims, keepdim), shape[1:], mean=mean)

    return operation


def cat(tensors, dim=0) -> Stage:
    if not isinstance(tensors, tuple | list) or not all(isinstance(t, Stage) for t in tensors):
        raise Unknown("it joins other things than maps")
    axis = _axis(tensors[0], dim)
    if axis == 0:
        raise Unknown("it joins along the batch axis")
    shape = torch.cat([torch.empty((BATCH, *t.shape), device="meta") for t in tensors], axis).shape[1:]
    if axis == 1 and len(shape) == 3:
        return Stage(
            kind="cat", inputs=list(tensors), run=lambda *maps: torch.cat(maps, 1), shape=tuple(shape)
        )
    return _whole(list(tensors), lambda *maps: torch.cat(maps, axis), shape)


def pad(input, pad, mode="constant", value=None) -> Stage:
    x = _stage(input, (3,))
    if mode != "constant" or value not in (None, 0) or len(pad) not in (2, 4):
        raise Unknown("it pads with other values than zeros")
    left, right, top, bottom = (*map(int, pad), 0, 0)[:4]
    height, width = x.shape[1] + top + bottom, x.shape[2] + left + right
    if height < 1 or width < 1:
        raise ShapeError(f"images: their map {tuple(x.shape)} is smaller than what {tuple(pad)} crops")
    return Stage(
        kind="pad",
        inputs=[x],
        run=lambda x: F.pad(x, (left, right, top, bottom)),
        shape=(x.shape[0], height, width),
        window=Window((1, 1), (1, 1), (top, left), (1, 1)),
    )


# ---- The tables --------------------------------------------------------------------------------------------

_view, _flatten, _unsqueeze = _reshaped(Tensor.reshape), _reshaped(torch.flatten), _reshaped(torch.unsqueeze)
_mean, _sum = _reduced(torch.mean), _reduced(torch.sum)

FUNCTIONS: dict[Callable, Callable] = {
    F.conv2d: conv2d, torch.conv2d: conv2d, F.linear: linear,
    F.relu: relu, F.relu_: relu, torch.relu: relu, torch.relu_: relu, F.relu6: relu6,
    F.hardtanh: hardtanh, F.hardtanh_: hardtanh, F.threshold: threshold, torch.threshold: threshold,
    F.threshold_: threshold, torch.threshold_: threshold, F.leaky_relu: leaky_relu, F.leaky_relu_: leaky_relu,
    torch.clamp: clamp, torch.clip: clamp, torch.clamp_: clamp, torch.clip_: clamp,
    torch.clamp_min: clamp_min, torch.clamp_min_: clamp_min,
    F.max_pool2d: max_pool2d, torch.max_pool2d: max_pool2d, F.avg_pool2d: avg_pool2d,
    ops.max_pool2d_with_switches: max_pool2d_with_switches,
    F.adaptive_avg_pool2d: adaptive_avg_pool2d, F.adaptive_max_pool2d: adaptive_max_pool2d,
    F.batch_norm: batch_norm, F.local_response_norm: local_response_norm,
    F.dropout: dropout, F.dropout1d: dropout, F.dropout2d: dropout, F.alpha_dropout: dropout,
    F.feature_alpha_dropout: dropout, torch.dropout: lambda input, p, train: dropout(input, p, train),
    operator.add: add, operator.iadd: add, torch.add: add, operator.sub: sub, operator.isub: sub,
    torch.sub: sub,
    torch.subtract: sub, torch.rsub: rsub, operator.mul: mul, operator.imul: mul, torch.mul: mul,
    torch.multiply: mul,
    operator.truediv: div, operator.itruediv: div, torch.div: div, torch.divide: div, torch.true_divide: div,
    operator.neg: neg, torch.neg: neg, operator.getitem: getitem,
    torch.flatten: _flatten, torch.reshape: _view, torch.squeeze: squeeze, torch.unsqueeze: _unsqueeze,
    torch.permute: permute, torch.transpose: transpose, torch.mean: _mean, torch.sum: _sum,
    torch.amax: _reduced(torch.amax),
    torch.split: split, torch.chunk: chunk, torch.cat: cat, torch.concat: cat, torch.concatenate: cat,
    F.pad: pad,
    F.softmax: softmax, F.log_softmax: log_softmax,
    torch.softmax: lambda input, dim, dtype=None: softmax(input, dim, dtype=dtype),
    torch.log_softmax: lambda input, dim, dtype=None: log_softmax(input, dim, dtype=dtype),
    torch.clone: copied,
}  # fmt: skip
_POINTWISE = (
    torch.sigmoid, F.sigmoid, torch.tanh, F.tanh, F.silu, F.gelu, F.elu, F.selu, F.celu, F.softplus,
    F.softsign,
    F.hardsigmoid, F.hardswish, F.mish, F.logsigmoid, torch.exp, torch.sqrt, torch.square, torch.abs,
)  # fmt: skip
for _function in _POINTWISE:
    FUNCTIONS[_function] = _pointwise(_function)

METHODS: dict[str, Callable] = {
    "relu": relu, "relu_": relu, "clamp": clamp, "clamp_": clamp, "clip": clamp, "clip_": clamp,
    "clamp_min": clamp_min, "clamp_min_": clamp_min, "add": add, "add_": add, "sub": sub, "sub_": sub,
    "mul": mul, "mul_": mul, "div": div, "div_": div, "neg": neg,
    "size": size, "dim": lambda x: len(x.shape) + 1, "is_floating_point": lambda x: True,
    "view": _view, "reshape": _view, "flatten": _flatten, "squeeze": squeeze, "unsqueeze": _unsqueeze,
    "split": split, "chunk": chunk, "permute": permute, "transpose": transpose,
    "expand": expand, "expand_as": expand_as,
    "view_as": lambda x, other: _view(x, size(other)), "reshape_as": lambda x, other: _view(x, size(other)),
    "mean": _mean, "sum": _sum, "amax": FUNCTIONS[torch.amax], "contiguous": contiguous, "clone": copied,
    "softmax": FUNCTIONS[torch.softmax], "log_softmax": FUNCTIONS[torch.log_softmax],
}  # fmt: skip
for _name in ("sigmoid", "tanh", "exp", "sqrt", "square", "abs"):
    METHODS[_name] = METHODS[f"{_name}_"] = FUNCTIONS[getattr(torch, _name)]

# Their result may share memory with what they read.
VIEWS = frozenset(
    (_view, _flatten, _unsqueeze, squeeze, getitem, split, chunk, permute, transpose, expand, expand_as,
     contiguous,
     METHODS["view_as"], METHODS["reshape_as"])
)  # fmt: skip
IN_PLACE_FUNCTIONS = frozenset(
    (operator.iadd, operator.isub, operator.imul, operator.itruediv, F.relu_, torch.relu_, F.hardtanh_,
    F.threshold_,
     torch.threshold_, F.leaky_relu_, torch.clamp_, torch.clip_, torch.clamp_min_)
)  # fmt: skip


def _conv_module(x, m):
    if m.padding_mode != "zeros":
        raise Unknown(f"padding_mode={m.padding_mode!r}")
    return conv2d(x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)


def _batch_norm_module(x, m):
    return batch_norm(
        x, m.running_mean, m.running_var, m.weight, m.bias, m.running_mean is None, m.momentum, m.eps
    )


def _pointwise_module(function, *names):
    operation = _pointwise(function)
    return lambda x, m: operation(x, **{name: getattr(m, name) for name in names})


def _unchanged(x, m):
    return _stage(x)


MODULES: dict[type, Callable] = {
    nn.Conv2d: _conv_module,
    nn.Linear: lambda x, m: linear(x, m.weight, m.bias),
    nn.ReLU: lambda x, m: relu(x),
    nn.ReLU6: lambda x, m: relu6(x),
    nn.Hardtanh: lambda x, m: hardtanh(x, m.min_val, m.max_val),
    nn.Threshold: lambda x, m: threshold(x, m.threshold, m.value),
    nn.LeakyReLU: lambda x, m: leaky_relu(x, m.negative_slope),
    nn.MaxPool2d: lambda x, m: max_pool2d(
        x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.AvgPool2d: lambda x, m: avg_pool2d(
        x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d: lambda x, m: adaptive_avg_pool2d(x, m.output_size),
    nn.AdaptiveMaxPool2d: lambda x, m: adaptive_max_pool2d(x, m.output_size, m.return_indices),
    nn.BatchNorm1d: _batch_norm_module,
    nn.BatchNorm2d: _batch_norm_module,
    nn.SyncBatchNorm: _batch_norm_module,
    nn.LocalResponseNorm: lambda x, m: local_response_norm(x, m.size, m.alpha, m.beta, m.k),
    nn.Flatten: lambda x, m: _flatten(x, m.start_dim, m.end_dim),
    nn.Unflatten: lambda x, m: _reshaped(torch.unflatten)(x, m.dim, m.unflattened_size),
    nn.ZeroPad2d: lambda x, m: pad(x, m.padding),
    nn.Softmax: lambda x, m: softmax(x, m.dim),
    nn.Softmax2d: lambda x, m: softmax(_stage(x, (3,)), 1),
    nn.LogSoftmax: lambda x, m: log_softmax(x, m.dim),
    nn.Sigmoid: _pointwise_module(torch.sigmoid),
    nn.Tanh: _pointwise_module(torch.tanh),
    nn.SiLU: _pointwise_module(F.silu),
    nn.Mish: _pointwise_module(F.mish),
    nn.GELU: _pointwise_module(F.gelu, "approximate"),
    nn.ELU: _pointwise_module(F.elu, "alpha"),
    nn.CELU: _pointwise_module(F.celu, "alpha"),
    nn.SELU: _pointwise_module(F.selu),
    nn.Softplus: _pointwise_module(F.softplus, "beta", "threshold"),
    nn.Softsign: _pointwise_module(F.softsign),
    nn.LogSigmoid: _pointwise_module(F.logsigmoid),
    nn.Hardsigmoid: _pointwise_module(F.hardsigmoid),
    nn.Hardswish: _pointwise_module(F.hardswish),
    nn.Identity: _unchanged,
    nn.Dropout: _unchanged,
    nn.Dropout1d: _unchanged,
    nn.Dropout2d: _unchanged,
    nn.AlphaDropout: _unchanged,
    nn.FeatureAlphaDropout: _unchanged,
}


def operation_of_module(module: nn.Module) -> Callable[[Stage, nn.Module], Stage] | None:
    """What reads a module of this class.

    A subclass that computes something else is not known by its parent's name.
    """
    if "forward" in vars(module):
        return None
    own = type(module)
    for base in own.__mro__:
        if base in MODULES:
            same = own.forward is base.forward
            if same and issubclass(base, nn.Conv2d):
                same = own._conv_forward is base._conv_forward
            return MODULES[base] if same else None
    return None


# Operations whose way down has a rule of its own: what the dense path replaces as they happen.
_RULED = frozenset(
    (relu, relu6, hardtanh, threshold, leaky_relu, clamp, clamp_min, max_pool2d, local_response_norm)
)
_RULED_CALLS = {f: operation for f, operation in FUNCTIONS.items() if operation in _RULED} | {
    getattr(Tensor, name): operation for name, operation in METHODS.items() if operation in _RULED
}


def rule_of_call(function: Callable, args: tuple, kwargs: dict) -> tuple[Stage | None, bool]:
    """The stage that a call of a torch function on tensors would be, and whether it works in place.

    None for an operation whose way down is its plain gradient.
    """
    operation = _RULED_CALLS.get(function)
    x = args[0] if args else kwargs.get("input")
    if operation is None or not isinstance(x, Tensor):
        return None, False
    known = {name: value for name, value in kwargs.items() if name not in ("inplace", "input")}
    try:
        shape = x.shape[1:] if x.dim() > 3 else x.shape  # a pool takes one map without a batch axis too
        stage = operation(Stage(kind="input", shape=tuple(shape)), *args[1:], **known)
    except (Unknown, ShapeError):  # a clamp that does not rectify, a pool that returns indices
        return None, False
    return stage, bool(kwargs.get("inplace")) or function.__name__.endswith("_")
