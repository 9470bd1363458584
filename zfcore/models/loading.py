"""Tensors by name put into a network as torch's ``load_state_dict`` does: all of them, or none."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from zfcore.errors import WeightsError
from zfcore.models.memory import Span, covers, crowded, is_expanded, storage, unusable
from zfcore.models.renaming import readings

_NAMES_SHOWN = 8
_PLAIN_LOADS = (nn.Module._load_from_state_dict, _NormBase._load_from_state_dict)


def load_tensors(
    model: nn.Module,
    tensors: Mapping[str, object],
    strict: bool = True,
    kept_as: Mapping[str, str] | None = None,
    source: str = "tensors",
) -> None:
    """Copy tensors into the network's parameters and buffers, with the code that its modules have for it.

    Args:
        model: takes them under the names of its ``state_dict()``; wrappers on either side are passed over.
        tensors: dense ones by name; the extra state of a module may be anything.
        strict: refuse missing and unexpected names. Without it those are passed over, but some name must fit.
        kept_as: names that the source left out, with the name of the tensor whose memory they shared there.
        source: what the error says they are.

    Raises:
        WeightsError: they do not fit, or the network cannot take them; nothing of it was changed.
    """
    own = model.state_dict()
    unwritable: dict[str, list[str]] = {}
    for name, value in own.items():
        unwritable.setdefault(_unwritable(value), []).append(name)
    unwritable.pop("", None)
    if unwritable:
        raise _misfit(source, model, [f"{_shown(names)}: {why}" for why, names in unwritable.items()])
    first = None
    for state in readings(tensors, own):
        try:
            return _Load(model, own, state, strict, kept_as or {}, source).run()
        except WeightsError as error:
            first = first or error
    raise first


class _Load:
    """One state, under one reading of its names, for a network."""

    def __init__(
        self,
        model: nn.Module,
        own: Mapping[str, object],
        state: OrderedDict,
        strict: bool,
        kept_as: Mapping[str, str],
        source: str,
    ):
        self.model, self.own, self.state, self.strict = model, own, state, strict
        self.kept_as, self.source = kept_as, source

    def run(self) -> None:
        self.check(self.misfits())
        if not _runs_own_code(self.model):  # then what fits is known before anything is written
            missing = [name for name in self.own if name not in self.state]
            unexpected = [name for name in self.state if name not in self.own]
            self.check(self.shapes() + self.names(missing, unexpected, ()))
        before = _Before(self.model)
        copies = _Copies(self.own)
        with _writing(self.own.values()):
            try:
                with copies:
                    result = self.model.load_state_dict(self.state, strict=False)
                missing = getattr(result, "missing_keys", [])
                unexpected = getattr(result, "unexpected_keys", [])
                targets = [target for target, _ in copies.made]
                self.check(copies.problems + self.names(missing, unexpected, targets))
                if not copies.made and not self.strict:
                    self.check([f"none of its {len(self.state)} tensors has a name of the model's"])
            except BaseException as error:
                before.restore()
                if isinstance(error, WeightsError) or not isinstance(error, Exception):
                    raise
                problems = copies.problems or self.shapes() or [_said(error)]
                raise _misfit(self.source, self.model, problems) from error

    def check(self, problems: list[str]) -> None:
        if problems:
            raise _misfit(self.source, self.model, problems)

    def common(self) -> list[tuple[str, Tensor, Tensor]]:
        both = ((name, self.own[name], value) for name, value in self.state.items() if name in self.own)
        return [each for each in both if isinstance(each[1], Tensor) and isinstance(each[2], Tensor)]

    def misfits(self) -> list[str]:
        """Of dtypes, which torch would cast without a word."""
        same = ((name, own, given) for name, own, given in self.common() if own.shape == given.shape)
        return [f"{name} {why}" for name, own, given in same if (why := _lost(own, given))]

    def shapes(self) -> list[str]:
        return [
            f"{name} has shape {list(given.shape)}, expected {list(own.shape)}"
            for name, own, given in self.common()
            if own.shape != given.shape and not (own.dim() == 0 and given.shape == (1,))  # of torch 0.3
        ]

    def names(self, missing: Iterable[str], unexpected: list[str], targets: Iterable[Tensor]) -> list[str]:
        """What is missing but for tensors that need no value of their own, and what is unexpected."""
        if not self.strict:
            return []
        written = [own for _, own, _ in self.common()] + list(targets)
        optional = _optional(self.model)
        missing = [
            name
            for name in missing
            if name not in optional and not any(covers(each, self.own[name]) for each in written)
        ]
        kept = {name: self.kept_as[name] for name in missing if self.kept_as.get(name) in self.state}
        problems = _listed("missing", missing) + _listed("unexpected", unexpected)
        problems += [
            f"{name!r} was left out where it shared the memory of {other!r}, which it does not here"
            for name, other in kept.items()
        ]
        return problems


def _misfit(source: str, model: nn.Module, problems: list[str]) -> WeightsError:
    return WeightsError(f"{source} do not fit {type(model).__name__}: " + "; ".join(problems))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _listed(kind: str, names: list[str]) -> list[str]:
    return [f"{kind} {_shown(names)}"] if names else []


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:_NAMES_SHOWN])) + more


def _unwritable(value: object) -> str:
    if not isinstance(value, Tensor):
        return ""  # extra state
    if not (why := unusable(value)) and is_expanded(value):
        why = "expanded: some of its elements are the same memory"
    return why


def _runs_own_code(model: nn.Module) -> bool:
    """Whether some module changes names or values while it loads, or keeps more than tensors."""
    return type(model).load_state_dict is not nn.Module.load_state_dict or any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or type(module)._load_from_state_dict not in _PLAIN_LOADS
        or type(module).set_extra_state is not nn.Module.set_extra_state
        for module in model.modules()
    )


def _optional(model: nn.Module) -> set[str]:
    """Counters that no answer depends on: batches that a normalisation has seen, weights that were averaged."""
    return {
        f"{path}.{counter}" if path else counter
        for path, module in model.named_modules(remove_duplicate=False)
        for counter in ("num_batches_tracked", "n_averaged")
        if isinstance(module, _NormBase if counter == "num_batches_tracked" else AveragedModel)
    }


def _lost(own: Tensor, given: Tensor) -> str:
    """How the given numbers would change in the dtype of the own, or an empty string."""
    if own.dtype == given.dtype:
        return ""
    if _kind(own) != _kind(given):
        return f"has dtype {given.dtype}, expected {own.dtype}"
    if _kind(own) == "whole":
        limits, numbers = torch.iinfo(own.dtype), given.cpu().numpy()  # torch compares no unsigned ones
        kept = not numbers.size or limits.min <= int(numbers.min()) <= int(numbers.max()) <= limits.max
    else:
        limits = torch.finfo(own.dtype)
        # Some dtypes of eight bits have their largest number for what is larger.
        past = _readable(given).abs() > limits.max * (1 + limits.eps)
        kept = not (_finite(given) & (past | ~_finite(given.to(own.dtype)))).any()
    return "" if kept else f"has dtype {given.dtype} and numbers that {own.dtype} cannot hold"


def _finite(tensor: Tensor) -> Tensor:
    return torch.isfinite(_readable(tensor))


def _readable(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.itemsize == 1 else tensor  # torch computes with no dtype of eight bits


def _kind(tensor: Tensor) -> str:
    if tensor.dtype is torch.bool:
        return "bool"
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"


def _writing(tensors: Iterable[object]) -> contextlib.AbstractContextManager:
    """Where these tensors may be written: those made in inference mode only there."""
    inference = any(isinstance(each, Tensor) and each.is_inference() for each in tensors)
    return torch.inference_mode() if inference else contextlib.nullcontext()


class _Copies(TorchFunctionMode):
    """Sees each copy into a tensor, and whether what was copied before is still there after it."""

    def __init__(self, own: Mapping[str, object]):
        super().__init__()
        self.own = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        self.crowded = crowded(self.own.values())
        self.made: list[tuple[Tensor, Tensor]] = []
        self.problems: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not Tensor.copy_ or len(args) < 2 or args[0] is args[1]:
            return function(*args, **(kwargs or {}))
        target, value = args[:2]
        if why := _unwritable(target):
            raise WeightsError(why)
        if why := _lost(target, value):
            self.problems.append(f"{self.names(target)} {why}")
            return target
        result = function(*args, **(kwargs or {}))
        self.made.append((target, value))
        span = Span.of(target)
        if span in self.crowded:
            together = [(other, given) for other, given in self.made if Span.of(other).overlaps(span)]
            if not all(_holds(other, given) for other, given in together):
                self.problems.append(f"elements of {self.names(target)} share memory and were given different values")
        return result

    def names(self, target: Tensor) -> str:
        span = Span.of(target)
        return " and ".join(repr(name) for name, own in self.own.items() if Span.of(own).overlaps(span))


def _holds(target: Tensor, given: Tensor) -> bool:
    given = given.to(target.device, target.dtype)
    return torch.equal(*(each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (target, given)))


class _Before:
    """What a network holds, to be put back: values, and whatever code that loads may have changed."""

    def __init__(self, model: nn.Module):
        self.modules = [(module, _copied(module.__dict__)) for module in model.modules()]
        kept = {id(each): each for module in model.modules() for each in _tensors(module)}.values()
        self.tensors = [(each, each.detach(), each.detach().clone()) for each in kept if not _unwritable(each)]
        self.versions = [None if each.is_inference() else each._version for each, _, _ in self.tensors]
        self.extra = [
            (module, _own_copy(module.get_extra_state()))
            for module in model.modules()
            if type(module).set_extra_state is not nn.Module.set_extra_state
        ]

    def restore(self) -> None:
        for (tensor, place, values), version in zip(self.tensors, self.versions, strict=True):
            if (tensor.shape, storage(tensor)) != (place.shape, storage(place)):
                tensor.data = place
            if version is None or place._version != version:
                with torch.no_grad():
                    place.copy_(values)
        for module, attributes in self.modules:
            for name, (value, content) in attributes.items():
                _refill(value, content)
            for name in [name for name in module.__dict__ if name not in attributes]:
                del module.__dict__[name]
            module.__dict__.update({name: value for name, (value, _) in attributes.items()})
        for module, state in self.extra:
            module.set_extra_state(state)


def _own_copy(state: object) -> object:
    try:
        return copy.deepcopy(state)
    except Exception:  # noqa: BLE001 - the class is the user's, and may not be copied
        return state


def _tensors(module: nn.Module) -> list[Tensor]:
    values = (*module._parameters.values(), *module._buffers.values())
    return [each for each in values if each is not None]


def _copied(attributes: dict) -> dict[str, tuple[object, object]]:
    """Each attribute, and what it holds where it is one of Python's own containers."""
    containers = (dict, OrderedDict, list, set)
    return {name: (each, copy.copy(each) if type(each) in containers else None) for name, each in attributes.items()}


def _refill(value: object, content: object) -> None:
    if isinstance(content, list):
        value[:] = content
    elif content is not None:
        value.clear()
        value.update(content)
