"""The names of a network's tensors with the wrappers that add to them, and without."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping

# What wrappers call the network that they hold: torch.compile's, and those of data parallelism and averaged
# weights. In front of all names "model" is of the kind: training modules mostly call their network so.
_WRAPPERS = ("_orig_mod", "module")
_IN_FRONT = (*_WRAPPERS, "model")
_COUNTER = "n_averaged"


def readings(state: Mapping[str, object], own: Collection[str]) -> list[OrderedDict]:
    """The state as it is, and under the names that it has when wrappers of it or of the network are passed over.

    Args:
        state: values by name; the ``_metadata`` (versions of modules) that torch gave it is kept.
        own: the names of the network.

    Returns:
        those with the most names of the network first; of equals the less changed.
    """
    changes: list[Callable[[str], str | None]] = [lambda name: name]
    for front in _fronts(state):
        for own_front in _fronts(own):
            if front != own_front:
                changes.append(_Front(front, own_front))
    bare = {_bare(name): name for name in own}
    if len(bare) == len(own):
        # Paths of modules too, for the versions: of modules that wrap each other the innermost.
        paths = {f"{_bare(path)}.": f"{path}." for path in sorted((n.rpartition(".")[0] for n in own), key=len)}
        known = bare | paths
        changes.append(lambda name: known.get(_bare(name), _bare(name)))
    counter = next(filter(is_counter, own), None)
    found = [_renamed(state, change, counter) for change in changes]
    found = [each for each in found if each is not None]
    return sorted(found, key=lambda each: -sum(name in own for name in each))


def is_counter(name: str) -> bool:
    """Whether the name is that of torch's AveragedModel for the number of weights that it has averaged."""
    return _bare(name) == _COUNTER


class _Front:
    """Takes one front off a name and puts another there."""

    def __init__(self, front: str, other: str):
        self.front, self.other = front, other

    def __call__(self, name: str) -> str | None:
        return self.other + name[len(self.front) :] if name.startswith(self.front) else None


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _fronts(names: Iterable[str]) -> list[str]:
    """What all names begin with, while it is wrappers': "", "module.", "module._orig_mod.", ..."""
    names = [name for name in names if not is_counter(name)]
    found = [""]
    for part in names[0].split(".")[:-1] if names else ():
        front = f"{found[-1]}{part}."
        if part not in _IN_FRONT or not all(name.startswith(front) for name in names):
            break
        found.append(front)
    return found


def _renamed(
    state: Mapping[str, object], change: Callable[[str], str | None], counter: str | None
) -> OrderedDict | None:
    """The state under other names; None where two would be the same.

    A state of averaged weights loses their counter with its wrapper, or has it under the network's name for it.
    """
    changed = {name: change(name) for name in state}
    for name in filter(is_counter, state):
        front = name[: -len(_COUNTER)]
        if all(other.startswith(f"{front}module.") for other in state if other != name):
            changed[name] = counter
    kept = {name: other for name, other in changed.items() if other is not None}
    if len(set(kept.values())) < len(kept):
        return None
    renamed = OrderedDict((other, state[name]) for name, other in kept.items())
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        paths = {path: change(f"{path}.") for path in versions if path} | {"": ""}
        renamed._metadata = OrderedDict(
            (paths[path].rstrip("."), version) for path, version in versions.items() if paths[path] is not None
        )
    return renamed
