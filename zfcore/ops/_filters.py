"""The filters of a convolution as the CPU kernels read them, packed once and kept while the weight lives.

A kept packing is used again only if a hash of the weight says that not a bit of it has changed, by whatever way:
version counters do not see what is written through ``.data`` or another library's pointer.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch

from zfcore.ops import _boundary
from zfcore.ops._library import native


class _Kept(NamedTuple):
    hash: int
    filters: torch.Tensor


_lock = threading.Lock()
_kept: dict[int, dict[tuple, _Kept]] = {}  # of a weight by its id, for each way of packing it


def _forget(key: int) -> None:
    _kept.pop(key, None)


def packed(weight: torch.Tensor, scale: torch.Tensor | None, conv: tuple, groups: int) -> torch.Tensor:
    """weight: [K, C / groups, kh, kw] on the CPU; scale: [K] in the compute type, which multiplies it, or None."""
    dense = weight.detach().contiguous()
    threads = _boundary.threads()
    digest = native.hash_bytes(_boundary.address(dense), dense.nbytes, threads)
    if scale is not None:
        scale = scale.detach().to(dense.dtype if dense.dtype == torch.float64 else torch.float32).contiguous()
        digest ^= native.hash_bytes(_boundary.address(scale), scale.nbytes, 1) << 64
    way = (native.cpu_isa(), tuple(dense.shape), dense.dtype, conv[3], groups, scale is not None)
    key = id(weight)
    with _lock:
        found = _kept.get(key, {}).get(way)
    if found is not None and found.hash == digest:
        return found.filters
    size = native.packed_filters_bytes_cpu(_boundary.view(dense), conv, groups)
    filters = torch.empty(size, dtype=torch.uint8, device="cpu")
    native.pack_filters_cpu(
        _boundary.view(dense), _boundary.address(scale), _boundary.address(filters), conv, groups, threads
    )
    with _lock:
        if key not in _kept:
            _kept[key] = {}
            weakref.finalize(weight, _forget, key)
        _kept[key][way] = _Kept(digest, filters)
    return filters
