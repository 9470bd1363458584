"""Operations on whole maps: where the images are in what each ATen operation returns.

An operation may be replayed for any number of images where it treats each image by itself. Each rule below says so for
the arguments at hand, and where the images stand in the result; or it refuses with `Unknown`. What no rule names is not
an operation that the engines read.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zfcore.network.aten import POINTWISE
from zfcore.network.stages import Stage
from zfcore.network.values import Alike, Images, Loose, Picked, Unknown


class Axis(NamedTuple):
    """Where the images are: an axis, laid out as (ahead, images, factor)."""

    axis: int
    factor: int = 1
    ahead: int = 1

    def at(self, axis: int) -> Axis:
        return Axis(axis, self.factor, self.ahead)

    def length(self, images: int) -> int:
        return self.ahead * images * self.factor


def axis_of(value: object) -> Axis | None:
    """Of a value computed from the images, else None."""
    if isinstance(value, Loose):
        return Axis(value.axis, value.factor, value.ahead)
    return Axis(0) if isinstance(value, Stage | Picked) else None


def shape_of(images: int, value: object) -> tuple[int, ...]:
    """Of a tensor, or of what stands for one, as recorded with so many images."""
    if isinstance(value, Tensor | Loose):
        return tuple(value.shape)
    return (images, *value.shape)


class Call:
    """One operation: its arguments by their names in the schema, values in place of tensors, and its results' shapes."""

    def __init__(self, name: str, given: dict[str, object], images: int):
        self.name, self.given, self.images = name, given, images
        self.results: list[Tensor] = []  # on the meta device
        # Of several axes that the images may be on; axes of length one may stand before the one that they are.
        self.choose: Callable[[list[Axis]], Axis] = operator.itemgetter(0)

    def __getitem__(self, name: str) -> object:
        return self.given[name]

    def rank(self, value: object) -> int:
        if isinstance(value, Tensor):
            return value.dim()
        return len(value.shape) if isinstance(value, Loose) else len(value.shape) + 1

    def shape(self, value: object) -> tuple[int, ...]:
        """As recorded, the images included."""
        return shape_of(self.images, value)

    def only(self, name: str) -> Axis:
        """The images of an argument, where nothing else is computed from them."""
        for other, value in self.given.items():
            if other != name and any(axis_of(part) for part in flat(value)):
                raise Unknown("more than its map is computed from the images")
        found = axis_of(self.given[name])
        if found is None:
            raise Unknown("it does not read a map")
        return found


def flat(value: object) -> list[object]:
    return [part for each in value for part in flat(each)] if isinstance(value, list | tuple) else [value]


def alike(constant: Tensor, axis: int, images: int, own: Axis = Axis(0)) -> Tensor | Alike:
    """A constant with an axis of images, all of which must be the same; as it is where it has none there."""
    length = constant.shape[axis]
    if length == 1:
        return constant
    if length % images or own.ahead != 1:
        raise Unknown(f"a constant has {length} entries where the images are")
    factor = length // images
    parts = constant.detach().unflatten(axis, (images, factor))
    if images > 1 and not same(parts, parts.narrow(axis, 0, 1).expand_as(parts)):
        raise Unknown("a constant of the forward differs from image to image")
    return Alike(parts.select(axis, 0), axis)


ROUNDING = 64  # units in the last place that a product of matrices may differ by from row to row


def same(one: Tensor, other: Tensor) -> bool:
    """Whether values are equal but for rounding: the rows of a product need not be computed in the same order."""
    if torch.equal(one, other):
        return True
    if not one.is_floating_point():
        return False
    within = ROUNDING * torch.finfo(one.dtype).eps * one.abs().amax()
    return bool(((one - other).abs() <= within).all())


# ---- Rules -------------------------------------------------------------------------------------------------


def _dims(call: Call, value: object, dims: int | Sequence[int]) -> list[int]:
    rank = max(call.rank(value), 1)
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def elementwise(call: Call) -> Axis:
    """Operands laid over one another, their last axes together."""
    operands = [name for name, value in call.given.items() if isinstance(value, Tensor | Stage | Picked | Loose)]
    found: Axis | None = None
    for name in operands:
        own = axis_of(call[name])
        if own is not None:
            place = own.at(own.axis - call.rank(call[name]))
            if found not in (None, place):
                raise Unknown("its operands have the images on different axes")
            found = place
    for name in operands:
        value = call[name]
        if isinstance(value, Tensor) and value.dim() >= -found.axis:
            call.given[name] = alike(value, value.dim() + found.axis, call.images, found)
    rank = call.results[0].dim()
    if call.results[0].shape[rank + found.axis] != found.length(call.images):
        raise Unknown("it changes the number of images")
    return found.at(rank + found.axis)


def along(call: Call) -> Axis:
    """What works along another axis than that of the images, and keeps them all."""
    own = call.only("self")
    if call["dim"] is None or own.axis in _dims(call, call["self"], call["dim"]):
        raise Unknown("it works along the batch axis")
    return own


def reduced(call: Call) -> Axis:
    if "other" in call.given:  # max(x, y)
        return elementwise(call)
    own, dims = call.only("self"), call.given.get("dim")
    if dims is None or dims == []:
        raise Unknown("it reduces the batch axis too")
    gone = _dims(call, call["self"], dims)
    if own.axis in gone:
        raise Unknown("it reduces the batch axis")
    if call.given.get("keepdim"):
        return own
    return own.at(own.axis - sum(d < own.axis for d in gone))


def _first(name: str = "self", rank: int | None = None, with_: Sequence[str] = ()) -> Callable[[Call], Axis]:
    """What takes images one by one along the first axis; `rank` axes in all. with_: other arguments that do so."""

    def rule(call: Call) -> Axis:
        own = axis_of(call[name])
        together = [n for n in (name, *with_) if axis_of(call.given.get(n))]
        for other, value in call.given.items():
            if other not in together and any(axis_of(part) for part in flat(value)):
                raise Unknown("its parameters are computed from the image")
        for n in together:
            own = own or axis_of(call[n])
            if axis_of(call[n]) != own:
                raise Unknown("its operands have the images on different axes")
        for n in (name, *with_):
            if isinstance(call.given.get(n), Tensor):
                call.given[n] = alike(call[n], 0, call.images)
        if own.axis != 0 or (rank is not None and call.rank(call[name]) != rank):
            raise Unknown("the images are not its first axis")
        return own

    return rule


def layer_norm(call: Call) -> Axis:
    own = call.only(call_name(call))
    if own.axis >= call.rank(call["input"]) - len(call["normalized_shape"]):
        raise Unknown("it normalises over the batch axis")
    return own


def call_name(call: Call) -> str:
    return "input" if "input" in call.given else "self"


def batch_norm(call: Call) -> Axis:
    if call["training"] or call["running_mean"] is None:
        raise Unknown("it normalises by the batch's own statistics")
    return _first("input")(call)


def reshaped(call: Call) -> Axis:
    """view, flatten and the like: where the images stand again, with what is folded in around them."""
    call.given.pop("other", None)  # of which the shape counts alone
    own, shape, wanted = call.only("self"), call.shape(call["self"]), tuple(call.results[0].shape)
    before = math.prod(shape[: own.axis]) * own.ahead  # entries that one step from image to image is inside of
    places = []
    for axis, length in enumerate(wanted):
        outer = math.prod(wanted[:axis])
        ahead = before // outer if outer and before % outer == 0 else 0
        if ahead and length and length % (ahead * call.images) == 0:
            places.append(Axis(axis, length // call.images // ahead, ahead))
    if places:
        found = call.choose(places)
        sizes = [*wanted[: found.axis], Images(found.ahead * found.factor), *wanted[found.axis + 1 :]]
        call.given, call.name = {"self": call["self"], "shape": sizes}, "reshape"
        return found
    raise Unknown("it does not keep the batch axis")


def squeezed(call: Call) -> Axis:
    own = call.only("self")
    if "dim" not in call.given or own.axis in _dims(call, call["self"], call["dim"]):
        raise Unknown("it would squeeze a batch of one")
    return reshaped(call)


def permuted(call: Call) -> Axis:
    own, rank = call.only("self"), call.rank(call["self"])
    order = list(range(rank))
    if call.name == "permute":
        order = [d % rank for d in call["dims"]]
    elif call.name in ("t", "numpy_T", "mT", "mH", "adjoint"):
        if call.name == "t" and rank < 2:
            return own
        a, b = (0, 1) if call.name in ("t", "numpy_T") else (rank - 2, rank - 1)
        if call.name == "numpy_T" and rank != 2:
            raise Unknown
        order[a], order[b] = order[b], order[a]
    elif call.name in ("movedim", "moveaxis"):
        sources, targets = (_dims(call, call["self"], call[name]) for name in ("source", "destination"))
        rest = iter([d for d in range(rank) if d not in sources])
        order = [sources[targets.index(at)] if at in targets else next(rest) for at in range(rank)]
    else:
        a, b = (
            call[name] % rank for name in (("dim0", "dim1") if "dim0" in call.given else ("axis0", "axis1"))
        )
        order[a], order[b] = order[b], order[a]
    return own.at(order.index(own.axis))


def expanded(call: Call) -> Axis:
    call.given.pop("other", None)  # of which the shape counts alone
    own = call.only("self")
    sizes = list(call["size"]) if call.name == "expand" else list(call.results[0].shape)
    axis = own.axis + len(sizes) - call.rank(call["self"])
    if call.results[0].shape[axis] != own.length(call.images):
        raise Unknown("it changes the batch axis")
    sizes[axis] = -1
    call.given, call.name = {"self": call["self"], "size": sizes}, "expand"
    return own.at(axis)


def repeated(call: Call) -> Axis:
    own, repeats = call.only("self"), call["repeats"]
    axis = own.axis + len(repeats) - call.rank(call["self"])
    if repeats[axis] != 1:
        raise Unknown("it repeats the batch axis")
    return own.at(axis)


def tiled(call: Call) -> Axis:
    own, repeats, rank = call.only("self"), list(call["dims"]), call.rank(call["self"])
    repeats = [1] * (rank - len(repeats)) + repeats
    axis = own.axis + len(repeats) - rank
    if repeats[axis] != 1:
        raise Unknown("it repeats the batch axis")
    return own.at(axis)


def repeat_interleaved(call: Call) -> Axis:
    own, repeats = call.only("self"), call["repeats"]
    if call["dim"] is None or not isinstance(repeats, int):
        raise Unknown("it repeats the batch axis")
    if call["dim"] % call.rank(call["self"]) == own.axis:  # each image next to its repetitions
        return Axis(own.axis, own.factor * repeats, own.ahead)
    return own


def selected(call: Call) -> Axis:
    own, (dim,) = call.only("self"), _dims(call, call["self"], call["dim"])
    if dim == own.axis:
        raise Unknown("it picks images")
    return own.at(own.axis - (dim < own.axis))


def sliced(call: Call) -> Axis:
    own, (dim,) = call.only("self"), _dims(call, call["self"], call["dim"])
    if dim == own.axis:
        length = call.shape(call["self"])[dim]
        if tuple(call.results[0].shape) != call.shape(call["self"]) or call.given.get("step", 1) != 1:
            raise Unknown("it picks images")
        end = call.given.get("end")
        if end is not None and end <= length:  # x[: number of images], which is all of them for any number
            call.given["end"] = None
    elif 0 in call.results[0].shape:
        raise Unknown("it picks nothing")
    return own


def _not_along(dim: str, why: str) -> Callable[[Call], Axis]:
    def rule(call: Call) -> Axis:
        own = call.only("self")
        if own.axis in _dims(call, call["self"], call[dim]):
            raise Unknown(why)
        return own

    return rule


def unsqueezed(call: Call) -> Axis:
    own = call.only("self")
    dim = call["dim"] % (call.rank(call["self"]) + 1)
    return own.at(own.axis + (dim <= own.axis))


def _shared_axis(parts: Sequence[object]) -> Axis:
    """Where the images are, in all of the parts that are computed from them."""
    found = {axis_of(part) for part in parts} - {None}
    if len(found) != 1:
        raise Unknown("its operands have the images on different axes")
    return found.pop()


def joined(call: Call) -> Axis:
    """cat, along another axis than the images'."""
    parts, own = call["tensors"], _shared_axis(call["tensors"])
    (dim,) = _dims(call, next(part for part in parts if axis_of(part)), call["dim"])
    if dim == own.axis:
        raise Unknown("it joins along the batch axis")
    parts = [part for part in parts if not (isinstance(part, Tensor) and part.shape == (0,))]
    call.given["tensors"] = [
        alike_all(part, own, call.images) if isinstance(part, Tensor) else part for part in parts
    ]
    return own


def alike_all(constant: Tensor, own: Axis, images: int) -> Tensor | Alike:
    """As `alike`, of a constant that must have the images."""
    if constant.shape[own.axis] != images * own.factor or own.ahead != 1:
        raise Unknown("a constant of the forward has another number of images")
    if images * own.factor == 1:
        return Alike(constant.detach(), own.axis)
    return alike(constant, own.axis, images)


def stacked(call: Call) -> Axis:
    parts, own = call["tensors"], _shared_axis(call["tensors"])
    call.given["tensors"] = [
        alike_all(part, own, call.images) if isinstance(part, Tensor) else part for part in parts
    ]
    dim = call["dim"] % (call.results[0].dim())
    return own.at(own.axis + (dim <= own.axis))


def indexed(call: Call) -> Axis:
    """Picked by constant indices along one axis, or along several that stand together."""
    own, indices = call.only("self"), list(call["indices"])
    used = [d for d, index in enumerate(indices) if index is not None]
    if any(not isinstance(indices[d], Tensor) for d in used) or not used:
        raise Unknown("it picks by what is no number")
    if any(indices[d].dtype in (torch.bool, torch.uint8) and indices[d].dim() > 1 for d in used):
        raise Unknown("it picks by a mask")
    if own.axis in used:
        raise Unknown("it picks images")
    if used != list(range(used[0], used[-1] + 1)):
        raise Unknown("it picks along axes that do not stand together")
    wide = max((indices[d].dim() for d in used if indices[d].dtype not in (torch.bool, torch.uint8)), default=1)
    return own.at(own.axis if own.axis < used[0] else own.axis - len(used) + wide)


def gathered(call: Call) -> Axis:
    own, index = axis_of(call["self"]), axis_of(call["index"])
    if own is None or index is None or own != index or own.factor != 1 or own.ahead != 1:
        raise Unknown("it picks images")
    if call["dim"] % call.rank(call["self"]) == own.axis:
        raise Unknown("it picks images")
    return own


def multiplied(call: Call) -> Axis:
    """matmul: rows times columns in the last two axes, the others laid over one another."""
    names = ("self", "mat2") if "mat2" in call.given else ("self", "other")
    left, right = (call[name] for name in names)
    rank = call.results[0].dim()
    places = []
    for value, last in ((left, call.rank(left) - 1), (right, max(call.rank(right) - 2, 0))):
        own = axis_of(value)
        if own is None:
            continue
        if own.axis == last:
            raise Unknown("it sums over the batch axis")
        outer = own.axis - call.rank(value)
        if value is left and call.rank(left) >= 2 and outer == -2:  # rows of the left one
            if axis_of(right) is not None:
                raise Unknown("its operands have the images on different axes")
            # with a vector on the right the last axis of the result is the rows'
            return own.at(rank - (1 if call.rank(right) == 1 else 2))
        if value is right and outer == -1:
            if axis_of(left) is not None:
                raise Unknown("its operands have the images on different axes")
            return own.at(rank - 1)
        places.append(own.at(outer))
    if not places or len(set(places)) != 1:
        raise Unknown("its operands have the images on different axes")
    (place,) = set(places)
    for name, value in zip(names, (left, right), strict=True):
        if isinstance(value, Tensor) and value.dim() >= -place.axis:
            call.given[name] = alike(value, value.dim() + place.axis, call.images, place)
    dropped = (call.rank(left) == 1) + (call.rank(right) == 1)
    return place.at(rank + place.axis + dropped)


def affine(call: Call) -> Axis:
    """addmm, baddbmm: a constant and a product."""
    names = ("mat1", "mat2") if "mat1" in call.given else ("batch1", "batch2")
    inner = Call("matmul", {"self": call[names[0]], "other": call[names[1]]}, call.images)
    inner.results = call.results
    own = multiplied(inner)
    call.given[names[0]], call.given[names[1]] = inner["self"], inner["other"]
    added = call["self"]
    if isinstance(added, Tensor):
        at = added.dim() + own.axis - call.results[0].dim()
        if at >= 0:
            call.given["self"] = alike(added, at, call.images, own)
    elif axis_of(added) != own.at(own.axis - call.results[0].dim() + call.rank(added)):
        raise Unknown("its operands have the images on different axes")
    return own


def linear(call: Call) -> Axis:
    own = call.only("input")
    if own.axis == call.rank(call["input"]) - 1:
        raise Unknown("it sums over the batch axis")
    return own


def einsum(call: Call) -> Axis:
    """The letter of the images must stand for them in every operand, and in the result."""
    inputs, arrow, output = call["equation"].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in inputs:
        raise Unknown("its equation is not written out")
    letters = set()
    for term, value in zip(terms, call["tensors"], strict=True):
        own = axis_of(value)
        if own is not None:
            letters.add((term[own.axis], own.factor, own.ahead))
    if len(letters) != 1:
        raise Unknown("its operands have the images on different axes")
    ((letter, factor, ahead),) = letters
    if any(term.count(letter) > 1 for term in terms) or letter not in output:
        raise Unknown("it sums over the batch axis")
    for term, value in zip(terms, call["tensors"], strict=True):
        if axis_of(value) and (letter not in term or axis_of(value).axis != term.index(letter)):
            raise Unknown("its operands have the images on different axes")
    call.given["tensors"] = [
        alike(value, term.index(letter), call.images, Axis(0, factor, ahead))
        if isinstance(value, Tensor) and letter in term
        else value
        for term, value in zip(terms, call["tensors"], strict=True)
    ]
    return Axis(output.index(letter), factor, ahead)


def attention(call: Call) -> Axis:
    if call.given.get("dropout_p"):
        raise Unknown("it drops values in eval mode too")
    found: Axis | None = None
    for name in ("query", "key", "value"):
        own = axis_of(call[name])
        if own is None:
            continue
        place = own.at(own.axis - call.rank(call[name]))
        if place.axis >= -2 or found not in (None, place):
            raise Unknown("its operands have the images on different axes")
        found = place
    for name in ("query", "key", "value", "attn_mask"):
        value = call.given.get(name)
        if isinstance(value, Tensor) and value.dim() >= -found.axis:
            call.given[name] = alike(value, value.dim() + found.axis, call.images, found)
        elif name == "attn_mask" and axis_of(value) is not None:
            own = axis_of(value)
            if own.at(own.axis - call.rank(value)) != found:
                raise Unknown("its operands have the images on different axes")
    return found.at(call.results[0].dim() + found.axis)


def padded(call: Call) -> Axis:
    own = call.only("self")
    reached = [call.rank(call["self"]) - 1 - i // 2 for i, n in enumerate(call["pad"]) if n]
    if own.axis in reached or (call.given.get("mode", "constant") != "constant" and own.axis != 0):
        raise Unknown("it pads the batch axis")
    return own


def diagonal(call: Call) -> Axis:
    own = call.only("self")
    gone = _dims(call, call["self"], [call["dim1"], call["dim2"]])
    if own.axis in gone:
        raise Unknown("it works along the batch axis")
    return own.at(own.axis - sum(d < own.axis for d in gone))


def copied(call: Call) -> Axis:
    """index_copy, index_add: maps written to constant places along another axis than the images'."""
    own = axis_of(call["self"]) or axis_of(call["source"])
    if own.axis in _dims(call, call["self"], call["dim"]) or axis_of(call["index"]) is not None:
        raise Unknown("it writes to some of the images")
    for name in ("self", "source"):
        if isinstance(call[name], Tensor):
            call.given[name] = alike_all(call[name], own, call.images)
        elif axis_of(call[name]) != own:
            raise Unknown("its operands have the images on different axes")
    return own


def put(call: Call) -> Axis:
    """index_put: constants written to constant places, of each image."""
    own = axis_of(call["self"])
    if own is None or own.axis != 0 or axis_of(call["values"]) is not None:
        raise Unknown("it writes where the images cannot be told")
    for d, index in enumerate(call["indices"]):
        if index is None:
            continue
        if axis_of(index) is not None:
            whole_mask = isinstance(index, Loose) and index.shape == call.shape(call["self"]) and axis_of(index) == own
            if not (whole_mask and index.dtype is torch.bool and call["values"].dim() == 0):
                raise Unknown("it writes where the images cannot be told")
        elif d == own.axis:
            raise Unknown("it writes to some of the images")
    if isinstance(call["values"], Tensor) and call["values"].dim() > 1:
        raise Unknown("it writes what may differ from image to image")
    return own


_EVERY = (
    "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "floor_divide", "remainder",
    "fmod", "pow", "float_power", "maximum", "minimum", "fmax", "fmin", "where", "eq", "ne", "lt", "le", "gt", "ge",
    "logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_and", "bitwise_or", "bitwise_xor",
    "bitwise_not", "__and__", "__or__", "__xor__", "clamp", "clip", "clamp_min", "clamp_max", "addcmul", "addcdiv", "lerp",
    "masked_fill", "atan2", "arctan2", "hypot", "xlogy", "copysign", "heaviside", "isnan", "isinf", "isfinite", "neg",
    "negative", "positive", "relu", "relu6", "hardtanh", "threshold", "leaky_relu", "clone", "not_equal", "greater",
    "greater_equal", "less", "less_equal", "logaddexp", "nextafter", "ldexp", "signbit", "rrelu",
    "_to_copy", "fill", "zero", "copy", "square", "special_xlog1py",
)  # fmt: skip
_ALONG = (
    "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort",
    "argsort", "topk", "glu", "special_softmax", "special_log_softmax",
)  # fmt: skip
_REDUCED = (
    "mean", "sum", "amax", "amin", "prod", "logsumexp", "std", "var", "std_mean", "var_mean", "norm", "linalg_vector_norm",
    "argmax", "argmin", "any", "all", "max", "min", "nansum", "nanmean", "median", "mode", "kthvalue", "count_nonzero",
    "aminmax", "special_logsumexp",
)  # fmt: skip
_BY_IMAGE = {  # the first axis is the images', and these are all the axes there are
    "conv1d": 3, "conv2d": 4, "conv3d": 5, "convolution": None, "_convolution": None, "conv_transpose1d": 3,
    "conv_transpose2d": 4, "conv_transpose3d": 5, "max_pool1d": 3, "max_pool2d": 4, "max_pool3d": 5,
    "max_pool2d_with_indices": 4, "avg_pool1d": 3, "avg_pool2d": 4, "avg_pool3d": 5, "adaptive_avg_pool1d": 3,
    "adaptive_avg_pool2d": 4, "_adaptive_avg_pool2d": 4, "adaptive_avg_pool3d": 5, "adaptive_max_pool1d": 3,
    "adaptive_max_pool2d": 4, "adaptive_max_pool3d": 5, "upsample_nearest1d": 3, "upsample_nearest2d": 4,
    "_upsample_nearest_exact2d": 4, "upsample_bilinear2d": 4, "upsample_bicubic2d": 4, "_upsample_bilinear2d_aa": 4,
    "_upsample_bicubic2d_aa": 4, "upsample_linear1d": 3, "upsample_trilinear3d": 5, "upsample_nearest3d": 5,
    "pixel_shuffle": 4, "pixel_unshuffle": 4, "channel_shuffle": 4, "native_channel_shuffle": 4, "im2col": 4, "col2im": 3,
    "reflection_pad1d": 3, "reflection_pad2d": 4, "replication_pad1d": 3, "replication_pad2d": 4,
    "replication_pad3d": 5, "reflection_pad3d": 5,
}  # fmt: skip

RULES: dict[str, Callable[[Call], Axis]] = {
    **{name: elementwise for name in (*_EVERY, *POINTWISE)},
    **{name: along for name in _ALONG},
    **{name: reduced for name in _REDUCED},
    "layer_norm": layer_norm, "native_layer_norm": layer_norm, "rms_norm": layer_norm, "_fused_rms_norm": layer_norm,
    "group_norm": _first("input"), "instance_norm": _first("input"), "batch_norm": batch_norm,
    "view": reshaped, "_unsafe_view": reshaped, "reshape": reshaped, "view_as": reshaped, "reshape_as": reshaped,
    "flatten": reshaped, "unflatten": reshaped, "squeeze": squeezed, "unsqueeze": unsqueezed, "_reshape_alias": reshaped,
    "permute": permuted, "transpose": permuted, "t": permuted, "numpy_T": permuted, "mT": permuted, "mH": permuted,
    "adjoint": permuted, "movedim": permuted, "moveaxis": permuted, "swapaxes": permuted, "swapdims": permuted,
    "expand": expanded, "expand_as": expanded, "broadcast_to": expanded, "repeat": repeated, "tile": tiled,
    "repeat_interleave": repeat_interleaved,
    "select": selected, "slice": sliced, "narrow": sliced, "unbind": selected, "diagonal": diagonal, "unfold": _not_along("dimension", "it works along the batch axis"),
    "split": _not_along("dim", "it splits the batch axis"), "chunk": _not_along("dim", "it splits the batch axis"),
    "split_with_sizes": _not_along("dim", "it splits the batch axis"),
    "unsafe_split": _not_along("dim", "it splits the batch axis"),
    "unsafe_chunk": _not_along("dim", "it splits the batch axis"),
    "tensor_split": _not_along("dim", "it splits the batch axis"),
    "flip": _not_along("dims", "it turns the batch axis round"), "roll": _not_along("dims", "it rolls the batch axis"),
    "index": indexed, "index_select": _not_along("dim", "it picks images"), "gather": gathered, "index_put": put, "index_copy": copied, "index_add": copied,
    "cat": joined, "concat": joined, "concatenate": joined, "stack": stacked,
    "matmul": multiplied, "mm": multiplied, "bmm": multiplied, "addmm": affine, "baddbmm": affine, "linear": linear,
    "einsum": einsum, "scaled_dot_product_attention": attention, "pad": padded, "constant_pad_nd": padded,
    "grid_sampler": _first("input", 4, ("grid",)), "grid_sampler_2d": _first("input", 4, ("grid",)),
    "max_unpool2d": _first("self", 4, ("indices",)),
}  # fmt: skip


def _prelu(call: Call) -> Axis:
    own = call.only("self")
    if own.axis == 1 and call["weight"].numel() > 1:
        raise Unknown("its slopes are the images'")
    return own


def _matrix_part(call: Call) -> Axis:
    """triu and tril, of the last two axes."""
    own = call.only("self")
    if own.axis >= call.rank(call["self"]) - 2:
        raise Unknown("it works along the batch axis")
    return own


def _by_image(rank: int | None) -> Callable[[Call], Axis]:
    def rule(call: Call) -> Axis:
        return _first(call_name(call), rank)(call)

    return rule


RULES |= {name: _by_image(rank) for name, rank in _BY_IMAGE.items()}
RULES |= {"prelu": _prelu, "_prelu_kernel": elementwise, "triu": _matrix_part, "tril": _matrix_part}
