"""What the ops on patches of changes have in common: their arguments checked, and as the kernels take them."""

from __future__ import annotations

import torch

from zfcore.errors import DeviceError, DtypeError, ShapeError
from zfcore.ops import _boundary
from zfcore.reference._params import Places

DTYPES = (torch.float32, torch.float64)


def check(delta: torch.Tensor, places: Places, *maps: torch.Tensor | None) -> None:
    """maps: [N, C, H, W], of one N each, None for one that is not read."""
    if delta.dim() != 4 or delta.dtype not in DTYPES:
        raise DtypeError(f"delta of {delta.dtype} {tuple(delta.shape)}: expected float32 or float64 [B, C, h, w]")
    if 0 in delta.shape[1:] or 0 in places.size:
        raise ShapeError(f"delta of {tuple(delta.shape)}, a result of {tuple(places.size)}: expected none of 0")
    b = len(delta)
    check_indices(
        delta.device,
        ("image", places.image, (b,)),
        ("origin", places.origin, (b, 2)),
        ("out_origin", places.out_origin, (b, 2)),
    )
    for clean in maps:
        if clean is None:
            continue
        if clean.dim() != 4 or clean.dtype != delta.dtype:
            raise ShapeError(f"maps of {clean.dtype} {tuple(clean.shape)}: expected {delta.dtype} [N, C, H, W]")
        if clean.device != delta.device:
            raise DeviceError(f"maps on {clean.device}: expected {delta.device}, where delta is")
        # On a GPU it would have to be waited for; the kernels there look themselves.
        if b and delta.device.type == "cpu" and not 0 <= int(places.image.min()) <= int(places.image.max()) < len(clean):
            raise ShapeError(f"image: expected 0 to {len(clean) - 1}, of the clean maps")


def check_indices(device: torch.device, *indices: tuple[str, torch.Tensor, tuple[int, ...]]) -> None:
    """Each with its name and shape."""
    for name, value, shape in indices:
        if tuple(value.shape) != shape or value.dtype != torch.int64:
            raise ShapeError(f"{name} of {value.dtype} {tuple(value.shape)}: expected int64 {list(shape)}")
        if value.device != device:
            raise DeviceError(f"{name} on {value.device}: expected {device}, where the maps are")


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def empty(delta: torch.Tensor, channels: int, places: Places, out: torch.Tensor | None) -> torch.Tensor:
    """The result's memory, of delta's dtype and where it is: ``out`` where that fits."""
    shape = (len(places.image), channels, *places.size)
    if out is None:
        return torch.empty(shape, dtype=delta.dtype, device=delta.device, memory_format=torch.channels_last)
    if tuple(out.shape) != shape or out.dtype != delta.dtype or out.stride(1) != 1:
        raise ShapeError(f"out of {out.dtype} {tuple(out.shape)}: expected {delta.dtype} {shape}, channels last")
    return out


def native_change(
    delta: torch.Tensor, before: torch.Tensor, after: torch.Tensor, places: Places, out: torch.Tensor
) -> tuple[tuple, tuple]:
    """The tuple that the native kernels take, and what has to live while they run."""
    held = (*map(channels_last, (delta, before, after)), out, *(x.contiguous() for x in places[:3]))
    views = tuple(map(_boundary.view, held[:4]))
    return (*views, *map(_boundary.address, held[4:])), held


def for_triton(delta: torch.Tensor, *maps: torch.Tensor | None) -> tuple:
    """Each channels last, as the Triton kernels take them; those compute in float32."""
    if delta.dtype != torch.float32:
        raise DtypeError(f"delta of {delta.dtype}: the Triton kernels take float32; use_backend('reference') runs it")
    return tuple(None if x is None else channels_last(x) for x in (delta, *maps))
