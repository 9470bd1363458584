"""The filters of a convolution as the CPU kernels read them, packed once and kept while the weight lives.

A kept packing is used again only if a hash of the weight says that not a bit of it has changed, by whatever way:
version counters do not see what is written through ``.data`` or another library's pointer.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from zfcore import forks
from zfcore.ops import _boundary
from zfcore.ops._library import native


class _Kept(NamedTuple):
    hash: tuple  # of the weight and of its scale
    packed: object


_kept: dict[int, dict[tuple, _Kept]] = {}  # of a weight by its id, for each way of packing it


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


_renew_lock()
forks.renewed(_renew_lock)


def _forget(key: int) -> None:
    _kept.pop(key, None)


class _Held(threading.local):
    packed: dict | None = None  # the weight, its scale and the packing, by the weight's id and the way


_held = _Held()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within this, in this thread, a weight is looked at once: for one call, in which no code of a user's runs."""
    before, _held.packed = _held.packed, {}
    try:
        yield
    finally:
        _held.packed = before


def _packed(weight: torch.Tensor, scale: torch.Tensor | None, way: tuple, pack: Callable) -> object:
    """pack(weight, scale), both contiguous and the scale in the compute type, or what it returned for the same bits."""
    if _held.packed is None:
        return _looked_up(weight, scale, way, pack)
    key = id(weight), scale is None, way
    found = _held.packed.get(key)
    if found is None or (scale is not None and not torch.equal(found[1], scale)):
        found = _held.packed[key] = weight, scale, _looked_up(weight, scale, way, pack)
    return found[2]


def _looked_up(weight: torch.Tensor, scale: torch.Tensor | None, way: tuple, pack: Callable) -> object:
    """As `_packed`, with the weight looked at."""
    dense = weight.detach().contiguous()
    digest = (native.hash_bytes(_boundary.address(dense), dense.nbytes, _boundary.threads()),)
    if scale is not None:
        scale = scale.detach().to(dense.dtype if dense.dtype == torch.float64 else torch.float32).contiguous()
        digest += (native.hash_bytes(_boundary.address(scale), scale.nbytes, 1),)
    way = (native.cpu_isa(), tuple(dense.shape), dense.dtype, scale is not None, *way)
    key = id(weight)
    with _lock:
        found = _kept.get(key, {}).get(way)
    if found is not None and found.hash == digest:
        return found.packed
    result = pack(dense, scale)
    with _lock:
        if key not in _kept:
            _kept[key] = {}
            weakref.finalize(weight, _forget, key)
        _kept[key][way] = _Kept(digest, result)
    return result


def for_deconv(weight: torch.Tensor, scale: torch.Tensor | None, conv: tuple, groups: int) -> torch.Tensor:
    """What ``deconv_step`` reads. weight: [K, C / groups, kh, kw] on the CPU; scale: [K], which multiplies it, or None."""

    def pack(dense: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        size = native.packed_filters_bytes_cpu(_boundary.view(dense), conv, groups)
        filters = torch.empty(size, dtype=torch.uint8, device="cpu")
        native.pack_filters_cpu(
            _boundary.view(dense),
            _boundary.address(scale),
            _boundary.memory(filters),
            conv,
            groups,
            _boundary.threads(),
        )
        return filters

    return _packed(weight, scale, ("deconv", conv[3], groups), pack)


def pack_for_delta(
    weight: torch.Tensor, scale: torch.Tensor | None, groups: int, narrow: bool
) -> tuple[torch.Tensor, bool]:
    """As `for_delta`, packed for this call; weight: [K, C / groups, kh, kw] and scale, contiguous."""
    view = _boundary.view(weight)
    filters = torch.empty(native.delta_filters_bytes_cpu(view, groups, narrow), dtype=torch.uint8, device="cpu")
    finite = native.pack_delta_filters_cpu(
        view, _boundary.address(scale), _boundary.memory(filters), groups, narrow, _boundary.threads()
    )
    return filters, finite


def for_delta(
    weight: torch.Tensor, scale: torch.Tensor | None, shape: tuple, groups: int, narrow: bool
) -> tuple[torch.Tensor, bool]:
    """What ``conv_delta`` reads, and whether all of it is finite.

    weight: float32 or float64 on the CPU, [K, C / groups, kh, kw] once it has that ``shape``; scale: [K] or None.
    narrow: rounded to bf16, float32 only.
    """
    return _packed(
        weight,
        scale,
        ("delta", shape, groups, narrow),
        lambda dense, scale: pack_for_delta(dense.view(shape), scale, groups, narrow),
    )
