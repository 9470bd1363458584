"""Where the units of a convolution are strongest, its maps never made: for the first layer. No gradient."""

from __future__ import annotations

import torch

from zfcore import reference
from zfcore.errors import DtypeError, ShapeError, UnitNotFound
from zfcore.ops import _boundary, _checks
from zfcore.ops._checks import Window
from zfcore.ops._library import choosing, native
from zfcore.reference._geometry import check_result
from zfcore.reference._params import Pair


def _check(images, weight, bias, units, conv, size):
    images = _checks.tensor("images", images)
    weight = _checks.tensor("weight", weight, images.device)
    bias = _checks.optional("bias", bias, images.device)
    units = _checks.tensor("units", units, images.device)
    conv = _checks.window("conv", conv)
    size = _checks.pair("size", size, 1)
    four = images.dim() == weight.dim() == 4
    if not four or images.size(1) != weight.size(1) or 0 in weight.shape[1:]:
        raise ShapeError(
            f"images of shape {tuple(images.shape)}, weight of shape {tuple(weight.shape)}: "
            "expected [N, C, H, W] and [K, C, kh, kw]"
        )
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ShapeError(f"bias of shape {tuple(bias.shape)}: expected [{len(weight)}]")
    kinds = {x.dtype for x in (images, weight, bias) if x is not None}
    if kinds != {torch.float32} or units.dtype != torch.int64:
        raise DtypeError(
            f"images, weight, bias of {kinds}, units of {units.dtype}: expected float32 and int64"
        )
    if units.dim() != 1:
        raise ShapeError(f"units of shape {tuple(units.shape)}: expected [U]")
    for axis in (0, 1):
        k, s, p, d = (value[axis] for value in conv)
        spare = images.shape[2 + axis] + 2 * p - d * (k - 1)  # padding="same" may put one more at the end
        if k != weight.shape[2 + axis] or not (size[axis] - 1) * s <= spare:
            raise ShapeError(f"conv={conv}, size={size}: expected the weight's kernel and a size it gives")
    check_result(images, len(images), len(units), *size)  # the maps, which are not made but searched
    return images, weight, bias, units, conv, size


def _check_units(weight, units):
    low, high = _checks.ends("units", units)
    if low < 0 or high >= len(weight):
        raise UnitNotFound(f"units {low} to {high}: expected 0 to {len(weight) - 1}")


def _reference(images, weight, bias, units, conv, size):
    _check_units(weight, units)
    return reference.conv_strongest(images, weight, bias, units, conv, size)


def _cpu(images, weight, bias, units, conv, size):
    bias = None if bias is None else bias.contiguous()
    units = units.contiguous()
    index = torch.empty((len(images), len(units)), dtype=torch.int64, device="cpu")
    value = torch.empty(index.shape, dtype=torch.float32, device="cpu")
    call = (
        _boundary.view(images),
        _boundary.view(weight),
        _boundary.address(bias),
        _boundary.address(units),
        len(units),
        conv,
        size,
        _boundary.address(value),
        _boundary.address(index),
        _boundary.threads(),
    )
    _checks.explained(native.conv_strongest_cpu, lambda: _check_units(weight, units), *call)
    return index, value


_run = choosing("conv_strongest", {"reference": _reference, "cpu": _cpu})


def conv_strongest(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    units: torch.Tensor,
    conv: Window,
    size: Pair,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The position of the largest value of each chosen map of a convolution, and that value.

    Args:
        images: [N, C, H, W] float32, any layout; what lies beyond their edges is zero.
        weight: [K, C, kh, kw] float32, any layout.
        bias: [K] float32, or None.
        units: [U] int64, each under K.
        conv: (kernel, stride, padding, dilation), each (rows, columns); the padding is what lies above and to
            the left.
        size: (Oh, Ow) of a map, which says what padding lies below and to the right.

    Returns:
        index [N, U] int64, y * Ow + x: NaN is passed over, the first of equals is taken, and 0 where all are
        NaN; and value [N, U] float32. The bits do not depend on the number of threads.

    Raises:
        ShapeError, DtypeError, UnitNotFound: the arguments do not belong together.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.1.
    """
    return _run(*_check(images, weight, bias, units, conv, size))
