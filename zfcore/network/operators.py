"""What the schemas of ATen operations say, looked up once each."""

from __future__ import annotations

from collections.abc import Callable
from types import UnionType

import torch
from torch import Tensor

from zfcore.network import aten
from zfcore.network.values import replaced

# They read a value, so that Python may go another way for other images.
_READING = frozenset((
    "item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "argwhere", "bincount", "histc", "nonzero_numpy", "is_same_size",
    "_is_all_true", "_is_any_true", "nonzero_static",
))  # fmt: skip
# They read a tensor's shape, dtype and device, and no value.
_LIKE = frozenset((
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "new_zeros",
    "new_ones", "new_empty", "new_full", "new_empty_strided",
))  # fmt: skip
# They return sizes, and what else is no value.
_ASKING = frozenset((
    "size", "sym_size", "numel", "sym_numel", "stride", "sym_stride", "storage_offset", "sym_storage_offset", "dim",
    "is_contiguous", "is_floating_point", "is_complex", "is_signed",
))  # fmt: skip
# Their shape is another tensor's.
_SHAPED = frozenset(("expand_as", "view_as", "reshape_as", "type_as"))
# They write to running statistics, which their schemas do not say, where this argument is true.
_UPDATING = {
    "batch_norm": "training", "native_batch_norm": "training", "cudnn_batch_norm": "training",
    "_batch_norm_impl_index": "training", "instance_norm": "use_input_stats",
}  # fmt: skip
_BLANK = frozenset(("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"))
# They return a view or a copy, as strides have it.
_MAYBE_COPIES = frozenset(("reshape", "flatten", "contiguous", "reshape_as", "type_as", "to", "_to_copy"))
# They may return what they were given.
_RETURNING = frozenset((
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "positive", "lift_fresh", "resolve_conj",
    "resolve_neg",
))  # fmt: skip
# They may do no more than order and pick channels.
_OF_CHANNELS = frozenset((
    "view", "reshape", "unflatten", "flatten", "_unsafe_view", "squeeze", "unsqueeze", "permute", "transpose", "swapaxes",
    "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "index_select", "flip", "roll", "index",
    "channel_shuffle", "native_channel_shuffle",
))  # fmt: skip
_MISSING = object()


class Operator:
    """One overload: its name (`conv2d` for ATen's, with the namespace for another library's), and what it does."""

    __slots__ = (
        "arguments", "asking", "blank", "function", "label", "like", "lists", "may_copy", "mutable", "name", "of_channels",
        "random", "reading", "returning", "rule", "shaped", "unknown", "updating", "view", "written",
    )  # fmt: skip

    def __init__(self, function):
        schema = function._schema
        library, _, plain = schema.name.partition("::")
        self.function = function
        if plain == "view" and function._overloadname == "dtype":
            plain = "view.dtype"  # the same bits as other numbers, which is no view of a map
        self.name = name = plain if library == "aten" else schema.name
        self.label = f"torch.ops.{library}.{plain}"
        self.unknown = f"calls {self.label}, which is not an operation that the engines read"
        self.arguments = [
            (a.name, a.default_value if a.has_default_value() else _MISSING, a.kwarg_only) for a in schema.arguments
        ]
        self.written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        self.mutable = schema.is_mutable
        self.view = bool(schema.returns) and schema.returns[0].alias_info is not None
        self.lists = len(schema.returns) == 1 and str(schema.returns[0].type).endswith("[]")
        self.random = torch.Tag.nondeterministic_seeded in function.tags
        self.reading, self.asking = name in _READING, name in _ASKING
        self.like, self.blank, self.shaped = name in _LIKE, name in _BLANK, name in _SHAPED
        self.updating = _UPDATING.get(name)
        self.may_copy, self.returning, self.of_channels = name in _MAYBE_COPIES, name in _RETURNING, name in _OF_CHANNELS
        self.rule = aten.RULES.get(name)

    def bound(self, args: tuple, kwargs: dict) -> dict[str, object]:
        """Arguments by their names, the schema's defaults among them."""
        given = {}
        for place, (name, default, only) in enumerate(self.arguments):
            if place < len(args) and not only:
                given[name] = args[place]
            else:
                given[name] = kwargs.get(name, default)
                if given[name] is _MISSING:
                    raise TypeError(f"{name} is missing")
        return given

    def unbound(self, given: dict[str, object]) -> tuple[tuple, dict]:
        only = {name for name, _, only in self.arguments if only}
        return tuple(v for k, v in given.items() if k not in only), {k: v for k, v in given.items() if k in only}

    def functional(self) -> Operator | None:
        """The operation that computes what this one, in place or with `out`, writes."""
        packet = getattr(torch.ops.aten, self.name.removesuffix("_"), None)
        if packet is None:
            return None
        targets = set(self.written) - {"self"}
        names = [name for name, _, _ in self.arguments if name not in targets]
        types = [str(a.type) for a in self.function._schema.arguments if a.name not in targets]
        overload = self.function._overloadname
        for found in (overload, overload.removesuffix("_out").removesuffix("out"), "default", *packet.overloads()):
            if found in packet.overloads():
                plain = operator(getattr(packet, found))
                own = [name for name, _, _ in plain.arguments]
                taken = [str(a.type) for a in plain.function._schema.arguments]
                if not plain.mutable and own[1:] == names[1:] and own[0] in (names[0], "input") and taken == types:
                    return plain
        return None

    def as_given(self, given: dict[str, object], result: object) -> object:
        """What an operation that writes returns: the tensors that it was given."""
        returns = self.function._schema.returns
        if not returns:
            return None
        if all(r.alias_info is not None for r in returns):
            written = [given[name] for name in self.written]
            return written[0] if len(returns) == 1 else tuple(written[: len(returns)])
        return result

    def structured(self, tensors: list[Tensor]) -> object:
        """Results as the operation returns them."""
        if self.lists:
            return list(tensors)
        return tensors[0] if len(tensors) == 1 else tuple(tensors)


_known: dict[object, Operator] = {}


def operator(function) -> Operator:
    found = _known.get(function)
    if found is None:
        found = _known[function] = Operator(function)
    return found


def tensors_in(args: tuple | list) -> list[Tensor]:
    """The tensors among arguments, and in their lists."""
    found = []
    for a in args:
        if isinstance(a, Tensor):
            found.append(a)
        elif type(a) in (list, tuple) and a and type(a[0]) is not int:  # else sizes, as most lists are
            found += tensors_in(a)
    return found


def with_tensors(given: object, by: Callable[[object], object], kind: type | UnionType = Tensor) -> object:
    """Arguments, each tensor replaced; or each value that stands for one, if that is the `kind`."""

    def one(leaf):
        return by(leaf) if isinstance(leaf, kind) else leaf

    if isinstance(given, dict):
        return {key: replaced(part, one) for key, part in given.items()}
    return replaced(given, one)
