"""What each ATen operation is as a stage, where the engines know more of it than its result.

An operation takes the arguments of the ATen function that it stands for, stages in place of the maps, and returns a
stage. What it cannot express it refuses with `Unknown`, and it may still be read as an operation on whole maps
(whole.py); a map that does not fit it refuses with `ShapeError`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zfcore import ops
from zfcore.errors import ShapeError
from zfcore.network.geometry import Window, pair
from zfcore.network.stages import Rectifier, Stage
from zfcore.network.values import JUMPING, Loose, Picked, Unknown, Unread

MAX_TAPS = 255  # a switch is one byte


def stage_of(value: object, ranks: tuple[int, ...] | None = None) -> Stage:
    """`value`, which must be a stage; ranks: how many axes it may have besides the batch."""
    if isinstance(value, Picked):
        value = as_stage(value)
    if not isinstance(value, Stage):
        raise Unknown("it does not read a map")
    if ranks is not None and len(value.shape) not in ranks:
        raise Unknown(f"it reads an input of {len(value.shape) + 1} axes")
    return value


def _parameter(value: object) -> Tensor | None:
    if value is not None and not isinstance(value, Tensor):
        raise Unknown("its parameters are computed from the image")
    return value


def _check_length(name: str, vector: Tensor | None, *lengths: int) -> None:
    if vector is not None and vector.dim() == 1 and len(vector) not in lengths:
        raise ShapeError(f"its {name} has {len(vector)} values; expected {lengths[0]}")


_COMPUTED = (Stage, Picked, Loose, Unread)


def _read(*values: object) -> bool:
    """Whether any of the values is computed from the images."""
    return any(isinstance(value, _COMPUTED) for value in values)


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
    x = stage_of(input, (3,))
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
    _check_length("bias", bias, len(weight))
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


def convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups, *rest) -> Stage:
    if transposed:
        raise Unknown
    return conv2d(input, weight, bias, stride, padding, dilation, groups)


def linear(input, weight, bias=None) -> Stage:
    x = stage_of(input)
    weight, bias = _parameter(weight), _parameter(bias)
    if not x.shape or weight.dim() != 2:
        raise Unknown
    if x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"images: they give this layer {x.shape[-1]} features; it takes {weight.shape[1]}")
    _check_length("bias", bias, len(weight), 1)
    shape = (*x.shape[:-1], len(weight))
    return whole([x], lambda x: F.linear(x, weight, bias), shape, matrix=lambda: weight, bias=lambda: bias)


def whole(inputs: list[Stage], run: Callable[..., Tensor], shape: tuple[int, ...], **options) -> Stage:
    """An operation whose way down needs whole maps and is the plain gradient of `run`."""
    return Stage(kind="map", inputs=inputs, run=run, shape=tuple(shape), options=options)


# ---- Rectifiers and other functions of each value ----------------------------------------------------------


def _rectified(input, rectifier: Rectifier) -> Stage:
    x = stage_of(input)
    return Stage(
        kind="relu", inputs=[x], run=rectifier.forward, shape=x.shape, options={"rectifier": rectifier}
    )


def relu(self) -> Stage:
    x = stage_of(self)
    absolute = (x.options.get("native") or ("",))[0] == "abs"
    return _rectified(x, Rectifier(F.relu, idle=absolute))


def relu6(self) -> Stage:
    return _rectified(self, Rectifier(F.relu6, upper=6.0))


def hardtanh(self, min_val=-1.0, max_val=1.0) -> Stage:
    if min_val != 0 or max_val <= 0:
        return pointwise(self, lambda x: torch.ops.aten.hardtanh(x, min_val, max_val))
    return _rectified(self, Rectifier(lambda x: F.hardtanh(x, 0.0, max_val), upper=float(max_val)))


def clamp(self, min=None, max=None) -> Stage:
    if _read(min, max) or isinstance(min, Tensor) or isinstance(max, Tensor):
        raise Unknown
    if min is None or min != 0 or (max is not None and max <= 0):
        return pointwise(self, lambda x: torch.clamp(x, min, max))
    return relu(self) if max is None else hardtanh(self, 0.0, max)


def clamp_min(self, min) -> Stage:
    return clamp(self, min)


def clamp_max(self, max) -> Stage:
    return clamp(self, None, max)


def threshold(self, threshold, value) -> Stage:
    if threshold != 0 or value != 0:
        return pointwise(self, lambda x: F.threshold(x, threshold, value))
    return relu(self)


def leaky_relu(self, negative_slope=0.01) -> Stage:
    if not 0 <= negative_slope <= 1:
        return pointwise(self, lambda x: F.leaky_relu(x, negative_slope))
    return _rectified(self, Rectifier(lambda x: F.leaky_relu(x, negative_slope), slope=float(negative_slope)))


def pointwise(input, function: Callable[[Tensor], Tensor], native: tuple[str, float, float] | None = None) -> Stage:
    x = stage_of(input)
    options = {"function": function, "native": native}
    return Stage(kind="pointwise", inputs=[x], run=function, shape=x.shape, options=options)


def glu(self, dim=-1) -> Stage:
    """Half of the channels, times the other half's sigmoid."""
    x = stage_of(self, (3,))
    if dim not in (1, -3):
        raise Unknown
    value, gate = (as_stage(Picked(x, half)) for half in torch.arange(x.shape[0], device="cpu").chunk(2))
    return mul(value, RULES["sigmoid"](gate))


def prelu(self, weight) -> Stage:
    x, weight = stage_of(self, (3,)), _parameter(weight)
    return pointwise(x, lambda x: F.prelu(x, weight))


def prelu_kernel(self, weight) -> Stage:
    """What prelu calls, with slopes that are laid over the map."""
    x, weight = stage_of(self), _parameter(weight)
    if weight.dim() > len(x.shape) + 1 or (weight.dim() == len(x.shape) + 1 and len(weight) != 1):
        raise Unknown
    return pointwise(x, lambda x: torch.ops.aten._prelu_kernel(x, weight))


def _each(name: str, native: Callable[..., tuple[str, float, float] | None] = lambda *a: None):
    """A function of each value that takes numbers besides."""
    function = getattr(torch.ops.aten, name)

    def operation(self, *args, **kwargs) -> Stage:
        if _read(*args, *kwargs.values()) or any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
            raise Unknown
        stage = pointwise(self, lambda x: function(x, *args, **kwargs), native(*args, *kwargs.values()))
        if name in JUMPING:
            stage.options["jumps"] = name
        return stage

    return operation


def _named(name: str, *defaults: float):
    """The native kernel's name for a function, and its parameters."""

    def native(*args):
        given = [float(a) for a in args] + list(defaults[len(args) :])
        a, b = (*given, 0.0, 0.0)[:2]
        return name, a, b

    return native


def _elu_native(alpha=1.0, scale=1.0, input_scale=1.0):
    return ("elu", float(alpha), 0.0) if scale == 1 and input_scale == 1 else None


def _gelu_native(approximate="none"):
    return ("gelu" if approximate == "none" else "gelu_tanh", 0.0, 0.0)


def _pow_native(exponent):
    return ("square", 0.0, 0.0) if exponent == 2 else None


POINTWISE: dict[str, Callable] = {
    "sigmoid": _named("sigmoid"), "tanh": _named("tanh"), "silu": _named("silu"), "hardswish": _named("hardswish"),
    "hardsigmoid": _named("hardsigmoid"), "gelu": _gelu_native, "mish": _named("mish"),
    "softplus": _named("softplus", 1.0, 20.0), "elu": _elu_native, "exp": _named("exp"), "square": _named("square"),
    "abs": _named("abs"), "sqrt": _named("sqrt"), "pow": _pow_native,
}  # fmt: skip
POINTWISE |= {
    name: lambda *args: None
    for name in (
        "log_sigmoid", "celu", "selu", "hardshrink", "softshrink", "reciprocal", "rsqrt",
        "log", "log1p", "log2", "log10", "expm1", "exp2", "sin", "cos", "tan", "atan", "asinh", "sinh", "cosh", "erf",
        "float_power", "sign", "sgn", "floor", "ceil", "round", "trunc", "frac", "nan_to_num", "logit", "digamma", "lgamma",
        "erfc", "special_erfcx", "i0", "sinc", "absolute", "special_expit", "special_exp2", "special_log1p",
    )
}  # fmt: skip


def rrelu(self, lower=1 / 8, upper=1 / 3, training=False, generator=None) -> Stage:
    if training:
        raise Unknown("it draws its slopes in eval mode too")
    return pointwise(self, lambda x: F.rrelu(x, lower, upper))


# ---- Pools -------------------------------------------------------------------------------------------------


def max_pool2d(self, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False) -> Stage:
    x = stage_of(self, (3,))
    window = _window(kernel_size, stride, padding, dilation)
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


def max_pool2d_with_indices(self, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    return max_pool2d(self, kernel_size, stride, padding, dilation, ceil_mode), Unknown("it reads the indices of a pool")


def avg_pool2d(
    self, kernel_size, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
) -> Stage:
    x = stage_of(self, (3,))
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


def adaptive_avg_pool2d(self, output_size) -> Stage:
    return _adaptive(F.adaptive_avg_pool2d, self, output_size)


def adaptive_max_pool2d(self, output_size):
    pooled = _adaptive(F.adaptive_max_pool2d, self, output_size)
    return pooled, Unknown("it reads the indices of a pool")


def _adaptive(function, input, output_size) -> Stage:
    x = stage_of(input, (3,))
    size = pair(output_size)
    if (
        function is F.adaptive_avg_pool2d
        and size != (1, 1)
        and not any(n % w for n, w in zip(x.shape[1:], size, strict=True))
    ):
        kernel = tuple(n // w for n, w in zip(x.shape[1:], size, strict=True))
        return x if kernel == (1, 1) else avg_pool2d(x, kernel)
    mean = function is F.adaptive_avg_pool2d and size == (1, 1)
    return whole([x], lambda x: function(x, size), (x.shape[0], *size), mean=mean)


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
    input, weight, bias, running_mean, running_var, training=False, momentum=0.1, eps=1e-5, cudnn_enabled=True
) -> Stage:
    x = stage_of(input)
    if training or running_mean is None:
        raise Unknown("it normalises by the batch's own statistics")
    mean, var, weight, bias = map(_parameter, (running_mean, running_var, weight, bias))
    if len(mean) != x.shape[0]:
        raise ShapeError(f"images: they give this layer {x.shape[0]} channels; it takes {len(mean)}")
    for name, vector in (("variance", var), ("weight", weight), ("bias", bias)):
        _check_length(name, vector, len(mean))

    def run(x):
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    if len(x.shape) != 3:
        return whole([x], run, x.shape)

    def scale() -> Tensor:
        inverse = torch.rsqrt(var + eps)
        return inverse if weight is None else inverse * weight

    return Stage(kind="batch_norm", inputs=[x], run=run, shape=x.shape, options={"scale": scale})


def batch_norm_no_training(input, weight, bias, running_mean, running_var, momentum, eps):
    """What an exported program calls; it returns the batch's mean and deviation, of which there are none."""
    normed = batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps)
    return normed, Unknown("it reads the batch's statistics"), Unknown("it reads the batch's statistics")


def local_response_norm(input, size, alpha=1e-4, beta=0.75, k=1.0) -> Stage:
    x = stage_of(input, (3,))
    return Stage(
        kind="lrn",
        inputs=[x],
        run=lambda x: F.local_response_norm(x, size, alpha, beta, k),
        shape=x.shape,
        options={"lrn": (int(size), float(alpha), float(beta), float(k))},
    )


def dropout(input, p, train):
    if train:  # F.dropout's own default, whatever the model's mode
        raise Unknown("it drops values in eval mode too")
    return input


# ---- Arithmetic --------------------------------------------------------------------------------------------


def add(self, other, alpha=1) -> Stage:
    if alpha != 1:
        other = mul(other, alpha) if _read(other) else other * alpha
    if _read(self) and _read(other):
        left, right = stage_of(self), stage_of(other)
        if left.shape == right.shape:
            return Stage(kind="add", inputs=[left, right], run=torch.add, shape=left.shape)
        raise Unknown
    return _combined(torch.add, self, other, (1.0, 1.0))


def sub(self, other, alpha=1) -> Stage:
    if _read(self) and _read(other):
        return add(self, other, -alpha)
    if alpha != 1:
        raise Unknown
    return _combined(torch.sub, self, other, (1.0, -1.0))


def rsub(self, other, alpha=1) -> Stage:
    return sub(other, self, alpha)


def mul(self, other) -> Stage:
    if _read(self) and _read(other):
        left, right = stage_of(self), stage_of(other)
        if len(left.shape) != len(right.shape):
            raise Unknown
        shape = tuple(torch.broadcast_shapes(left.shape, right.shape))
        if len(shape) == 3 and any(each.shape[1:] not in (shape[1:], (1, 1)) for each in (left, right)):
            raise Unknown("one of its maps is broadcast along rows or columns alone")
        return Stage(kind="product", inputs=[left, right], run=torch.mul, shape=shape)
    return _combined(torch.mul, self, other, (other, self))


def div(self, other, rounding_mode=None) -> Stage:
    if rounding_mode is not None or _read(other):
        raise Unknown
    if isinstance(other, int | float) and other == 0:
        raise Unknown("it divides by 0")
    return _combined(torch.div, self, other, (1.0 / other, None))


def neg(self) -> Stage:
    return mul(self, -1.0)


def _combined(function, left, right, slopes) -> Stage:
    """function(left, right) of a stage and a constant; slopes: the derivatives by the left one and by the right one."""
    first = _read(left)
    x, constant, slope = (stage_of(left), right, slopes[0]) if first else (stage_of(right), left, slopes[1])
    if isinstance(constant, bool | complex):
        raise Unknown
    if isinstance(constant, Tensor):
        one = constant.dim() <= len(x.shape) or (constant.dim() == len(x.shape) + 1 and len(constant) == 1)
        if not one or not constant.is_floating_point():
            raise Unknown
        try:
            wide = tuple(torch.broadcast_shapes((1, *x.shape), constant.shape))
        except RuntimeError as error:
            raise ShapeError(f"images: their map {tuple(x.shape)} does not fit a constant: {error}") from error
        if wide != (1, *x.shape):
            raise Unknown("its constant is larger than the map")
        constant = constant.detach()

    def run(x):
        return function(x, constant) if first else function(constant, x)

    if isinstance(slope, Tensor):
        slope = slope.detach()
        by_channel = len(x.shape) == 3 and slope.dim() >= 3 and slope.shape[-2:] == (1, 1)
        if slope.dim() == 0:
            slope = float(slope)
        elif by_channel:
            slope = slope.reshape(-1, 1, 1).expand(x.shape[0], 1, 1)
        else:
            return whole([x], run, x.shape)
    return Stage(kind="scale", inputs=[x], run=run, shape=x.shape, options={"factor": slope})


# ---- Channels, rows and columns ----------------------------------------------------------------------------


def as_stage(value: Picked) -> Stage:
    """The picked channels as a map, or as what else has their axes."""
    if value.made:
        return value.made[0]
    x, index = value.stage, value.index
    if index.dim() == 1 and torch.equal(index, torch.arange(x.shape[0], device="cpu")):
        return x
    if index.dim() == 1:
        made = Stage(kind="channels", inputs=[x], run=_picking(index), shape=value.shape, options={"index": index})
    else:
        pick, shape = _picking(index.flatten()), value.shape
        made = whole([x], lambda x: pick(x).reshape(len(x), *shape), shape)
    value.made.append(made)
    return made


def _picking(index: Tensor) -> Callable[[Tensor], Tensor]:
    first, count = int(index[0]), len(index)
    if torch.equal(index, torch.arange(first, first + count, device="cpu")):
        return lambda x: x[:, first : first + count]
    return lambda x: x.index_select(1, index.to(x.device))


def simplest(value: Picked) -> Stage | Picked:
    """The stage itself where all of its channels are there in order."""
    index, x = value.index, value.stage
    if index.dim() == 1 and torch.equal(index, torch.arange(x.shape[0], device="cpu")):
        return x
    return value


def picked_channels(name: str, index: Tensor, given: dict, wanted: list[tuple[int, ...]]) -> list[Tensor] | None:
    """What a view of a map (images, ..., rows, columns) does to the axes between, or None where it does more.

    index: the channels along those axes. given: the view's arguments. wanted: those axes of its results.
    """
    rank = index.dim() + 3
    if name in ("view", "reshape", "unflatten", "flatten", "_unsafe_view"):
        return [index.reshape(wanted[0])]
    if name in ("channel_shuffle", "native_channel_shuffle"):
        return [index.unflatten(0, (given["groups"], -1)).T.flatten()] if index.dim() == 1 else None
    if name in ("squeeze", "unsqueeze"):
        dims, wide = given.get("dim"), rank + (name == "unsqueeze")
        dims = [dims] if isinstance(dims, int) else dims
        inside = dims is not None and all(0 < d % wide < wide - 2 for d in dims)
        return [index.reshape(wanted[0])] if inside else None
    if name in ("permute", "transpose", "swapaxes"):
        if name == "permute":
            order = [d % rank for d in given["dims"]]
        else:
            a, b = (given[key] % rank for key in (("dim0", "dim1") if name == "transpose" else ("axis0", "axis1")))
            order = list(range(rank))
            order[a], order[b] = order[b], order[a]
        if [order[0], *order[-2:]] != [0, rank - 2, rank - 1]:
            return None
        return [index.permute([d - 1 for d in order[1:-2]])]
    if name == "index":
        places = given["indices"]
        used = [d for d, place in enumerate(places) if place is not None]
        if len(used) != 1 or not 0 < used[0] < rank - 2 or not isinstance(places[used[0]], Tensor):
            return None
        return [index[(slice(None),) * (used[0] - 1) + (places[used[0]].cpu(),)]]
    several = name in ("flip", "roll")
    dims = given["dims"] if several else [given["dim"]]
    numbers = {key: value for key, value in given.items() if key not in ("self", "dim", "dims")}
    if not dims or any(not 0 < d % rank < rank - 2 for d in dims) or _read(*numbers.values()):
        return None
    numbers = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in numbers.items()}
    inner = [d % rank - 1 for d in dims]
    made = getattr(torch.ops.aten, name)(index, **numbers, **({"dims": inner} if several else {"dim": inner[0]}))
    return [made] if isinstance(made, Tensor) else list(made)


def cat(tensors, dim=0) -> Stage:
    parts = [stage_of(t) for t in tensors]
    if len(parts) == 1:
        return parts[0]
    if dim not in (1, -3) or any(len(part.shape) != 3 or part.shape[1:] != parts[0].shape[1:] for part in parts):
        raise Unknown
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Stage(kind="cat", inputs=parts, run=lambda *maps: torch.cat(maps, 1), shape=shape)


def padded(self, pad, mode="constant", value=None) -> Stage:
    x = stage_of(self, (3,))
    if mode != "constant" or value not in (None, 0) or len(pad) not in (2, 4):
        raise Unknown
    left, right, top, bottom = (*map(int, pad), 0, 0)[:4]
    return _framed(x, top, bottom, left, right)


def constant_pad_nd(self, pad, value=0) -> Stage:
    return padded(self, pad, "constant", value)


def _framed(x: Stage, top: int, bottom: int, left: int, right: int) -> Stage:
    """Rows and columns of zeros around a map; negative ones are cropped."""
    height, width = x.shape[1] + top + bottom, x.shape[2] + left + right
    if height < 1 or width < 1:
        raise ShapeError(f"images: their map {tuple(x.shape)} is smaller than what {(left, right, top, bottom)} crops")
    return Stage(
        kind="pad",
        inputs=[x],
        run=lambda x: F.pad(x, (left, right, top, bottom)),
        shape=(x.shape[0], height, width),
        window=Window((1, 1), (1, 1), (top, left), (1, 1)),
    )


def cropped(self, dim=0, start=None, end=None, step=1) -> Stage:
    """Rows or columns next to one another; any other part is an operation on whole maps."""
    x = stage_of(self, (3,))
    axis = dim % 4
    if axis not in (2, 3) or step != 1:
        raise Unknown
    length = x.shape[axis - 1]
    begin, stop, _ = slice(start, end).indices(length)
    if stop <= begin:
        raise Unknown("it picks nothing")
    before, after = -begin, stop - length
    if not before and not after:
        return x
    return _framed(x, *((before, after, 0, 0) if axis == 2 else (0, 0, before, after)))


def narrow(self, dim, start, length) -> Stage:
    return cropped(self, dim, start, start + length)


# ---- Reductions --------------------------------------------------------------------------------------------


def mean(self, dim, keepdim=False, dtype=None) -> Stage:
    """The mean of each map, which the engines know; any other is an operation on whole maps."""
    x = stage_of(self, (3,))
    if dtype is not None or not isinstance(dim, list | tuple) or {d % 4 for d in dim} != {2, 3}:
        raise Unknown
    shape = (x.shape[0], 1, 1) if keepdim else (x.shape[0],)
    dims = tuple(dim)
    return whole([x], lambda x: torch.mean(x, dims, keepdim), shape, mean=True)


RULES: dict[str, Callable] = {
    "conv2d": conv2d, "convolution": convolution, "_convolution": convolution, "linear": linear,
    "relu": relu, "relu6": relu6, "hardtanh": hardtanh, "clamp": clamp, "clip": clamp, "clamp_min": clamp_min,
    "clamp_max": clamp_max, "threshold": threshold, "leaky_relu": leaky_relu, "rrelu": rrelu, "prelu": prelu, "glu": glu,
    "_prelu_kernel": prelu_kernel,
    "max_pool2d": max_pool2d, "max_pool2d_with_indices": max_pool2d_with_indices,
    "zfcore::max_pool2d_with_switches": max_pool2d,
    "avg_pool2d": avg_pool2d, "adaptive_avg_pool2d": adaptive_avg_pool2d, "_adaptive_avg_pool2d": adaptive_avg_pool2d,
    "adaptive_max_pool2d": adaptive_max_pool2d,
    "batch_norm": batch_norm, "_native_batch_norm_legit_no_training": batch_norm_no_training,
    "dropout": dropout, "feature_dropout": dropout, "alpha_dropout": dropout, "feature_alpha_dropout": dropout,
    "add": add, "sub": sub, "subtract": sub, "rsub": rsub, "mul": mul, "multiply": mul,
    "div": div, "divide": div, "true_divide": div, "neg": neg, "negative": neg,
    "cat": cat, "concat": cat, "concatenate": cat, "pad": padded, "constant_pad_nd": constant_pad_nd,
    "slice": cropped, "narrow": narrow, "mean": mean,
}  # fmt: skip
RULES |= {name: _each(name, native) for name, native in POINTWISE.items()}
