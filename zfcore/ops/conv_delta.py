"""A convolution of changes: what the engine of ``occlusion_map`` is made of. No gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from zfcore import reference
from zfcore.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from zfcore.ops import _boundary, _change, _checks, _filters
from zfcore.ops._library import choosing, native, triton_kernel
from zfcore.ops.relu_delta import check_rectifier
from zfcore.reference._geometry import FLOATS
from zfcore.reference._params import INT32_MAX, ConvChange, Limits, Pair, Places, integer, is_sequence, show

PRECISIONS = ("exact", "tf32", "bf16")  # of products; sums are float32 and wider
KEPT_BYTES = 256 * 2**20  # of filters whose packing is kept; larger ones are packed by slices, anew for each call
SLICE_BYTES = 64 * 2**20
MOST_TABLE = 2**27  # of where each tap of each pixel of an axis leads, which the CPU's kernel keeps


class DeltaFilters(NamedTuple):
    """The filters of a convolution of changes, ready for the backend.

    weight: [K, C / groups, kh, kw]. scale: [K] or None. precision: what they, and the changes that they meet, are rounded
    to: "exact" (not at all), "tf32" or "bf16". packed: as `reader` reads them, an instruction set of the CPU or "triton";
    None where they are packed at each call. finite: whether all are; on a GPU a tensor, which nobody has waited for.
    """

    weight: torch.Tensor
    groups: int
    scale: torch.Tensor | None
    packed: torch.Tensor | None
    finite: bool | torch.Tensor
    precision: str = "exact"
    reader: str = ""


def pays(precision: str, device: torch.device) -> bool:
    """Whether products of that precision are faster there than those of float32: on the tensor cores of a GPU, and bf16
    on CPUs that multiply it in pairs.
    """
    if device.type == "cuda":
        return True
    return precision == "bf16" and device.type == "cpu" and native is not None and _has_narrow_products()


def _has_narrow_products() -> bool:
    return native.cpu_isa() == "avx512" and native.cpu_features()["avx512_bf16"]


def _plain_filters(weight, scale, shape, groups, precision):
    finite = bool(weight.isfinite().all()) and (scale is None or bool(scale.isfinite().all()))
    return DeltaFilters(weight.detach().reshape(shape), groups, scale, None, finite, precision)


def _packed_filters(weight, scale, shape, groups, precision):
    if weight.nbytes > KEPT_BYTES and groups == 1:
        extremes = torch.stack([*weight.aminmax(), *([] if scale is None else scale.aminmax())])
        finite = bool(extremes.isfinite().all())
        return DeltaFilters(weight.detach().reshape(shape), groups, scale, None, finite, precision)
    packed, finite = _filters.for_delta(weight, scale, shape, groups, precision == "bf16")
    return DeltaFilters(weight.detach().reshape(shape), groups, scale, packed, finite, precision, native.cpu_isa())


def _triton_filters(weight, scale, shape, groups, precision):
    if weight.dtype != torch.float32:
        raise DtypeError(f"weight of {weight.dtype}: the Triton kernels take float32; use_backend('reference') runs it")
    weight = weight.detach().reshape(shape)
    packed = weight if scale is None else weight * scale.detach().to(weight.dtype)[:, None, None, None]
    # [K, kh, kw, C / groups], or [kh, kw, 1, K] where each channel has a filter of its own: neighbours are read together.
    packed = packed.permute(2, 3, 1, 0) if is_depthwise(shape, groups) else packed.permute(0, 2, 3, 1)
    packed = packed.to(torch.bfloat16 if precision == "bf16" else packed.dtype).contiguous()
    return DeltaFilters(weight, groups, scale, packed, packed.isfinite().all(), precision, "triton")


_prepare = choosing(
    "conv_delta", {"reference": _plain_filters, "cpu": _packed_filters, "triton": _triton_filters}
)


def is_depthwise(shape: tuple[int, ...], groups: int) -> bool:
    """Whether each channel has a filter of its own; shape: of the weight."""
    return groups > 1 and shape[1] == 1 and shape[0] == groups


def delta_filters(
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    shape: tuple[int, int, int, int] | None = None,
    groups: int = 1,
    precision: str = "exact",
) -> DeltaFilters:
    """The filters for ``conv_delta``, on the backend that is chosen now; their packing is kept while the weight lives.

    Args:
        weight: [K, C / groups, kh, kw] float32 or float64, or of that many values with ``shape``: the matrix
            [K, C * H * W] of a full layer that reads maps of H x W is a filter as large as the map.
        scale: [K], multiplies what each filter gives; None for one.
        shape: [K, C / groups, kh, kw].
        groups: of the channels.
        precision: what they, and the changes that they meet, are rounded to: "exact" for not at all; "bf16", float32 only;
            "tf32", float32 too, where tensor cores round to 11 bits: everywhere else that is exact. Where each channel
            has a filter of its own, all are. Sums stay in float32.
    """
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision: {show(precision)}; expected one of {PRECISIONS}")
    plain = _checks.tensor("weight", weight)
    scale = _checks.optional("scale", scale, plain.device)
    if plain.is_meta:
        raise DeviceError("weight on meta: expected a device that holds values")
    if weight.dtype not in _change.DTYPES or 0 in weight.shape:
        raise ShapeError(f"weight of {weight.dtype} {tuple(weight.shape)}: expected float32 or float64, none of 0")
    if precision != "exact" and weight.dtype != torch.float32:
        raise DtypeError(f"weight of {weight.dtype}: expected float32 to be rounded to {precision}")
    if shape is not None and (not is_sequence(shape) or any(type(n) is not int or n < 1 for n in shape)):
        raise ArgumentError(f"shape={show(shape)}: expected (K, C / groups, kh, kw), none under 1")
    shape = tuple(weight.shape) if shape is None else tuple(shape)
    if len(shape) != 4 or math.prod(shape) != weight.numel():
        raise ShapeError(f"weight of {tuple(weight.shape)}, shape={show(shape)}: expected [K, C / groups, kh, kw]")
    if scale is not None and (tuple(scale.shape) != shape[:1] or scale.dtype not in FLOATS):
        raise ShapeError(f"scale of {scale.dtype} {tuple(scale.shape)}: expected [{shape[0]}], of a float type")
    groups = integer("groups", groups, groups, 1, INT32_MAX)
    if shape[0] % groups:
        raise ShapeError(f"filters of {shape} in {groups} groups: expected a divisor of {shape[0]}")
    return _prepare(plain, scale, shape, groups, "exact" if is_depthwise(shape, groups) else precision)


def _reference(delta, filters, step, places, clean, out):
    weight, scale = filters.weight, filters.scale
    if filters.precision == "bf16":
        weight = weight if scale is None else weight * scale[:, None, None, None]
        weight, scale, delta = weight.bfloat16().to(delta.dtype), None, delta.bfloat16().to(delta.dtype)
    _change.check_images(places, clean)
    result = reference.conv_delta(delta, weight, step, places, clean, scale)
    return result if out is None else out.copy_(result)


def _by_slices(delta, filters, step, places, clean, out):
    """As `_cpu`, with filters packed for this call, a slice of the outputs after the other."""
    out = _change.empty(delta, len(filters.weight), places, out)
    count = max(1, SLICE_BYTES // filters.weight[0].nbytes) if step.groups == 1 else len(filters.weight)
    for first in range(0, len(filters.weight), count):
        own = slice(first, first + count)
        scale = None if filters.scale is None else filters.scale[own].to(delta.dtype).contiguous()
        packed, finite = _filters.pack_for_delta(
            filters.weight[own].contiguous(), scale, step.groups, filters.precision == "bf16"
        )
        some = filters._replace(
            weight=filters.weight[own], scale=scale, packed=packed, finite=finite, reader=native.cpu_isa()
        )
        _cpu(delta, some, step, places, None if clean is None else clean[:, own], out[:, own])
    return out


def _cpu(delta, filters, step, places, clean, out):
    narrow = filters.precision == "bf16"
    if filters.packed is None or filters.reader != native.cpu_isa():
        return _by_slices(delta, filters, step, places, clean, out)
    packed = _checks.tensor("filters.packed", filters.packed, delta.device)
    out = _change.empty(delta, len(filters.weight), places, out)
    delta = _change.channels_last(delta)
    clean = None if clean is None else _change.channels_last(clean)
    image, origin, out_origin = (x.contiguous() for x in places[:3])
    _change.on_cpu(
        native.conv_delta_cpu,
        places,
        (clean,),
        _boundary.view(delta),
        _boundary.address(origin),
        _boundary.memory(packed),
        None if clean is None else _boundary.view(clean),
        _boundary.address(image),
        _boundary.view(out),
        _boundary.address(out_origin),
        step.map,
        step.above,
        step.window,
        step.groups,
        narrow,
        *step.rectifier,
        _boundary.threads(),
    )
    return out


def for_triton(filters: DeltaFilters) -> DeltaFilters:
    """The filters as the Triton kernels read them, also where they were made ready for another backend."""
    if filters.reader == "triton":
        return filters
    shape = tuple(filters.weight.shape)
    return _triton_filters(filters.weight, filters.scale, shape, filters.groups, filters.precision)


def _triton(delta, filters, step, places, clean, out):
    delta, clean = _change.for_triton(delta, clean)
    filters = for_triton(filters)
    out = _change.empty(delta, len(filters.weight), places, out)
    own = tuple(x.contiguous() for x in places[:3])
    if is_depthwise(filters.weight.shape, step.groups):
        launch = triton_kernel("conv_delta_depthwise")
        return launch(delta, filters.packed, step.window, *own, out, clean, *step.rectifier)
    if _is_full(delta, filters, step, places):
        return _full_layer(delta, filters, step, own, clean, out)
    return triton_kernel("conv_delta")(
        delta.to(filters.packed.dtype), filters.packed, step.window, step.groups, *own, out, clean, *step.rectifier,
        tf32=filters.precision == "tf32",
    )  # fmt: skip


def _is_full(delta, filters, step, places) -> bool:
    """Whether this is a full layer, whose patches are whole maps, and the library's product is as exact as was asked."""
    return (
        filters.precision == "exact"
        and step.groups == 1
        and tuple(delta.shape[2:]) == tuple(step.map) == tuple(step.window[0])
        and tuple(step.window[2]) == (0, 0)
        and tuple(places.size) == tuple(step.above) == (1, 1)
        and torch.backends.cuda.matmul.fp32_precision != "tf32"
    )


def _full_layer(delta, filters, step, own, clean, out):
    """As one matrix product: a row is a map."""
    flat = delta.permute(0, 2, 3, 1).flatten(1), filters.packed.flatten(1)
    torch.mm(flat[0], flat[1].T, out=out[:, :, 0, 0])
    if clean is None:
        return out
    return triton_kernel("relu_delta")(out, clean, own[0], own[2], out, *step.rectifier)


def _check_step(step: ConvChange, kernel: Pair) -> ConvChange:
    """``step`` in plain pairs."""
    most = MOST_TABLE // max(1, *kernel)
    plain = _checks.is_window(step.window) and _checks.is_pair(step.map, 1, most)
    if plain and _checks.is_pair(step.above, 1, MOST_TABLE) and type(step.groups) is int and step.groups > 0:
        rectifier = check_rectifier(step.rectifier)
        return step if rectifier is step.rectifier else step._replace(rectifier=rectifier)
    return ConvChange(
        _checks.window("step.window", step.window),
        integer("step.groups", step.groups, step.groups, 1, INT32_MAX),
        _checks.pair("step.map", step.map, 1, most),
        _checks.pair("step.above", step.above, 1, MOST_TABLE),
        check_rectifier(step.rectifier),
    )


def check_filters(
    change: torch.Tensor, filters: DeltaFilters, step: ConvChange, clean: torch.Tensor | None
) -> tuple[DeltaFilters, ConvChange]:
    """Both, when the filters take what changes, and give what the clean outputs are."""
    _checks.record("filters", filters, DeltaFilters)
    _checks.record("step", step, ConvChange)
    weight = _checks.tensor("filters.weight", filters.weight, change.device)
    scale = _checks.optional("filters.scale", filters.scale, change.device)
    if weight.dim() != 4:
        raise ShapeError(f"filters of {tuple(weight.shape)}: expected [K, C / groups, kh, kw]")
    k, c, *kernel = weight.shape
    if scale is not None and (tuple(scale.shape) != (k,) or scale.dtype not in FLOATS):
        raise ShapeError(f"filters.scale of {scale.dtype} {tuple(scale.shape)}: expected [{k}], of a float type")
    if filters.precision not in PRECISIONS:
        raise ArgumentError(f"filters.precision={show(filters.precision)}: expected one of {PRECISIONS}")
    if weight is not filters.weight or scale is not filters.scale:
        filters = filters._replace(weight=weight, scale=scale)
    step = _check_step(step, tuple(kernel))
    fits = c * step.groups == change.size(1) and k % step.groups == 0 and tuple(kernel) == tuple(step.window[0])
    if not fits or filters.groups != step.groups:
        raise ShapeError(
            f"filters of {tuple(filters.weight.shape)} in {filters.groups} groups: they do not take {change.size(1)} "
            f"channels in {step.groups} groups and a window of {step.window[0]}"
        )
    if 0 in weight.shape:
        raise ShapeError(f"filters of {tuple(weight.shape)}: expected none of 0")
    if weight.dtype != change.dtype:
        raise ShapeError(f"filters of {weight.dtype}: expected the changes' {change.dtype}")
    if filters.finite is False:
        raise ArgumentError("filters: expected finite ones, since products with a zero may be left out or may not")
    if clean is not None and tuple(clean.shape[1:]) != (k, *step.above):
        raise ShapeError(f"clean of {tuple(clean.shape)}: expected [N, {k}, *{step.above}]")
    _checks.reach("step.window", step.above, step.window)
    return filters, step


_run = choosing("conv_delta", {"reference": _reference, "cpu": _cpu, "triton": _triton})


def conv_delta(
    delta: torch.Tensor,
    filters: DeltaFilters,
    step: ConvChange,
    places: Places,
    clean: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a convolution's output changes by, as ``zfcore.reference.conv_delta`` defines it.

    Args:
        delta: [B, C, h, w] float32 or float64: what its input changes by inside a patch, zero elsewhere.
        filters: of ``delta_filters``, finite.
        step: the geometry and the rectifier, see ``ConvChange``.
        places: see ``Places``; the result must hold all outputs that see a patch.
        clean: [N, K, *step.above], the clean outputs: the change is then that of the rectified outputs.
        out: [B, K, *places.size], channels last, to write into.

    Returns:
        [B, K, *places.size], channels last. The bits do not depend on the batch or on the number of threads, but on a
        GPU those of full layers may depend on the batch.

    Raises:
        ShapeError, DtypeError: the arguments do not belong together.
        ArgumentError: a patch is not inside its map, or reaches outputs outside of the result (the CPU's kernel).

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
    """
    delta, places, *maps = _change.check(delta, places, *([] if clean is None else [clean]))
    clean = maps[0] if maps else None
    filters, step = check_filters(delta, filters, step, clean)
    out = _change.check_out(out, delta, len(filters.weight), places, delta, clean)
    return _run(delta, filters, step, places, clean, out)


__all__ = ["ConvChange", "DeltaFilters", "Limits", "Places", "conv_delta", "delta_filters"]
