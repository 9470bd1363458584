"""Between torch and the native kernels: layouts, dtypes, devices, streams. Only here is data_ptr() called.

A kernel takes a tensor as (pointer, dtype code, sizes, strides) and reads any strides, expanded ones too. The
caller keeps the tensor alive for the call. Results are made here, so that no kernel allocates.
"""

from __future__ import annotations

import functools

import torch

from zfcore import forks
from zfcore.errors import DtypeError, ShapeError
from zfcore.reference._geometry import (
    Spec,
    Window,
    bad_switch,
    check_conv_transposed_size,
    check_gather_switches,
    check_map,
    check_result,
    check_switches,
    check_unpooled_size,
    check_weight,
    conv_window,
    pool_window,
    pooled_size,
)
from zfcore.reference._params import (
    ConvParams,
    Pair,
    PoolParams,
    conv_params,
    overlap_mode,
    pool_params,
    two,
)

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}

_LOW = 2**40  # below, that an address may be the offset of a part of no memory

def threads() -> int:
    """How many threads a kernel may use: torch's number, and one in a forked process, where OpenMP would wait
    for ever for the threads that stayed in the parent.
    """
    return 1 if forks.forked else torch.get_num_threads()


def pointer(x: torch.Tensor, name: str = "") -> int:
    """Where the tensor's values lie; ``name``: of the argument, for the error where they lie nowhere."""
    try:
        found = x.data_ptr()
    except RuntimeError as error:  # what transforms and tracers of torch pass around
        raise _without_memory(x, name) from error
    if found < _LOW and is_null(x, found):
        raise _without_memory(x, name)
    return found


def is_somewhere(x: torch.Tensor) -> bool:
    """Whether the tensor, a plain one, lies in memory for certain: of others, `pointer` says more."""
    return x.data_ptr() >= _LOW


def has_address(x: torch.Tensor) -> bool:
    """Whether the tensor's values, if it has any, are said to lie anywhere."""
    return x.data_ptr() != 0


def is_null(x: torch.Tensor, address: int) -> bool:
    """Whether the address of its first value is one in no memory: that of a part of a freed tensor is not 0."""
    return address == x.storage_offset() * x.itemsize and x.numel() > 0


def _without_memory(x: torch.Tensor, name: str = "") -> DtypeError:
    said = f"{name}: a {type(x).__name__}" if name else f"a {type(x).__name__}"
    return DtypeError(
        f"{said} of shape {tuple(x.shape)} has no memory of its own (it was freed, or another object holds the values): "
        "expected a plain tensor"
    )


def is_dense(x: torch.Tensor) -> bool:
    """Whether its elements fill one stretch of memory, as most do; another order than these two is not noticed."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def span(x: torch.Tensor) -> tuple[int, int]:
    """The addresses of its first byte and of the one after its last; (0, 0) where there are no values."""
    if x.is_meta:
        return 0, 0
    first = pointer(x)
    if is_dense(x):
        return first, first + x.nbytes
    if not x.numel():
        return 0, 0
    return first, first + (sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True)) + 1) * x.itemsize


def view(x: torch.Tensor) -> tuple:
    """The tensor as the kernels take it; ``x`` must outlive their use of it."""
    try:
        memory, code = x.data_ptr(), _CODES[x.dtype]
    except RuntimeError as error:
        raise _without_memory(x) from error
    except KeyError:
        raise DtypeError(f"a tensor of {x.dtype}: expected one of {', '.join(map(str, _CODES))}") from None
    if memory < _LOW and is_null(x, memory):
        raise _without_memory(x)
    return memory, code, x.shape, x.stride()


def memory(x: torch.Tensor) -> tuple[int, int]:
    """Where a contiguous tensor lies, and its bytes; ``x`` must outlive its use."""
    return address(x), x.nbytes


def address(x: torch.Tensor | None) -> int:
    """Where a contiguous tensor lies, 0 for None; ``x`` must outlive its use."""
    if x is None:
        return 0
    if not x.is_contiguous():
        raise ShapeError(f"a tensor of shape {tuple(x.shape)} and strides {x.stride()}: expected a contiguous one")
    return pointer(x)


def stream(device: torch.device) -> int:
    """The handle of the CUDA stream that work on ``device`` goes to now."""
    return torch.cuda.current_stream(device).cuda_stream


def empty(like: torch.Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised result, with the channels last in memory where ``like``, whole or a part, has them."""
    _, channel, _, column = like.stride()
    if channel == 1 and column != 1:
        return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)
    return like.new_empty(shape, dtype=dtype)


@functools.lru_cache(maxsize=4096)
def pool_plan(x: Spec, pool: PoolParams) -> tuple[tuple, Window]:
    """The shape of the pooled map and the kernels' window. Checks everything, once for equal arguments.

    The registered ops are called with numbers that nobody has checked: by exported programs, and by hand.
    """
    check_map("x", x)
    pool = pool_params(*pool)
    size = tuple(x.shape[2:])
    pooled = pooled_size(size, pool)
    check_result(x, *x.shape[:2], *pooled)
    return (*x.shape[:2], *pooled), pool_window(size, pooled, pool)


@functools.lru_cache(maxsize=4096)
def unpool_plan(y: Spec, switches: Spec, pool: PoolParams, size: Pair, overlap: str) -> tuple[tuple, Window]:
    """As ``pool_plan``, of unpooling to ``size``."""
    check_map("y", y)
    check_switches(y, switches)
    overlap_mode(overlap)
    pool, size = pool_params(*pool), two("output_size", size)
    pooled = tuple(y.shape[2:])
    check_unpooled_size(pooled, pool, size)
    check_result(y, *y.shape[:2], *size)
    return (*y.shape[:2], *size), pool_window(size, pooled, pool)


@functools.lru_cache(maxsize=4096)
def gather_plan(x: Spec, switches: Spec, pool: PoolParams, overlap: str) -> Window:
    """As ``pool_plan``, of reading the switches' places; the result has the shape of the switches."""
    check_map("x", x)
    check_gather_switches(x, switches)
    overlap_mode(overlap)
    pool = pool_params(*pool)
    size, pooled = tuple(x.shape[2:]), tuple(switches.shape[2:])
    check_unpooled_size(pooled, pool, size)
    check_result(x, *switches.shape)
    return pool_window(size, pooled, pool)


@functools.lru_cache(maxsize=4096)
def step_plan(
    y: Spec,
    switches: Spec,
    weight: Spec,
    pool: PoolParams,
    conv: ConvParams,
    unpooled: Pair,
    size: Pair,
    overlap: str,
) -> tuple[tuple, Window, Window]:
    """As ``pool_plan``, of the fused step, with the windows of the pooling and of the convolution."""
    check_map("y", y)
    check_switches(y, switches)
    pool, conv = pool_params(*pool), conv_params(*conv)
    unpooled, size = two("unpooled_size", unpooled), two("output_size", size)
    check_weight(y, weight, conv.groups)
    overlap_mode(overlap)
    pooled, kernel = tuple(y.shape[2:]), tuple(weight.shape[2:])
    check_conv_transposed_size(pooled, pool, conv, kernel, unpooled, size)
    shape = (y.shape[0], weight.shape[1] * conv.groups, *size)
    check_result(y, *shape)
    return shape, pool_window(unpooled, pooled, pool), conv_window(kernel, unpooled, conv)


def raise_bad_switch(switches: torch.Tensor, index: int, size: Pair, window: Window) -> None:
    """Raise SwitchError for the linear index that a kernel returned, if it returned one."""
    if index >= 0:
        raise bad_switch(switches, index, size, window)
