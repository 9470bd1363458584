"""Between torch and the native kernels: layouts, dtypes, devices, streams. Only here is data_ptr() called.

A kernel takes a tensor as (pointer, dtype code, sizes, strides) and reads any strides, expanded ones too. The
caller keeps the tensor alive for the call. Results are made here, so that no kernel allocates.
"""

from __future__ import annotations

import functools

import torch

from zfcore.reference import _geometry
from zfcore.reference._params import Pair, PoolParams

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}

threads = torch.get_num_threads


def view(x: torch.Tensor) -> tuple:
    """The tensor as the kernels take it; ``x`` must outlive their use of it."""
    return x.data_ptr(), _CODES[x.dtype], x.shape, x.stride()


def stream(device: torch.device) -> int:
    """The handle of the CUDA stream that work on ``device`` goes to now."""
    return torch.cuda.current_stream(device).cuda_stream


def empty(like: torch.Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised result, with the channels last in memory where ``like``, dense or a part, has them last."""
    _, channel, _, column = like.stride()
    layout = torch.channels_last if channel == 1 and column != 1 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


def filled(like: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``values`` in the layout of a result: what the reference computed, as a kernel would have written it."""
    return empty(like, values.shape, values.dtype).copy_(values)


@functools.lru_cache(maxsize=4096)
def pool_plan(size: Pair, pool: PoolParams) -> tuple[Pair, _geometry.Window]:
    """The pooled size and the kernels' window for a map of ``size``."""
    pooled = _geometry.pooled_size(size, pool)
    return pooled, _geometry.pool_window(size, pooled, pool)


@functools.lru_cache(maxsize=4096)
def unpool_plan(pooled: Pair, size: Pair, pool: PoolParams) -> _geometry.Window:
    """The kernels' window between a pooled map and a map of ``size``, which must pool to it."""
    _geometry.check_unpooled_size(pooled, pool, size)
    return _geometry.pool_window(size, pooled, pool)


@functools.lru_cache(maxsize=4096)
def step_plan(pooled, pool, conv, kernel, unpooled, size) -> tuple[_geometry.Window, _geometry.Window]:
    """The kernels' windows of the pooling and the convolution of one fused step."""
    _geometry.check_conv_transposed_size(pooled, pool, conv, kernel, unpooled, size)
    return _geometry.pool_window(unpooled, pooled, pool), _geometry.conv_window(kernel, unpooled, conv)


def raise_bad_switch(switches: torch.Tensor, index: int, size: Pair, window: _geometry.Window) -> None:
    """Raise SwitchError for the linear index that a kernel returned, if it returned one."""
    if index >= 0:
        raise _geometry.bad_switch(switches, index, size, window)
