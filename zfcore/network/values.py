"""What a tensor of the model's forward stands for while the forward is recorded.

A recorded tensor has a batch axis: the images. A *stage* (stages.py) has it first, one entry an image. On the way
from one stage to the next, tensors may have it elsewhere, or folded with other axes, as when an image is cut into
windows: those are `Loose`, expressions that become one stage as soon as the images come first again. `Picked` are the
channels of a map in another order or number, which cost nothing until they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from zfcore.network.stages import Stage


class Unknown(Exception):
    """The operation, with these arguments, is not one that the engines know."""


@dataclass(frozen=True)
class Images:
    """A size that is `times` the number of images."""

    times: int


@dataclass(frozen=True, eq=False)
class Alike:
    """A constant of the model that has an axis of images, the same for each: one image's part of it.

    part: what stands for one image along `axis`, which may be several entries long.
    """

    part: Tensor
    axis: int


@dataclass(eq=False)
class Loose:
    """function(*args, **kwargs) of stages, of other expressions and of constants.

    shape:  as recorded, the images included.
    axis:   where the images are: the axis is laid out as (ahead, images, factor).
    each:   the stage that it is a function of each value of, where it is one.
    """

    function: Callable[..., object]
    args: tuple
    kwargs: dict
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int
    factor: int = 1
    ahead: int = 1
    each: Stage | None = None
    read: bool = False  # the channels that it picks are stages

    @property
    def plain(self) -> bool:
        """Whether the images come first, an entry each."""
        return self.axis == 0 and self.factor == 1 and self.ahead == 1 and len(self.shape) > 1

    def run(self) -> tuple[list[Stage], Callable[..., Tensor]]:
        """The stages that it reads, and the expression as a function of their values."""
        stages, order = parts_of(self)
        last: list[list[int]] = []  # what nothing reads after a part
        seen = {id(self)}
        for part in reversed(order):
            read = {id(leaf) for leaf in leaves((part.args, part.kwargs)) if type(leaf) is Loose} - seen
            seen |= read
            last.append(list(read))
        last.reverse()

        def run(*values: Tensor) -> Tensor:
            evaluation = _Evaluation(stages, values)
            for part, spent in zip(order, last, strict=True):
                evaluation.add(part)
                for each in spent:
                    del evaluation.values[each]
            return evaluation.of(self)

        return stages, run


@dataclass(eq=False)
class Picked:
    """Channels of a stage (C, H, W): index is int64 of any shape, the axes between the images and the rows."""

    stage: Stage
    index: Tensor
    made: list[Stage] = field(default_factory=list)  # the stage that it became, once something read it

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.index.shape, *self.stage.shape[1:])


@dataclass(eq=False)
class Unread:
    """Stands for what was not read, with the reason."""

    error: Exception


Value = Stage | Picked | Loose


class _Evaluation:
    """Expressions computed once each, for given values of the stages that they read."""

    def __init__(self, stages: list[Stage], values: tuple[Tensor, ...]):
        self.values: dict[int, object] = {id(stage): value for stage, value in zip(stages, values, strict=True)}
        self.images = len(values[0])

    def add(self, expression: Loose) -> None:
        """Computes one whose parts are."""
        named = {key: self.of(part) for key, part in expression.kwargs.items()}
        self.values[id(expression)] = expression.function(*map(self.of, expression.args), **named)

    def of(self, leaf: object) -> object:
        kind = type(leaf)
        if kind is Loose or kind is Stage:
            return self.values[id(leaf)]
        if kind is Images:
            return self.images * leaf.times
        if kind is Alike:
            return repeated(leaf, self.images)
        if kind in (list, tuple):
            return kind(map(self.of, leaf))
        return leaf


def repeated(alike: Alike, images: int) -> Tensor:
    """The constant for a number of images."""
    part, axis = alike.part, alike.axis
    return part.unsqueeze(axis).expand(*part.shape[:axis], images, *part.shape[axis:]).flatten(axis, axis + 1)


def parts_of(expression: Loose) -> tuple[list[Stage], list[Loose]]:
    """What an expression reads, each once: the stages in the order it names them, and expressions after their parts.

    Not by recursion: a network whose images never come first is one expression, thousands deep.
    """
    stages: list[Stage] = []
    order: list[Loose] = []
    seen: set[int] = set()
    queue: list[object] = [expression]
    while queue:
        part = queue.pop()
        kind = type(part)
        if kind in (list, tuple):
            queue.extend(reversed(part))
        elif kind is partial:
            part()
        elif kind in (Stage, Loose) and id(part) not in seen:
            seen.add(id(part))
            if kind is Stage:
                stages.append(part)
            else:
                queue.append(partial(order.append, part))  # once all that follows is done
                queue.extend(reversed((*part.args, *part.kwargs.values())))
    return stages, order


def leaves(value: object) -> Iterator[object]:
    """What stands in lists, tuples and dicts, at any depth."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


def replaced(value: object, by: Callable[[object], object]) -> object:
    """The lists and tuples in `value`, each leaf replaced."""
    kind = type(value)
    if kind is list:
        return [replaced(part, by) for part in value]
    if isinstance(value, tuple):
        return tuple(replaced(part, by) for part in value)
    return by(value)


# ---- Jumps -------------------------------------------------------------------------------------------------

# They give another result, by far, where a value differs by its rounding.
JUMPING = frozenset((
    "floor_divide", "remainder", "fmod", "sign", "sgn", "floor", "ceil", "round", "trunc", "frac", "heaviside", "hardshrink",
))  # fmt: skip
_COMPARING = frozenset(("gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal"))


def _name_of(part: Loose) -> str:
    """Of the ATen operation that an expression is, or is a result of."""
    if not hasattr(part.function, "_schema") and part.args and isinstance(part.args[0], Loose):
        part = part.args[0]
    schema = getattr(part.function, "_schema", None)
    return "" if schema is None else schema.name.partition("::")[2]


def jump_of(expression: Loose, run: Callable[..., Tensor]) -> str | None:
    """The operation by which an expression jumps: it picks places, or goes by a condition. None where none does.

    A condition on the value itself, as in `where(x > 0, x, 0)`, is none if both of its sides meet there.
    """
    edges: list[float] = []
    for part in parts_of(expression)[1]:
        name = _name_of(part)
        if name in JUMPING:
            return name
        if part.dtype.is_floating_point or part.dtype.is_complex:
            continue
        if not (name in _COMPARING and expression.each is part.args[0] and isinstance(part.args[1], int | float)):
            return name or "an operation on indices"
        edges.append(float(part.args[1]))
    for edge in edges:
        around = torch.tensor([edge - 1e-9, edge, edge + 1e-9], dtype=torch.float64, device="cpu")
        low, at, high = run(around).tolist()
        if not max(abs(low - at), abs(high - at)) <= 1e-6 * (1 + abs(at)):
            return "a condition"
    return None
