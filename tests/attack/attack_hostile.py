"""What is put in place of a good argument: numbers, lists and tensors that an op was not made for.

A call's arguments are a tree of dictionaries, tuples, lists and named tuples; `spoil` replaces a leaf or two of it.
Everything is drawn from the ``random.Random`` that is given and torch's own seed, and so is the same for the same seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

SMALL = (0, 0, 0, -1, -1, -2, -3, 1, 2, 3, 5, 16, 32, 255, 256, 1024)
LARGE = tuple(
    sign * 2**power + near
    for power in (31, 32, 33, 40, 58, 61, 62, 63)
    for sign in (1, -1)
    for near in (-1, 0, 1)
)
HUGE = (2**70, -(2**70), 10**30)
REALS = (0.0, -0.0, -1.0, 0.5, 1e30, -1e30, 1e308, 5e-324, float("inf"), -float("inf"), float("nan"))
BYTES = (0, 1, 3, 4, 8, 24, 127, 128, 254, 255)
NO_NUMBERS = (None, True, False, 1.5, float("nan"), "2", b"2", [], (2,), {}, object, 1j)
NO_TENSORS = (None, 3, 2.5, "x", [], [[1.0]], (1, 2), {"x": 1}, object())
INT64 = (-(2**63), 2**63 - 1)

_fake = FakeTensorMode(allow_non_fake_inputs=True)


class Subclass(torch.Tensor):
    """One that adds nothing."""


def number(choose: random.Random) -> int:
    kind = choose.random()
    if kind < 0.5:
        return choose.choice(SMALL)
    if kind < 0.93:
        return choose.choice(LARGE)
    return choose.choice(HUGE)


def within(value: int) -> int:
    """The number, or the nearest that int64 holds."""
    return min(max(value, INT64[0]), INT64[1])


def odd_number(choose: random.Random) -> object:
    """What stands where an int should: mostly a hostile int."""
    if choose.random() < 0.8:
        return number(choose)
    if choose.random() < 0.4:
        value = within(number(choose))
        return choose.choice([numpy.int64(value), torch.tensor(value), torch.tensor([value]), float(value)])
    return choose.choice(NO_NUMBERS)


def odd_list(choose: random.Random, value: tuple | list) -> object:
    """What stands where a pair, or another list of numbers, should."""
    kind = choose.randrange(8)
    if kind <= 2:
        same = number(choose)
        return type(value)([same] * len(value)) if type(value) in (tuple, list) else (same, same)
    if kind == 3:
        return [number(choose) for _ in range(choose.choice([0, 1, 3, 4]))]
    if kind == 4:
        return list(value)[: choose.choice([0, 1])] + [odd_number(choose)]
    if kind == 5:
        return tuple(value) + tuple(value)[:1]
    if kind == 6:
        return odd_number(choose)
    return choose.choice([numpy.array([2, 2]), torch.tensor([2, 2]), range(2), "22", iter([2, 2]), {2: 2, 3: 3}])


# Kinds of tensors -----------------------------------------------------------------------------------------------------


def _freed(x, choose):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def _inference(x, choose):
    with torch.inference_mode():
        return x.clone()


def _requires_grad(x, choose):
    if not x.is_floating_point():
        return x.double().requires_grad_()
    x = x.detach().clone().requires_grad_()
    return choose.choice([x, x * 1])


def _cast(x, choose):
    kinds = (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
        torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128, torch.uint16,
    )  # fmt: skip
    return x.to(choose.choice(kinds))


def _expanded(x, choose):
    axis = choose.randrange(x.dim())
    return x.narrow(axis, 0, 1).expand(x.shape)


def _laid_out(x, choose):
    """The same values elsewhere: transposed in memory, with gaps, with an offset, with the channels last."""
    kind = choose.randrange(4)
    if kind == 0 and x.dim() >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == 1:
        return torch.stack([x, x], -1)[..., 1]
    if kind == 2 and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return torch.cat([x[:1], x])[1:]


def _empty_axis(x, choose):
    return x.narrow(choose.randrange(x.dim()), 0, 0)


def _other_length(x, choose):
    axis = choose.randrange(x.dim())
    if choose.random() < 0.5:
        return x.narrow(axis, 0, choose.choice([max(x.size(axis) - 1, 0), x.size(axis) // 2]))
    return torch.cat([x, x.narrow(axis, 0, 1)], axis)


def _other_dims(x, choose):
    return choose.choice([x.unsqueeze(0), x[0], x.flatten(), x.reshape(-1, 1), x.sum()])


def _overlapping(x, choose):
    """Its elements share memory in another way than an expanded tensor's do."""
    if x.numel() == 0:
        return x
    strides = [1] * x.dim()
    base = x.new_zeros(sum(x.shape)) if not x.is_floating_point() else torch.randn(sum(x.shape)).to(x.dtype)
    return base.as_strided(x.shape, strides)


def _values(x, choose):
    """Other numbers in the same shape."""
    x = x.clone()
    if x.numel() == 0:
        return x
    if x.dtype == torch.uint8:
        if choose.random() < 0.5:
            return torch.randint(0, 256, x.shape, dtype=torch.uint8)
        return torch.full_like(x, choose.choice(BYTES))
    flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
    some = [choose.randrange(x.numel()) for _ in range(choose.choice([1, 1, 2, x.numel()]))]
    for i in some:
        if x.is_floating_point():
            flat[i] = min(max(choose.choice(REALS), -1e38), 1e38) if choose.random() < 0.5 else choose.choice(REALS)
        elif x.dtype == torch.int64:
            flat[i] = within(number(choose)) if choose.random() < 0.8 else int(flat[i]) + choose.choice([-1, 1])
    return flat.view(x.shape)


def _negative_bits(x, choose):
    if x.is_floating_point():
        return choose.choice([torch._neg_view(-x), torch.complex(x.float(), -x.float()).conj().imag])
    return x.to(torch.complex64).conj()


def _other_layout(x, choose):
    kind = choose.randrange(4)
    if kind == 0 and x.dtype == torch.float32:
        return x.to_mkldnn()
    if kind == 1 and x.dtype == torch.float32:
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    if kind == 2 and x.dim() > 1:
        return torch.nested.nested_tensor(list(x)) if len(x) else x.to_sparse()
    return x.to_sparse()


def _of_a_mode(x, choose):
    kind = choose.randrange(5)
    if kind == 0:
        return TwoTensor(x, x)
    if kind == 1:
        return torch._efficientzerotensor(x.shape, dtype=x.dtype)
    if kind == 2:
        return _fake.from_tensor(x.clone())
    if kind == 3:
        return x.as_subclass(Subclass)
    return torch.nn.Parameter(x, requires_grad=False)


KINDS: tuple[Callable, ...] = (
    _freed, _inference, _requires_grad, _cast, _cast, _expanded, _laid_out, _laid_out, _empty_axis, _other_length,
    _other_length, _other_dims, _overlapping, _values, _values, _values, _values, _negative_bits, _other_layout,
    _of_a_mode, _of_a_mode, lambda x, choose: x.to("meta"), lambda x, choose: x.numpy(),
)  # fmt: skip


def odd_tensor(choose: random.Random, x: torch.Tensor, others: list[torch.Tensor]) -> object:
    """Another kind of tensor; others: the call's tensors, any of which may stand in its place."""
    kind = choose.random()
    if kind < 0.08:
        return choose.choice(NO_TENSORS)
    if kind < 0.16 and others:
        return choose.choice(others)
    if type(x) is not torch.Tensor or x.layout != torch.strided or is_freed(x):
        return x  # odd already, and no tensor that can be made into another
    kind = choose.choice(KINDS)
    try:
        return kind(x, choose)
    except Exception:
        return None  # torch has no such tensor of this dtype or shape


# Trees of arguments ---------------------------------------------------------------------------------------------------


def is_named(value: object) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def children(value: object) -> Iterator[tuple[object, object]]:
    """The parts of a tree's node, each with its key."""
    if isinstance(value, dict):
        yield from value.items()
    elif is_named(value):
        yield from zip(value._fields, value, strict=True)
    elif type(value) in (tuple, list):
        yield from enumerate(value)


def nodes(value: object, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
    """Every node below, with the keys that lead to it."""
    for key, part in children(value):
        yield (*path, key), part
        yield from nodes(part, (*path, key))


def replaced(tree: object, path: tuple, value: object) -> object:
    """The tree with another value at the end of the path."""
    if not path:
        return value
    key, *rest = path
    if isinstance(tree, dict):
        return {**tree, key: replaced(tree[key], tuple(rest), value)}
    if is_named(tree):
        return tree._replace(**{key: replaced(getattr(tree, key), tuple(rest), value)})
    parts = list(tree)
    parts[key] = replaced(parts[key], tuple(rest), value)
    return type(tree)(parts)


def odd(choose: random.Random, value: object, tensors: list[torch.Tensor]) -> object:
    """What stands in the value's place."""
    if isinstance(value, torch.Tensor):
        return odd_tensor(choose, value, tensors)
    if isinstance(value, bool):
        return choose.choice([not value, not value, None, 1, 0, "True", 2**70, torch.tensor(True)])
    if isinstance(value, int):
        return odd_number(choose)
    if isinstance(value, float):
        return choose.choice(REALS) if choose.random() < 0.8 else choose.choice(NO_NUMBERS)
    if isinstance(value, str):
        return choose.choice(["", "sum", "last", "Sum", "bf16", "elu", None, 3, b"sum", [value], "\0", "x" * 3000])
    if value is None:
        return choose.choice([0, "x", (1, 1), *tensors])
    if is_named(value):
        return choose.choice([tuple(value), tuple(value)[:-1], (*value, 0), value._asdict(), None, 3, "x"])
    if type(value) in (tuple, list):
        return odd_list(choose, value)
    return None


def is_freed(x: torch.Tensor) -> bool:
    return x.numel() > 0 and not x._is_zerotensor() and x.device.type == "cpu" and not x.untyped_storage().nbytes()


_MARKS = {
    "freed": is_freed,
    "negative": torch.Tensor.is_neg,
    "conjugate": torch.Tensor.is_conj,
    "zero": torch.Tensor._is_zerotensor,
    "of inference": torch.Tensor.is_inference,
    "requires grad": lambda x: x.requires_grad,
    "extreme": lambda x: x.dtype == torch.int64 and x.numel() > 0 and not is_freed(x) and bool(x.abs().max() > 2**20),
}


def show(value: object) -> str:
    """The value in a few words, whatever it is; tensors by kind, shape and strides."""
    try:
        if isinstance(value, torch.Tensor):
            strides = tuple(value.stride()) if value.layout == torch.strided else value.layout
            kind = " ".join(word for word, has in _MARKS.items() if has(value))
            what = f"{str(value.dtype)[6:]} {list(value.shape)} strides {strides} {value.device} {kind}"
            return f"{type(value).__name__}<{what.strip()}>"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}={show(part)}" for key, part in value.items()) + "}"
        if is_named(value):
            return f"{type(value).__name__}({', '.join(map(show, value))})"
        if type(value) in (tuple, list):
            inside = ", ".join(map(show, value))
            return f"[{inside}]" if type(value) is list else f"({inside})"
        return repr(value)[:80]
    except Exception as error:  # a tensor that cannot even be described
        return f"<{type(value).__name__}, which raises {type(error).__name__}>"


def as_numbers(value: object, inside: bool = False) -> object:
    """The tree with what counts as an int as one, and ranges as tuples: the definitions know no other."""
    if isinstance(value, numpy.integer) or (inside and isinstance(value, numpy.ndarray) and value.shape == ()):
        return int(value)
    if isinstance(value, range):
        return tuple(value)
    if inside and isinstance(value, torch.Tensor) and value.numel() == 1 and value.dtype == torch.int64:
        return int(value)
    if isinstance(value, dict):
        return {key: as_numbers(part) for key, part in value.items()}
    if is_named(value):
        return type(value)(*map(as_numbers, value))
    if type(value) in (tuple, list):
        return type(value)(as_numbers(part, inside=True) for part in value)
    return value


def with_values(value: object, inside: bool = False) -> object:
    """The tree without freed tensors in its lists of numbers: torch's dispatcher ends the process by reading those."""
    if type(value) in (tuple, list):
        return type(value)(with_values(part, inside=True) for part in value)
    if isinstance(value, dict):
        return {key: with_values(part) for key, part in value.items()}
    read = inside and type(value) is torch.Tensor and value.layout is torch.strided
    return 0 if read and is_freed(value) else value


def _beside(paths: list[tuple], path: tuple) -> list[tuple]:
    """Those of the same axis of the same window."""
    return [other for other in paths if other[-1] == path[-1] and other[:-2] == path[:-2]]


def spoil(choose: random.Random, tree: dict) -> tuple[dict, list[tuple]]:
    """The tree with hostile values in it, mostly in one place or two, and where."""
    tensors = [part for _, part in nodes(tree) if type(part) is torch.Tensor]
    changed: list[tuple] = []
    count = choose.choice([1, 1, 1, 1, 1, 2, 2, 3, 9])
    paths = [path for path, part in nodes(tree) if type(part) is int]
    if paths and choose.random() < 0.2:  # in several places, so that products overflow: often one number
        value = number(choose)
        if choose.random() < 0.6:
            paths = _beside(paths, choose.choice(paths))
        for path in choose.sample(paths, min(len(paths), choose.choice([2, 2, 3, 4]))):
            tree = replaced(tree, path, value if choose.random() < 0.8 else number(choose))
            changed.append(path)
        count = choose.choice([0, 0, 1])
    for _ in range(count):
        places = list(nodes(tree))
        if choose.random() < 0.5:
            places = [(path, part) for path, part in places if isinstance(part, torch.Tensor)] or places
        path, value = choose.choice(places)
        tree = replaced(tree, path, odd(choose, value, tensors))
        changed.append(path)
    return tree, changed
