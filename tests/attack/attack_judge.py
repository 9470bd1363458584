"""One case of the attack: what the op did with it, and whether its definition says the same."""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import traceback
from collections.abc import Callable

import attack_calls
import attack_hostile
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

import zfcore
from zfcore.errors import SwitchError, ZfcoreError
from zfcore.ops._library import native

# What can come of a case that the process survives. The first four are right.
ANSWER, TYPED, SCHEMA, MEMORY = "answer", "typed", "schema", "memory"
BARE, UNHELD, WRONG, REFUSED = "bare", "unheld", "wrong", "refused"
RIGHT = (ANSWER, TYPED, SCHEMA, MEMORY)

OURS = os.path.dirname(zfcore.__file__)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# What torch says of odd tensors that it cannot join, though the op could: no word of the definition's.
JOINED = re.compile("Creating a new Tensor subclass|Inference tensors cannot be saved|cannot be called on meta tensors")
DISPATCHERS = ("Multiple dispatch failed", "Could not run 'zfcore::", "Inference tensors cannot be saved for backward",
               "Creating a new Tensor subclass")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # which torch does not compare
EXTREME = 1e4  # of a value: sums of larger ones cancel, or overflow, as the order has it
MOVING = ("max_pool", "zfcore::unpool2d", "unpool_relu2d", "gather", "strongest")  # ops that only move values
SINGULAR = {"alpha", "beta", "k"}  # of a normalisation: hostile ones divide by next to nothing
NO_MEMORY = re.compile("not enough memory|can't allocate|cannot allocate|[Oo]ut of memory|[Ss]torage size calculation")


def judge(name: str, seed: int, defining: Callable[[], None] = lambda: None) -> tuple[str, str]:
    """The outcome of a case, and for one that is not right a sentence. ``defining`` is called once the op is done."""
    op = attack_calls.OPS[name]
    isas = native.usable_isas()
    native.set_cpu_isa(isas[seed // 3 % len(isas)])
    with _mode(seed):
        args, changed = attack_calls.case(name, seed)
        try:
            ours = op.run(**args)
        except Exception as error:
            if op.define is None:
                return TYPED, ""
            outcome, said = _error(error)
            if not changed and outcome == TYPED:
                return _refused(op, name, seed, said, defining)
            return outcome, said
        if op.define is None:
            return ANSWER, ""
        defining()
        again = _again(name, seed)
        touched = {str(key) for path in changed for key in path}
        out = again.get("out")
        shared = _shares(args.get("out"), args)
        if not shared and (written := _written(args, again)):
            return WRONG, f"the op wrote to its argument {written}"
        try:
            wanted = op.define(**again)
        except Exception as error:
            if _out_of_memory(error):
                return ANSWER, ""
            if isinstance(error, SwitchError) and ("switches" in op.trusted or not _readable(ours)):
                return ANSWER, ""
            # Values of a fake tensor, which the definition asks for and a fake kernel must not.
            if isinstance(error, DataDependentOutputException) or JOINED.search(str(error)):
                return ANSWER, ""
            return UNHELD, f"answered, where the definition raises {type(error).__name__}: {_short(error)}"
        if touched & set(op.trusted) or shared:
            return ANSWER, ""
        if out is not None and "out" in again and isinstance(out, torch.Tensor) and ours is not args["out"]:
            return WRONG, "the result is not the memory that was given"
        extreme = not any(part in name for part in MOVING) and (_extreme(args) or bool(touched & SINGULAR))
        difference = _differ(ours, wanted, 0 if extreme else _largest(again), not extreme, name)
        return (WRONG, difference) if difference else (ANSWER, "")


def define(name: str, seed: int) -> object:
    """What the definition alone gives for the case."""
    with _mode(seed):
        return attack_calls.OPS[name].define(**_again(name, seed))


def _again(name: str, seed: int) -> dict:
    """The arguments drawn once more, as the definition takes them: the op may have written to the first."""
    return attack_hostile.as_numbers(attack_calls.case(name, seed)[0])


@contextlib.contextmanager
def _mode(seed: int):
    with contextlib.ExitStack() as stack:
        if seed % 5 == 1:
            stack.enter_context(torch.no_grad())
        elif seed % 11 == 2:
            stack.enter_context(torch.inference_mode())
        yield


def _refused(op, name, seed, said, defining) -> tuple[str, str]:
    """A good call that is refused is right only where its definition refuses it too."""
    defining()
    try:
        op.define(**_again(name, seed))
    except Exception:
        return TYPED, said
    return REFUSED, f"a good call, refused: {said}"


def _error(error: Exception) -> tuple[str, str]:
    """Which kind of error it is."""
    said = f"{type(error).__name__}: {_short(error)}"
    if isinstance(error, ZfcoreError):
        if len(str(error)) > 4000:
            return BARE, f"a message of {len(str(error))} characters: {said}"
        return TYPED, said
    if _out_of_memory(error):
        return MEMORY, said
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(OURS)]
    if not ours or str(error).startswith(DISPATCHERS):
        return SCHEMA, said  # torch refused it before any kernel of ours ran
    last = ours[-1]
    if type(error) is ValueError and "native." in linecache.getline(last.filename, last.lineno):
        return TYPED, said  # as documented: what the native kernel refuses
    return BARE, f"{said} [{os.path.relpath(last.filename, OURS)}:{last.name}]"


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:240] if lines else ""


def _tensors(args: dict) -> list[tuple[tuple, torch.Tensor]]:
    """The tensors of a call whose values can be read as they are."""
    return [
        (path, part)
        for path, part in attack_hostile.nodes(args)
        if isinstance(part, torch.Tensor) and _readable(part)
    ]


def _readable(x: object) -> bool:
    plain = type(x) in (torch.Tensor, torch.nn.Parameter, attack_hostile.Subclass)
    if not plain or x.device.type != "cpu" or x.layout != torch.strided or x.is_quantized or x.is_nested:
        return False
    return x.numel() == 0 or x._is_zerotensor() or x.untyped_storage().nbytes() > 0


def _written(args: dict, again: dict) -> str:
    """The name of an argument that the op changed, or nothing."""
    before = dict(_tensors(again))
    for path, x in _tensors(args):
        if path[0] != "out" and path in before and x.dtype not in FLOAT8 and not _same(x, before[path]):
            return ".".join(map(str, path))
    return ""


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_floating_point() or a.is_complex():
        a, b = a.nan_to_num(), b.nan_to_num()
    return torch.equal(a, b)


def _shares(out: object, args: dict) -> bool:
    """Whether ``out`` lies in the memory of another argument: what is read of that is then nobody's promise."""
    if not isinstance(out, torch.Tensor) or not _readable(out) or out._is_zerotensor():
        return False
    own = out.untyped_storage().data_ptr()
    others = (x for path, x in _tensors(args) if path[0] != "out" and not x._is_zerotensor())
    return any(x.untyped_storage().data_ptr() == own for x in others)


def _largest(args: dict) -> float:
    """The largest finite number that goes in, to whose last bits a difference of its like is right."""
    largest = 0.0
    for _, x in _tensors(args):
        if x.is_floating_point() and x.numel():
            x = x.detach().double()
            largest = max(largest, float(torch.where(x.isfinite(), x, 0).abs().max()))
    return largest


def _extreme(args: dict) -> bool:
    numbers = [part for _, part in attack_hostile.nodes(args) if type(part) is float]
    return _largest(args) > EXTREME or any(abs(x) > EXTREME for x in numbers if x != float("inf"))


def _differ(ours: object, wanted: object, about: float, values: bool, name: str) -> str:
    """In what a result differs from the definition's, or nothing."""
    if isinstance(ours, tuple) and isinstance(wanted, tuple):
        if name == "conv_strongest" and not _differ(ours[1], wanted[1], about, values, "value"):
            return _differ(ours[0], wanted[0], about, False, "index")  # of two as good as equal, either
        parts = (_differ(a, b, about, values, name) for a, b in zip(ours, wanted, strict=True))
        return next(filter(None, parts), "")
    if not isinstance(ours, torch.Tensor) or not isinstance(wanted, torch.Tensor):
        return f"a {type(ours).__name__}: the definition gives a {type(wanted).__name__}"
    for what in ("shape", "dtype", "device"):
        a, b = getattr(ours, what), getattr(wanted, what)
        if a != b:
            return f"{what} {a}: the definition gives {b}"
    if not values or not _readable(ours) or not _readable(wanted):
        return ""
    kind, ours, wanted = ours.dtype, ours.detach().double(), wanted.detach().double()
    if not torch.equal(ours.isnan(), wanted.isnan()):
        return f"{int(ours.isnan().sum())} NaN: the definition gives {int(wanted.isnan().sum())} of {wanted.numel()}"
    infinite = wanted.isinf() | ours.isinf()
    if not torch.equal(ours[infinite], wanted[infinite]):
        return "infinite elsewhere than the definition is"
    finite = wanted.isfinite()
    if not finite.any():
        return ""
    error = float((ours - wanted)[finite].abs().max())
    eps = torch.finfo(kind).eps if kind.is_floating_point else 0
    allowed = TOLERANCE.get(kind, 0) * float(wanted[finite].abs().max()) + 16 * eps * about
    return f"off by {error:.3g}, of {float(wanted[finite].abs().max()):.3g}" if error > allowed else ""
