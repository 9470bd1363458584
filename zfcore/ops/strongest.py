"""Where units are strongest."""

from __future__ import annotations

import torch

from zfcore import reference
from zfcore.errors import DeviceError, DtypeError, ShapeError, UnitNotFound
from zfcore.ops import _boundary, _checks
from zfcore.ops._library import choosing, native
from zfcore.reference._geometry import FLOATS

_CPU = torch.device("cpu")


def _check_units(maps, units):
    low, high = _checks.ends("units", units)
    if low < 0 or high >= maps.size(1):
        raise UnitNotFound(f"units {low} to {high}: expected 0 to {maps.size(1) - 1}")


def _reference(maps, units):
    _check_units(maps, units)
    return reference.strongest(maps, units.to(maps.device, non_blocking=maps.is_cuda))


def _cpu(maps, units):
    units = units.contiguous()
    index = torch.empty((len(maps), len(units)), dtype=torch.int64, device="cpu")
    call = _boundary.view(maps), _boundary.address(units), len(units), _boundary.address(index), _boundary.threads()
    _checks.explained(native.strongest_cpu, lambda: _check_units(maps, units), *call)
    return index


_run = choosing(
    "strongest", {"reference": _reference, "cpu": _cpu, "cuda": _reference}
)  # on CUDA torch's own reductions are the kernel


def strongest(maps: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """The position of the largest value of each chosen map.

    Args:
        maps: [N, C, H, W] float, any layout, none of H and W 0.
        units: [U] int64, each under C; on the CPU, so that a GPU is not waited for to check them, or where maps are.

    Returns:
        [N, U] int64, y * W + x: NaN is passed over, the first of equals is taken, and 0 where all are NaN.

    Raises:
        ShapeError, DtypeError, UnitNotFound: the arguments do not belong together.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.1.
    """
    maps = _checks.tensor("maps", maps)
    units = _checks.tensor("units", units)
    if maps.dim() != 4 or 0 in maps.shape[2:]:
        raise ShapeError(f"maps of shape {tuple(maps.shape)}: expected [N, C, H, W], H and W not 0")
    if maps.dtype not in FLOATS or units.dtype != torch.int64 or units.dim() != 1:
        raise DtypeError(f"maps of {maps.dtype}, units of {units.dtype}: expected float maps and int64 [U]")
    if units.device not in (maps.device, _CPU):
        raise DeviceError(f"units on {units.device}: expected the CPU or {maps.device}, where maps are")
    return _run(maps, units)
