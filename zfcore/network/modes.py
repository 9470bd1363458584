"""What sees a recorded forward: its operations, the torch functions that are none, and the calls of modules."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from zfcore import forks
from zfcore.network import aten, whole
from zfcore.network.counting import BatchSize, Sizes
from zfcore.network.guard import recording
from zfcore.network.operators import operator, tensors_in
from zfcore.network.values import Unread, leaves

if TYPE_CHECKING:
    from zfcore.network.record import Record


class Operations(TorchDispatchMode):
    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes a second, to have this mode skipped by it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        record = self.record
        if record.quiet:
            return function(*args, **(kwargs or {}))
        try:
            with torch._C.DisableTorchFunction():
                return record.operate(function, args, kwargs or {})
        except Exception as error:  # which the model may catch, to go a way that it would not have gone
            if record.failure is None:
                record.fail(error)
            raise


class Functions(TorchFunctionMode):
    """What a dispatch mode does not see: sizes that are read, and values that leave torch."""

    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    def __torch_function__(self, function, types, args=(), kwargs=None):
        record, kwargs = self.record, kwargs or {}
        if function in _COPYING and args and isinstance(args[-1], list | tuple):
            with record.unseen():
                read = any(isinstance(t, Tensor) and record.value_of(t) is not None for t in leaves(args[-1]))
            if read:
                _escapes(record, None, function, args, kwargs)
        special = _SPECIAL.get(function)
        if special is not None:
            first = args[0] if args else None
            if isinstance(first, Tensor):
                with record.unseen():
                    value = record.value_of(first)
                    if special is _escapes and value is None and (memory := record.memory(first)) is not None:
                        memory.blank = False  # it may be written to from now on where nobody sees it
                if value is not None:
                    return special(record, value, function, args, kwargs)
        record.python += 1
        try:
            return function(*args, **kwargs)
        finally:
            record.python -= 1


def _sizes(record: Record, value, function, args, kwargs):
    with record.unseen():
        result = function(*args, **kwargs)
    if isinstance(value, Unread) or not args[0].dim():
        return result
    axis = whole.axis_of(value).axis
    if isinstance(result, torch.Size):
        return Sizes.of(result, axis)
    if function is Tensor.size:
        dim = args[1] if len(args) > 1 else kwargs["dim"]
        if isinstance(dim, str) or dim % args[0].dim() != axis:
            return result
    # The number of images itself, or of all values; `len` makes a plain int of it, whose comparisons nobody sees.
    (record.count.tell if function is Tensor.__len__ else record.count.use)()
    return BatchSize(result)


def _strides(record: Record, value, function, args, kwargs):
    record.count.use()  # which is in them where the images are not the first axis
    return function(*args, **kwargs)


def _escapes(record: Record, value, function, args, kwargs):
    record.stop(f"reads a value that is computed from the images ({_function_name(function)}): its control flow may depend on it")


def _contiguous(record: Record, value, function, args, kwargs):
    with record.unseen():
        return record.maybe_copied(operator(torch.ops.aten.contiguous.default), (args[0],), {})


def _normalised(record: Record, value, function, args, kwargs):
    """F.local_response_norm, which is many operations on whole maps to torch and one stage to the engines."""
    if isinstance(value, Unread) or args[0].dim() != 4 or record.gradient and not torch.is_grad_enabled():
        return function(*args, **kwargs)
    with record.unseen():
        stage = record.named(aten.local_response_norm(value, *args[1:], **kwargs), "local_response_norm")
        made = function(*args, **kwargs) if record.example is not None else torch.empty_like(args[0])
        record.put(made, stage)
    return made


def _gradient_asked(record: Record, value, function, args, kwargs):
    """Whether it requires a gradient: under autograd it would."""
    return record.gradient and torch.is_grad_enabled()


def _gradient_inside(record: Record, value, function, args, kwargs):
    record.stop(f"asks for a gradient inside its forward ({_function_name(function)})")


def _gradient_told(record: Record, value, function, args, kwargs):
    if record.gradient:
        record.stop(f"asks whether a gradient is followed ({_function_name(function)})")
    return function(*args, **kwargs)


def _gradient_hook(record: Record, value, function, args, kwargs):
    if record.gradient:
        record.stop("registers a hook on a map's gradient, which may change it")
    return torch.utils.hooks.RemovableHandle({})


def _assigned(record: Record, value, function, args, kwargs):
    record.stop(f"assigns to {_function_name(function)}, which the engines do not follow")


def _detached(record: Record, value, function, args, kwargs):
    with record.unseen():
        return record.operate(torch.ops.aten.detach.default, (args[0],), {})


def _function_name(function) -> str:
    owner = getattr(getattr(function, "__self__", None), "__name__", None)
    return f"Tensor.{owner}" if owner else f"Tensor.{getattr(function, '__name__', function)}"


_SPECIAL: dict[object, Callable] = {
    Tensor.shape.__get__: _sizes, Tensor.size: _sizes, Tensor.__len__: _sizes, Tensor.numel: _sizes,
    Tensor.nelement: _sizes, Tensor.nbytes.__get__: _sizes, torch.numel: _sizes,
    Tensor.stride: _strides,
    Tensor.tolist: _escapes, Tensor.numpy: _escapes, Tensor.__array__: _escapes, Tensor.data_ptr: _escapes,
    Tensor.__dlpack__: _escapes, Tensor.untyped_storage: _escapes, Tensor.storage: _escapes,
    Tensor.__reduce_ex__: _escapes, Tensor.__deepcopy__: _escapes, Tensor.__repr__: _escapes, Tensor.__format__: _escapes,
    Tensor.__contains__: _escapes, Tensor._view_func: _escapes, Tensor._view_func_unsafe: _escapes,
    Tensor.share_memory_: _escapes,
    Tensor.contiguous: _contiguous, Tensor.data.__get__: _detached, Tensor.data.__set__: _assigned,
    Tensor.apply_: _escapes, Tensor.map_: _escapes, Tensor.map2_: _escapes,
    Tensor.requires_grad.__get__: _gradient_asked, Tensor.requires_grad.__set__: _gradient_inside,
    Tensor.grad_fn.__get__: _gradient_told, Tensor.is_leaf.__get__: _gradient_told,
    Tensor.requires_grad_: _gradient_inside, Tensor.backward: _gradient_inside, Tensor.register_hook: _gradient_hook,
    Tensor.register_post_accumulate_grad_hook: _gradient_hook, Tensor.retain_grad: _gradient_hook,
    F.local_response_norm: _normalised,
}  # fmt: skip


# They copy numbers out of lists, where a dispatch mode does not see it.
_COPYING = frozenset((torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor))


# ---- What is replaced, for the whole process, while records are made ----------------------------------------

_lock = threading.Lock()  # held while something is replaced and put back, and never while a model runs
_replaced: dict[tuple[object, str], list] = {}  # what was there, and how many records have it replaced
_records: list[Record] = []  # on their way, in any thread


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


forks.renewed(_renew_lock)


@contextmanager
def calls_followed(record: Record) -> Iterator[None]:
    """The calls of modules and of custom autograd functions go by the record that their thread makes, if it does.

    What nn.Module's `__call__` calls is replaced, which is cheap, and serves as well where no compiled version of a
    module is called instead; where one is, `__call__` itself.
    """
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in record.paths)
    record.entry = "__call__" if compiled else "_call_impl"
    places = (nn.Module, record.entry), (torch.autograd.Function, "apply"), (threading.Thread, "start")
    taken: list[tuple[object, str]] = []
    leave = functools.partial(_put_back, record, taken)
    try:
        forks.entered(leave)
        with _lock:
            _records.append(record)
            for place in places:
                owner, name = place
                held = _replaced.get(place)
                if held is None:
                    held = _replaced[place] = [owner.__dict__[name], 0]
                    setattr(owner, name, _REPLACEMENTS[name](held[0]))
                held[1] += 1
                taken.append(place)
        yield
    finally:
        forks.left(leave)


def _put_back(record: Record, taken: list[tuple[object, str]]) -> None:
    with _lock:
        if record in _records:
            _records.remove(record)
        while taken:  # each step of which can be done twice
            place = taken[-1]
            held = _replaced[place]
            users = held[1] - 1
            if not users:
                setattr(*place, held[0])
                del _replaced[place]
            held[1] = users
            taken.pop()


def _entered(name: str) -> Callable:
    def replacement(original):
        def call(module, *args, **kwargs):
            record = getattr(recording, "record", None)
            if record is None:
                _check_elsewhere(type(module).__name__, args)
            elif record.entry == name:
                # A compiled version would run what was compiled; the code that it was made of is followed instead.
                forward = original if name == "_call_impl" else nn.Module._call_impl
                return record.call_module(module, forward, args, kwargs)
            return original(module, *args, **kwargs)

        return call

    return replacement


def _check_elsewhere(called: object, args: tuple) -> None:
    """Of a call in a thread that makes no record: it must not be a worker of a forward that is recorded."""
    for t in tensors_in(args):
        for record in _records:
            memory = record.memory(t)
            if memory is not None and memory.read:
                record.stop(f"calls {called} in another thread, where it cannot be followed")


class _Elsewhere(TorchDispatchMode):
    """In a thread that a recorded forward started."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        _check_elsewhere(function, args)
        return function(*args, **(kwargs or {}))


def _applied(original):
    def apply(own, *args, **kwargs):
        record, forward = getattr(recording, "record", None), original.__get__(None, own)
        return forward(*args, **kwargs) if record is None else record.custom(own, forward, args, kwargs)

    return classmethod(apply)


def _started(original):
    def start(thread):
        if getattr(recording, "record", None) is not None:
            run = thread.run

            def watched():
                with _Elsewhere():
                    run()

            thread.run = watched
        original(thread)

    return start


_REPLACEMENTS = {
    "_call_impl": _entered("_call_impl"), "__call__": _entered("__call__"), "apply": _applied, "start": _started
}  # fmt: skip
