"""The native core's own functions under attack: pointers that are right, with numbers that do not belong to them.

A good call of an op is drawn and made; where it reaches the native function, the numbers that this is given are spoiled.
No size or stride is made larger than the memory behind its pointer, which no check could know: what the core is given
must give an answer or an exception, and under a sanitizer no report.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from unittest import mock

from attack_hostile import number, within

from zfcore.ops._library import native

ADDRESS = 2**16  # what is as large, or 0, is an address
ITEM = (4, 8, 2, 2, 1)  # bytes of a dtype's code
SIZES = ("packed_filters_bytes_cpu", "delta_filters_bytes_cpu")  # functions of numbers alone
COUNTED = ("strongest_cpu", "conv_strongest_cpu")  # with a count of what lies behind a pointer


def is_view(value: object) -> bool:
    """Whether this is a tensor as the kernels take it: (pointer, dtype code, sizes, strides)."""
    return isinstance(value, tuple) and len(value) == 4 and type(value[0]) is int and type(value[1]) is int


def is_memory(value: object) -> bool:
    """Whether this is (pointer, bytes)."""
    return isinstance(value, tuple) and len(value) == 2 and type(value[0]) is int and value[0] >= ADDRESS


def _smaller(choose: random.Random, value: int) -> int:
    """At most the value, which says how much memory there is."""
    options = [0, 1, value - 1, value // 2, -1, -(2**31), -(2**63)]
    return min(choose.choice(options[:4] if choose.random() < 0.8 else options), value)


def _spoiled_view(choose: random.Random, view: tuple) -> tuple:
    pointer, code, size, stride = view
    kind, axis = choose.random(), choose.randrange(4)
    if kind < 0.6:
        size = (*size[:axis], _smaller(choose, size[axis]), *size[axis + 1 :])
    elif kind < 0.85:
        stride = (*stride[:axis], max(0, _smaller(choose, stride[axis])), *stride[axis + 1 :])
    else:
        fitting = [other for other, item in enumerate(ITEM) if item <= ITEM[code]]
        code = choose.choice([*fitting, 5, 99, -1])
    return pointer, code, tuple(size), tuple(stride)


def _places(value: object, path: tuple = ()):
    """The paths of what can be spoiled: memory, and numbers that are no addresses."""
    if is_view(value) or is_memory(value):
        yield path
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _places(part, (*path, i))
    elif isinstance(value, (bool, float)):
        yield path
    elif isinstance(value, int) and abs(value) < ADDRESS and (value or len(path) > 1):
        yield path


def _spoiled(choose: random.Random, name: str, path: tuple, value: object) -> object:
    if is_view(value):
        return _spoiled_view(choose, value)
    if is_memory(value):
        return value[0], _smaller(choose, value[1])
    if isinstance(value, float):
        return choose.choice([float("nan"), float("inf"), -float("inf"), -1.0, 1e308])
    if isinstance(value, bool):
        return not value
    if len(path) == 1 and name in COUNTED:
        return _smaller(choose, value)
    return within(number(choose))


def _at(tree: object, path: tuple) -> object:
    for key in path:
        tree = tree[key]
    return tree


def _replaced(tree: tuple, path: tuple, value: object) -> tuple:
    if not path:
        return value
    key, *rest = path
    return (*tree[:key], _replaced(tree[key], tuple(rest), value), *tree[key + 1 :])


def _plain(value: object) -> object:
    """torch's sizes as tuples."""
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def spoil(choose: random.Random, name: str, args: tuple) -> tuple:
    *rest, threads = (*_plain(args), None) if name in SIZES else _plain(args)
    rest = tuple(rest)
    for _ in range(choose.choice([1, 1, 1, 2, 2, 3, 6])):
        path = choose.choice(list(_places(rest)))
        rest = _replaced(rest, path, _spoiled(choose, name, path, _at(rest, path)))
    return rest if threads is None else (*rest, choose.choice([threads, threads, 2, 0, -1]))


def run(op: Callable, name: str) -> Callable:
    """The op with a native function of that name whose numbers are spoiled on their way; ``spoiling`` is the seed."""

    def call(spoiling: int, **args):
        real, choose = getattr(native, name), random.Random(spoiling)

        def spoiled(*given):
            odd = spoil(choose, name, given)
            os.write(2, f"{name}{odd}\n".encode())  # which a process that dies has told
            answer = real(*odd)
            return real(*given) if name in SIZES else answer  # memory of that size is made and written to

        with mock.patch.object(native, name, spoiled):
            op(**args)

    return call
