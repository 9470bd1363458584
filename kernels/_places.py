"""Where the pixels of patches lie in clean maps, and how they are launched: shared by the kernels on changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # read where Triton reads it: when a kernel is defined
LARGEST = 2**31 - 1
T = TypeVar("T")
# Numbers of which a launch makes neither a constant where they are 1 nor a multiple of 16: no network then compiles kernels
# of its own for the sizes of its patches, and what is compiled ahead of time is what a launch compiles.
PLAIN = (
    "pixels", "rows", "height", "width", "patch_y", "patch_x", "size_y", "size_x", "size", "images", "pictures",
    "above_y", "above_x", "map_y", "map_x", "taps_y", "taps_x", "kernel_y", "kernel_x", "stride_y", "stride_x",
    "padding_y", "padding_x", "dilation_y", "dilation_x",
)  # fmt: skip


class Config(NamedTuple):
    """The tile of a program of a product, and how it is run."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


CONFIGS = {"narrow": (64, 16, 4), "wide": (16, 64, 4)}  # BLOCK_P pixels, BLOCK_C channels, warps


@triton.jit
def places(m, is_pixel, image, out_origin, size_y, size_x, images, height, width):
    """Of pixel m of patches of size_y x size_x, one after the other: its patch, the row and column in it, its clean
    map, the row and column there, and whether there is such a place. Memory is reached for at known places only.
    """
    b = (m // (size_y * size_x)).to(tl.int64)
    py = (m // size_x) % size_y
    px = m % size_x
    which = tl.load(image + b)
    y = tl.load(out_origin + 2 * b) + py
    x = tl.load(out_origin + 2 * b + 1) + px
    known = is_pixel & (which >= 0) & (which < images) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return b, py, px, which, y, x, known


@triton.jit
def of_program(
    pixels, image, out_origin, size_y, size_x, images, height, width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Of a program that takes BLOCK_P pixels by BLOCK_C channels [1, BLOCK_C]: the channels, which pixels there are, and
    the pixels' `places`.
    """
    m = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)  # the launcher sees to it that it fits
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    is_pixel = m < pixels
    m = tl.minimum(m, pixels - 1)
    b, py, px, which, y, x, known = places(m, is_pixel, image, out_origin, size_y, size_x, images, height, width)
    return c, is_pixel, b, py, px, which, y, x, known


def check(**tensors: torch.Tensor) -> None:
    """Refuse what the kernels cannot read: other dtypes than float32 and the half ones, channels that lie apart."""
    for name, x in tensors.items():
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} of {x.dtype}: expected float32, bfloat16 or float16")
        if x.dim() != 4 or (x.size(1) > 1 and x.stride(1) != 1):
            raise ValueError(f"{name} of {tuple(x.shape)}, strides {x.stride()}: expected channels last")


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of images, rows and columns; 0 where there is one, whose stride may be anything."""
    return tuple(x.stride(axis) if x.size(axis) > 1 else 0 for axis in (0, 2, 3))


def capability_of(device: torch.device) -> int:
    """90 for compute capability 9.0; in the interpreter, as of the least that the kernels are made for."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def of_architecture(table: Mapping[int, T], capability: int) -> T:
    """The table's entry for a GPU of this compute capability; for one that it does not name, that of the nearest below."""
    return table[max((known for known in table if known <= capability), default=min(table))]


def launches(out: torch.Tensor) -> Iterator[tuple[slice, int, tuple[int, int], dict[str, int]]]:
    """Launches of a kernel whose programs take BLOCK_P pixels and BLOCK_C channels of the results out [B, C, h, w].

    Yields the patches of each, how many pixels they have, the grid, and the kernel's options, on out's device.
    """
    batch, channels, size_y, size_x = out.shape
    block_p, block_c, warps = CONFIGS["wide" if channels > 16 else "narrow"]
    most = (LARGEST - 1024) // max(1, size_y * size_x)  # patches of one launch
    if most < 1:
        raise ValueError(f"patches of {tuple(out.shape)}: too large for one launch")
    options = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps}
    for begin in range(0, batch if out.numel() else 0, most):
        some = slice(begin, begin + most)
        pixels = len(out[some]) * size_y * size_x
        with torch.cuda.device_of(out):
            yield some, pixels, (triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c)), options
