"""What the ops on patches of changes have in common: their arguments checked, and as the kernels take them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zfcore.errors import DeviceError, DtypeError, ShapeError
from zfcore.ops import _boundary, _checks
from zfcore.reference._geometry import check_result
from zfcore.reference._params import Places

DTYPES = (torch.float32, torch.float64)
LARGE = 2**28  # elements: a result that memory may not hold


def check(delta: torch.Tensor, places: Places, *maps: torch.Tensor) -> tuple:
    """All of them, checked; maps: [N, C, H, W], of one N each."""
    delta = _checks.tensor("delta", delta)
    if delta.dim() != 4 or delta.dtype not in DTYPES:
        raise DtypeError(f"delta of {delta.dtype} {tuple(delta.shape)}: expected float32 or float64 [B, C, h, w]")
    if 0 in delta.shape[1:]:
        raise ShapeError(f"delta of {tuple(delta.shape)}: expected none of 0")
    places = check_places(places, delta.device, len(delta))
    checked = []
    for clean in maps:
        clean = _checks.tensor("maps", clean, delta.device)
        if clean.dim() != 4 or clean.dtype != delta.dtype:
            raise ShapeError(f"maps of {clean.dtype} {tuple(clean.shape)}: expected {delta.dtype} [N, C, H, W]")
        checked.append(clean)
    return delta, places, *checked


def check_images(places: Places, *maps: torch.Tensor | None) -> None:
    """That there is each image. The CPU's kernels look by themselves, and so do those of a GPU, which nobody waits for."""
    if places.image.device.type == "cuda":
        return
    low, high = _checks.ends("image", places.image)
    for clean in maps:
        if clean is not None and (low < 0 or high >= len(clean)):
            raise ShapeError(f"image: expected 0 to {len(clean) - 1}, of the clean maps")


def on_cpu(kernel: Callable, places: Places, maps: tuple[torch.Tensor | None, ...], *arguments: object) -> None:
    """Runs a native kernel. What it refuses is said of the images, if they are to blame."""
    _checks.explained(kernel, lambda: check_images(places, *maps), *arguments)


def check_places(places: Places, device: torch.device, b: int) -> Places:
    """``places`` of ``b`` patches, checked but for whether they lie inside their maps."""
    _checks.record("places", places, Places)
    image = check_index("image", places.image, device, (b,))
    origin = check_index("origin", places.origin, device, (b, 2))
    out_origin = check_index("out_origin", places.out_origin, device, (b, 2))
    size = _checks.pair("places.size", places.size, 1)
    if image is places.image and origin is places.origin and out_origin is places.out_origin and size is places.size:
        return places
    return Places(image, origin, out_origin, size)


def check_index(name: str, value: torch.Tensor, device: torch.device, shape: tuple[int, ...]) -> torch.Tensor:
    """``value`` when it is of int64 and of that shape."""
    value = _checks.tensor(name, value)
    if value.shape != shape or value.dtype != torch.int64:
        raise ShapeError(f"{name} of {value.dtype} {tuple(value.shape)}: expected int64 {list(shape)}")
    if value.device != device:
        raise DeviceError(f"{name} on {value.device}: expected {device}, where the maps are")
    return value


def check_out(
    out: torch.Tensor | None, like: torch.Tensor, channels: int, places: Places, *read: torch.Tensor | None
) -> torch.Tensor | None:
    """``out`` when the result fits it, channels last; read: what it must not share memory with."""
    rows, columns = places.size
    if out is None:
        if len(places.image) * channels * rows * columns > LARGE:
            check_result(like, len(places.image), channels, rows, columns)
        return None
    return _checks.result(out, like, (len(places.image), channels, rows, columns), *read, last=True)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def empty(delta: torch.Tensor, channels: int, places: Places, out: torch.Tensor | None) -> torch.Tensor:
    """The result's memory, of delta's dtype and where it is: ``out``, or fresh."""
    if out is not None:
        return out
    shape = (len(places.image), channels, *places.size)
    return torch.empty(shape, dtype=delta.dtype, device=delta.device, memory_format=torch.channels_last)


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
