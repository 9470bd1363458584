"""Max-pooling of changes: what the engine of ``occlusion_map`` is made of. No gradient."""

from __future__ import annotations

import torch

from zfcore import reference
from zfcore.errors import ShapeError
from zfcore.ops import _boundary, _change, _checks
from zfcore.ops._library import choosing, native, triton_kernel
from zfcore.reference._params import MAX_TAPS, Pair, Places


def _reference(delta, before, after, window, places, out):
    _change.check_images(places, before, after)
    result = reference.pool_delta(delta, before, after, window, places)
    return result if out is None else out.copy_(result)


def _cpu(delta, before, after, window, places, out):
    out = _change.empty(delta, delta.size(1), places, out)
    change, _held = _change.native_change(delta, before, after, places, out)
    _change.on_cpu(native.pool_delta_cpu, places, (before, after), change, window, _boundary.threads())
    return out


def _triton(delta, before, after, window, places, out):
    out = _change.empty(delta, delta.size(1), places, out)
    own = (x.contiguous() for x in places[:3])
    return triton_kernel("pool_delta")(*_change.for_triton(delta, before, after), window, *own, out)


_run = choosing("pool_delta", {"reference": _reference, "cpu": _cpu, "triton": _triton})


def pool_delta(
    delta: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    window: tuple[Pair, Pair, Pair, Pair],
    places: Places,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What max-pooled maps change by, as ``zfcore.reference.pool_delta`` defines it.

    Args:
        delta: [B, C, h, w] float32 or float64: what the input changes by inside a patch, zero elsewhere.
        before, after: [N, C, H, W] and [N, C, H', W'], the clean input and output.
        window: (kernel, stride, padding, dilation); no window lies outside the map whole.
        places: see ``Places``.
        out: [B, C, *places.size], channels last, to write into.

    Returns:
        [B, C, *places.size], channels last.

    Raises:
        ShapeError, DtypeError: the arguments do not belong together.
        ArgumentError: a patch is not inside its map (the CPU's kernel).

    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
    """
    delta, places, before, after = _change.check(delta, places, before, after)
    window = _checks.window("window", window)
    if not delta.size(1) == before.size(1) == after.size(1) or len(before) != len(after):
        raise ShapeError(
            f"delta {tuple(delta.shape)}, before {tuple(before.shape)}, after {tuple(after.shape)}: expected as many "
            "channels, and as many images"
        )
    if window[0][0] * window[0][1] > MAX_TAPS:
        raise ShapeError(f"window of {window[0]}: expected at most {MAX_TAPS} taps")
    _checks.reach("window", tuple(after.shape[2:]), window)
    out = _change.check_out(out, delta, delta.size(1), places, delta, before, after)
    return _run(delta, before, after, window, places, out)
