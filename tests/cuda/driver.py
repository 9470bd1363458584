"""The bodies of the CUDA kernels on CPU tensors: compiles host_driver.cpp and calls it through ctypes.

Outputs are laid out inside a larger block of memory that is filled with a pattern, so that a body that leaves
a place unwritten, or writes a byte that is not its own, is found out.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}
CODES[torch.bool] = CODES[torch.uint8]
GUARD = 64  # elements of pattern on each side of an output
PATTERN = 0xFF  # NaN in every float type, and a byte that is no switch


class View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
    ]


class Window(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64 * 2) for name in ("kernel", "stride", "padding", "dilation")]


class DeconvStep(ctypes.Structure):
    """csrc/deconv_step.h"""

    _fields_ = [
        *((name, View) for name in ("signal", "switches", "passes", "weight")),
        *((name, ctypes.c_void_p) for name in ("filters", "not_finite")),
        ("out", View),
        *((name, ctypes.c_void_p) for name in ("image", "origin", "frame")),
        *((name, ctypes.c_int64 * 2) for name in ("map", "below")),
        *((name, Window) for name in ("pool", "conv")),
        ("groups", ctypes.c_int64),
        *((name, ctypes.c_bool) for name in ("rectify", "last", "whole")),
    ]


class CReport(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "launches", "blocks", "index_bits", "channels", "packed", "known_kernel", "phase", "way", "in_shared",
                "shared_bytes", "threads",
            )
        ),
        ("error", ctypes.c_char * 256),
    ]


@dataclass(frozen=True)
class Report:
    """What one call launched."""

    launches: int
    blocks: int
    index_bits: int
    channels: int
    packed: bool
    known_kernel: int
    phase: int
    way: int
    in_shared: int
    shared_bytes: int
    threads: int


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(folder: Path, *flags: str) -> Path:
    """Compile the driver into ``folder``; returns the library."""
    library = folder / "libhost_driver.so"
    command = [compiler(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *flags]
    command += [
        "-fPIC",
        "-shared",
        "-I",
        ROOT / "csrc",
        "-o",
        library,
        Path(__file__).with_name("host_driver.cpp"),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def view(x: torch.Tensor) -> View:
    pair = ctypes.c_int64 * 4
    return View(x.data_ptr(), CODES[x.dtype], pair(*x.shape), pair(*x.stride()))


def window(pool) -> Window:
    pair = ctypes.c_int64 * 2
    return Window(*(pair(*field) for field in pool))


class Output:
    """A result in guarded memory, with the strides of ``like`` where it is given, else dense."""

    def __init__(self, shape, dtype, strides=None):
        if strides is None:
            strides = torch.empty(shape, device="meta").stride()
        extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
        self.memory = torch.full((extent + 2 * GUARD,), 0, dtype=dtype)
        self.memory.view(torch.uint8).fill_(PATTERN)
        self.tensor = self.memory.as_strided(shape, strides, GUARD)

    def check(self) -> torch.Tensor:
        """The tensor, after making sure that nothing around it or between its elements was written."""
        ours = torch.zeros(self.memory.shape, dtype=torch.bool)
        ours.as_strided(self.tensor.shape, self.tensor.stride(), GUARD).fill_(True)
        rest = self.memory.view(torch.uint8).view(self.memory.numel(), -1)[~ours]
        assert (rest == PATTERN).all(), "memory outside the result was written"
        return self.tensor


class Driver:
    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.visit.restype = ctypes.c_int64

    def _call(self, function, *arguments) -> Report:
        report = CReport()
        failed = function(*arguments, ctypes.byref(report))
        if failed:
            raise RuntimeError(report.error.decode())
        fields = {name: getattr(report, name) for name, _ in CReport._fields_ if name != "error"}
        return Report(**{**fields, "packed": bool(fields["packed"])})

    def max_pool2d_with_switches(self, x, y, switches, pool, backwards=False) -> Report:
        return self.pool_views(view(x), view(y), view(switches), pool, backwards)

    def pool_views(self, x, y, switches, pool, backwards=False) -> Report:
        views = map(ctypes.byref, (x, y, switches, window(pool)))
        return self._call(self.library.max_pool2d_with_switches, *views, int(backwards))

    def unpool_relu2d(self, y, switches, out, pool, relu, overlap, bad=None, backwards=False) -> Report:
        return self._two(
            self.library.unpool_relu2d, y, switches, out, pool, (int(relu),), overlap, bad, backwards
        )

    def pool_gather2d(self, x, switches, out, pool, overlap, bad=None, backwards=False) -> Report:
        return self._two(self.library.pool_gather2d, x, switches, out, pool, (), overlap, bad, backwards)

    def _two(self, function, source, switches, out, pool, extra, overlap, bad, backwards) -> Report:
        views = [ctypes.byref(view(t)) for t in (source, switches, out)]
        flag = None if bad is None else ctypes.c_void_p(bad.data_ptr())
        last = int(overlap == "last")
        return self._call(function, *views, ctypes.byref(window(pool)), *extra, last, flag, int(backwards))

    def paste_boxes(self, images, fill, out, image, origin, boxes, backwards=False) -> Report:
        return self.paste_views(view(images), view(fill), view(out), image, origin, boxes, backwards)

    def paste_views(self, images, fill, out, image, origin, boxes, backwards=False) -> Report:
        views = map(ctypes.byref, (images, fill, out))
        indices = [ctypes.c_void_p(t.data_ptr()) for t in (image, origin, boxes)]
        return self._call(self.library.paste_boxes, *views, *indices, int(backwards))

    def deconv_step(self, signal, packed, step, image, origin, switches, passes, frame, out, limit, backwards=False):
        """passes: uint8 or bool. packed: the filters and their flag, as zfcore.ops.deconv_step.packed_for_cuda makes them."""
        filters, not_finite = packed
        views = [None if t is None else view(t) for t in (signal, switches, passes)]
        addresses = [None if t is None else t.data_ptr() for t in (image, origin, frame)]
        pool = step.pool or ((1, 1), (1, 1), (0, 0), (1, 1))
        rules = step.rectify, step.overlap == "last", step.whole
        return self.step_views(
            *views, filters.data_ptr(), not_finite.data_ptr(), view(out), *addresses, step.map, step.below, pool,
            step.conv, *rules, groups=step.groups, limit=limit, backwards=backwards,
        )  # fmt: skip

    def step_views(
        self, signal, switches, passes, filters, not_finite, out, image, origin, frame, size, below, pool, conv,
        rectify, last, whole, groups, limit, backwards=False,
    ):  # fmt: skip
        """As the binding takes its arguments. switches, passes: None where there are none."""
        nothing, pair = View(), ctypes.c_int64 * 2
        op = DeconvStep(
            signal, switches or nothing, passes or nothing, nothing, filters, not_finite, out, image, origin, frame,
            pair(*size), pair(*below), window(pool), window(conv), groups, rectify, last, whole,
        )  # fmt: skip
        return self._call(self.library.deconv_step, ctypes.byref(op), ctypes.c_int64(limit), int(backwards))

    def divide(self, divisor: int, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quotients and remainders; numbers are uint32 in an int64 tensor."""
        narrow = numbers.to(torch.int32).contiguous()
        quotients, remainders = torch.empty_like(narrow), torch.empty_like(narrow)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (narrow, quotients, remainders)]
        self.library.divide(
            ctypes.c_uint32(divisor), pointers[0], ctypes.c_int64(narrow.numel()), *pointers[1:]
        )
        return quotients.long(), remainders.long()

    def visit(self, n, c, lanes, h, w, channels_fast, item_bytes, count=True) -> tuple[int, torch.Tensor]:
        """Blocks of a launch over [n, c, h, w], -1 where they are too many, and the visits to each place."""
        visits = torch.zeros((n, c, h, w) if count else 0, dtype=torch.uint8)
        sizes = [ctypes.c_int64(n), ctypes.c_int64(c), lanes, ctypes.c_int64(h), ctypes.c_int64(w)]
        counts = ctypes.c_void_p(visits.data_ptr()) if count else None
        return self.library.visit(*sizes, int(channels_fast), item_bytes, counts), visits

    def widen(self, bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        values = torch.empty(bits.shape, dtype=torch.float32)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (bits, values)]
        self.library.widen(CODES[dtype], pointers[0], ctypes.c_int64(bits.numel()), pointers[1])
        return values

    def narrow(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        result = torch.empty(values.shape, dtype=dtype)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, result)]
        self.library.narrow(CODES[dtype], pointers[0], ctypes.c_int64(values.numel()), pointers[1])
        return result
