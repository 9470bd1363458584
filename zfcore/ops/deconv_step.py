"""One step of the deconvnet on a batch of patches: what the engine of ``deconv_project`` is made of. No gradient."""

from __future__ import annotations

import functools

import torch

from zfcore import reference
from zfcore.errors import ArgumentError, DtypeError, ShapeError
from zfcore.ops import _boundary, _checks, _filters
from zfcore.ops._library import choosing, native, triton_kernel
from zfcore.reference._geometry import FLOATS, Spec, accumulator, check_result, check_unpooled_size, spec
from zfcore.reference._params import MAX_TAPS, Pair, PoolParams, StepParams, is_sequence, overlap_mode, show

MOST_CUDA_CHANNELS = 4  # below, that the CUDA kernel takes: pictures
MOST_APART = 16  # below, that the Triton kernel writes one by one, where channels are not neighbours
IDENTITY = ((1, 1), (1, 1), (0, 0), (1, 1))


def _check_step(step: StepParams, channels: int) -> StepParams:
    """``step`` in plain pairs: what is hashed below is all ints, which equal nothing but ints."""
    _checks.record("step", step, StepParams)
    plain = (step.pool is None or _checks.is_window(step.pool)) and _checks.is_window(step.conv)
    if not (plain and _checks.is_pair(step.map, 1) and _checks.is_pair(step.below, 1)):
        step = step._replace(
            pool=None if step.pool is None else _checks.window("step.pool", step.pool),
            conv=_checks.window("step.conv", step.conv),
            map=_checks.pair("step.map", step.map, 1),
            below=_checks.pair("step.below", step.below, 1),
        )
    _checks.flag("step.whole", step.whole)
    _checks.flag("step.rectify", step.rectify)
    overlap_mode(step.overlap)
    groups = _checks.groups(step.groups, channels)
    return step if groups is step.groups else step._replace(groups=groups)


@functools.lru_cache(maxsize=4096)
def _plan(signal: Spec, outputs: int, step: StepParams, windows: Pair | None, size: Pair | None) -> tuple[int, ...]:
    """The shape of the result, once for equal arguments. windows: of the switches; size: of a frame."""
    if step.pool is not None:
        if step.pool[0][0] * step.pool[0][1] > MAX_TAPS:
            raise ShapeError(f"step.pool={step.pool}: expected at most {MAX_TAPS} taps")
        if any(p > k // 2 for k, p in zip(step.pool[0], step.pool[2], strict=True)):
            raise ArgumentError(f"step.pool={step.pool}: expected a padding of at most half the kernel")
        check_unpooled_size(windows, PoolParams(*step.pool), step.map)
    places = tuple(signal.shape[2:])
    if step.pool is not None:
        places = _checks.reach("step.pool", places, step.pool)
    canvas = _checks.reach("step.conv", places, step.conv)
    shape = (signal.shape[0], outputs, *(size or (step.below if step.whole else canvas)))
    check_result(signal, *shape)
    check_result(signal, outputs, *canvas)  # what a patch reaches before it is cut
    return shape


def _check_frame(frame, step, origin):
    """``frame`` when it says where a result of whole maps begins, and how large it is."""
    if not is_sequence(frame) or len(frame) != 2:
        raise DtypeError(f"frame={show(frame)}: expected where the result begins, [B, 2], and its size")
    corner = _checks.tensor("frame", frame[0])
    if not step.whole or corner.shape != origin.shape or corner.dtype != torch.int64:
        raise ShapeError(f"frame at {corner.dtype} {tuple(corner.shape)}: expected int64 [B, 2], with step.whole")
    return _checks.tensor("frame", corner, origin.device), _checks.pair("frame", frame[1], 1)


def _check(signal, weight, step, image, origin, switches, passes, scale, frame, out):
    """All of them, as the backends take them."""
    signal = _checks.tensor("signal", signal)
    if signal.dim() != 4 or signal.dtype not in FLOATS:
        raise DtypeError(f"signal of {signal.dtype} {tuple(signal.shape)}: expected a float [B, K, h, w]")
    device = signal.device
    b, k = signal.shape[:2]
    if 0 in signal.shape[1:]:
        raise ShapeError(f"signal of shape {tuple(signal.shape)}: expected no axis of 0 but the batch")
    step = _check_step(step, k)
    image = _checks.tensor("image", image, device)
    origin = _checks.tensor("origin", origin, device)
    if image.shape != (b,) or origin.shape != (b, 2):
        raise ShapeError(
            f"image of shape {tuple(image.shape)}, origin of shape {tuple(origin.shape)}: expected [{b}] and [{b}, 2]"
        )
    if image.dtype != torch.int64 or origin.dtype != torch.int64:
        raise DtypeError(f"image of {image.dtype}, origin of {origin.dtype}: expected int64")
    weight = _checks.tensor("weight", weight, device)
    if weight.dim() != 4 or weight.size(0) != k or weight.shape[2:] != step.conv[0] or weight.size(1) < 1:
        raise ShapeError(f"weight of shape {tuple(weight.shape)}: expected [{k}, C / groups, *{step.conv[0]}]")
    if weight.dtype != signal.dtype:
        raise DtypeError(f"weight of {weight.dtype}: expected the signal's {signal.dtype}")
    if (switches is None) != (step.pool is None):
        raise ShapeError("switches and step.pool: expected both or neither")
    switches = _check_maps("switches", switches, torch.uint8, k, device)
    passes = _check_maps("passes", passes, torch.bool, k, device)
    if passes is not None and passes.shape[2:] != step.map:
        raise ShapeError(f"passes of shape {tuple(passes.shape)}: expected maps of {step.map}")
    scale = _checks.optional("scale", scale, device)
    if scale is not None and (tuple(scale.shape) != (k,) or scale.dtype not in FLOATS):
        raise ShapeError(f"scale of {scale.dtype} {tuple(scale.shape)}: expected [{k}], of a float type")
    frame = None if frame is None else _check_frame(frame, step, origin)
    windows = None if switches is None else tuple(switches.shape[2:])
    shape = _plan(spec(signal), weight.size(1) * step.groups, step, windows, frame and frame[1])
    if out is not None:
        out = _checks.result(out, signal, shape, signal, weight, switches, passes)
    return signal, weight, step, image, origin, switches, passes, scale, frame, out, shape


def _check_maps(name, x, dtype, channels, device):
    """Switches or passes, or None."""
    if x is None:
        return None
    x = _checks.tensor(name, x, device)
    if x.dtype != dtype or x.dim() != 4 or x.size(1) != channels:
        raise ShapeError(f"{name} of {x.dtype} {tuple(x.shape)}: expected {dtype} [N, {channels}, H, W]")
    return x


def _check_images(image, switches, passes):
    """That there is each image. The CPU's kernel looks by itself, and so do those of a GPU, which nobody waits for."""
    low, high = _checks.ends("image", image)
    for name, maps in (("switches", switches), ("passes", passes)):
        if maps is not None and (low < 0 or high >= len(maps)):
            raise ShapeError(f"image {low} to {high}: expected 0 to {len(maps) - 1}, of {name}")


def _empty(signal, shape):
    return torch.empty(shape, dtype=signal.dtype, device=signal.device, memory_format=torch.channels_last)


def _reference(signal, weight, step, image, origin, switches, passes, scale, frame, out, shape):
    if signal.device.type != "cuda" and not switches is passes is None:
        _check_images(image, switches, passes)
    z = reference.deconv_step(signal, weight, step, image, origin, switches, passes, scale, frame)
    return z if out is None else out.copy_(z)


def _cpu(signal, weight, step, image, origin, switches, passes, scale, frame, out, shape):
    filters = _filters.for_deconv(weight, scale, step.conv, step.groups)
    out = _empty(signal, shape) if out is None else out
    if switches is not None:
        switches = switches.contiguous(memory_format=torch.channels_last)
    if passes is not None:
        passes = passes.contiguous(memory_format=torch.channels_last).view(torch.uint8)
    image, origin = image.contiguous(), origin.contiguous()
    corner = None if frame is None else frame[0].contiguous()
    call = (
        _boundary.view(signal),
        None if switches is None else _boundary.view(switches),
        None if passes is None else _boundary.view(passes),
        _boundary.view(weight.detach()),
        _boundary.memory(filters),
        _boundary.view(out),
        _boundary.address(image),
        _boundary.address(origin),
        _boundary.address(corner),
        step.map,
        step.below,
        IDENTITY if step.pool is None else step.pool,
        step.conv,
        step.groups,
        step.rectify,
        step.overlap == "last",
        step.whole,
        _boundary.threads(),
    )
    _checks.explained(native.deconv_step_cpu, lambda: _check_images(image, switches, passes), *call)
    return out


def packed_for_cuda(weight: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The filters as the kernels on a GPU read them, and whether any is infinite or NaN, made there without waiting.

    weight: [K, C, kh, kw]; scale: [K], which multiplies it, or None. Returns [K, kh, kw, C] contiguous, float64 for
    float64 and else float32, and one bool.
    """
    filters = weight.detach().to(accumulator(weight.dtype)).permute(0, 2, 3, 1)
    if scale is not None:
        filters = filters * scale.detach().to(filters.dtype)[:, None, None, None]
    filters = filters.contiguous()
    return filters, filters.isfinite().all().logical_not_()


def packed_for_triton(weight: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """As `packed_for_cuda`, of groups too: [kh, kw, K, C / groups] of the weight's dtype, and whether all are finite, [1]."""
    packed = weight.detach() if scale is None else weight.detach() * scale.detach()[:, None, None, None]
    packed = packed.to(weight.dtype).permute(2, 3, 0, 1).contiguous()
    return packed, packed.isfinite().all().reshape(1)


def _triton(signal, weight, step, image, origin, switches, passes, scale, frame, out, shape):
    result = out
    if out is None or (out.size(1) > MOST_APART and out.stride(1) != 1):
        result = _empty(signal, shape)
    signal, switches, passes = (
        None if x is None else x.contiguous(memory_format=torch.channels_last) for x in (signal, switches, passes)
    )
    packed, finite = packed_for_triton(weight, scale)
    own = image.contiguous(), origin.contiguous()
    triton_kernel("deconv_step")(
        signal, packed, finite, *own, result, step.conv, step.groups, step.map, step.below, step.pool, switches, passes,
        step.rectify, step.overlap == "last", step.whole, None if frame is None else frame[0].contiguous(),
    )  # fmt: skip
    return result if out is None or out is result else out.copy_(result)


# What the CUDA kernel leaves to others.
_wide = choosing(
    "deconv_step with more than 4 channels below, or with groups,", {"reference": _reference, "triton": _triton}
)


def _cuda(signal, weight, step, image, origin, switches, passes, scale, frame, out, shape):
    if step.groups != 1 or weight.size(1) > MOST_CUDA_CHANNELS:
        return _wide(signal, weight, step, image, origin, switches, passes, scale, frame, out, shape)
    filters, not_finite = packed_for_cuda(weight, scale)
    out = _empty(signal, shape) if out is None else out
    image, origin = image.contiguous(), origin.contiguous()
    corner = None if frame is None else frame[0].contiguous()
    native.deconv_step_cuda(
        _boundary.view(signal),
        None if switches is None else _boundary.view(switches),
        None if passes is None else _boundary.view(passes.view(torch.uint8)),
        _boundary.address(filters),
        _boundary.address(not_finite),
        _boundary.view(out),
        _boundary.address(image),
        _boundary.address(origin),
        _boundary.address(corner),
        step.map,
        step.below,
        IDENTITY if step.pool is None else step.pool,
        step.conv,
        step.rectify,
        step.overlap == "last",
        step.whole,
        signal.device.index,
        _boundary.stream(signal.device),
    )
    return out


_run = choosing("deconv_step", {"reference": _reference, "cpu": _cpu, "cuda": _cuda, "triton": _triton})


def deconv_step(
    signal: torch.Tensor,
    weight: torch.Tensor,
    step: StepParams,
    image: torch.Tensor,
    origin: torch.Tensor,
    switches: torch.Tensor | None = None,
    passes: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    frame: tuple[torch.Tensor, Pair] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Takes signal patches one convolution down, as ``zfcore.reference.deconv_step`` defines it.

    Args:
        signal: [B, K, h, w] float; a patch of a pool's map with step.pool, else of the convolution's output.
        weight: [K, C / groups, kh, kw], the signal's dtype. Its packing for the CPU is kept while it lives.
        step: the geometry and the rules, see ``StepParams``.
        image: [B] int64, which of the switches' and passes' maps each patch is of. On a GPU, which nobody waits for,
            one that they do not hold makes its result zero.
        origin: [B, 2] int64, where each patch begins in its map; may reach past the edges.
        switches: [N, K, Hp, Wp] uint8, as ``max_pool2d_with_switches`` made them of maps of step.map: they are
            not checked again; on a GPU, one that names no place of the map brings nothing.
        passes: [N, K, *step.map] bool, where the rectifier's input lets a signal pass; None for everywhere.
        scale: [K], multiplies the filters; None for one.
        frame: with step.whole, where the result begins in the map below, [B, 2] int64, and its size: a window
            of the map, which may reach past its edges, instead of the map.
        out: the result's shape, any layout, to write it into.

    Returns:
        [B, C, h', w'], channels last: zero where a patch reaches past its map. The bits do not depend on the
        batch or on the number of threads.

    Raises:
        ShapeError, DtypeError, DeviceError: the arguments do not belong together.

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1.
    """
    return _run(*_check(signal, weight, step, image, origin, switches, passes, scale, frame, out))
