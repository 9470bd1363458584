"""The shapes that are timed, and the work that each op must do there at the least.

ZFNet pools after conv1, conv2 and conv5 only. Two more stages make five distinct shapes of its five layers:
a pool over conv3's maps, and one over conv4's in the paper's wider network (512, 1024 and 512 maps in layers
3 to 5), each followed on the way down by its own convolution, transposed.
Paper: Zeiler & Fergus, arXiv:1311.2901, figure 3; its experiments with model sizes (the wider layers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from device import device, on_gpu

from zfcore.ops import max_pool2d_with_switches

BATCH, GPU_BATCH = 32, 256
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Stage:
    """A pool over `channels` maps of size x size, and the convolution below it.

    The convolution made these maps out of `below_channels` maps of below_size x below_size.
    """

    name: str
    channels: int
    size: int
    padding: int
    below_channels: int
    below_size: int
    conv_kernel: int
    conv_stride: int
    conv_padding: int

    kernel = 3  # of every pool
    stride = 2

    @property
    def pool(self) -> tuple[int, int, int]:
        return self.kernel, self.stride, self.padding

    @property
    def pooled(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def output_padding(self) -> int:
        smallest = (self.size - 1) * self.conv_stride - 2 * self.conv_padding + self.conv_kernel
        return self.below_size - smallest


STAGES = (
    Stage("pool1", 96, 110, 1, 3, 224, 7, 2, 1),
    Stage("pool2", 256, 26, 1, 96, 55, 5, 2, 0),
    Stage("pool3", 384, 13, 0, 256, 13, 3, 1, 1),
    Stage("pool4-wide", 1024, 13, 0, 512, 13, 3, 1, 1),
    Stage("pool5", 256, 13, 0, 384, 13, 3, 1, 1),
)


class Tensors(NamedTuple):
    """One stage's inputs in one layout: what the pool sees, and what it hands to the way down.

    x: [N, K, H, W], rectified normal noise. y: [N, K, Oh, Ow], its pooled maxima, nearly all positive, so
    that rectification removes next to nothing: the hardest case of the fused op, whose work is the
    non-zeros'.
    switches: uint8 and indices: int64, both of y's shape. weight: [K, C, kh, kw].
    """

    x: torch.Tensor
    y: torch.Tensor
    switches: torch.Tensor
    indices: torch.Tensor
    weight: torch.Tensor


def make_tensors(stage: Stage, layout: str, dtype: torch.dtype) -> Tensors:
    where = {"generator": torch.Generator(device()).manual_seed(0), "device": device()}
    memory_format = LAYOUTS[layout]
    batch = GPU_BATCH if on_gpu() else BATCH
    x = torch.randn(batch, stage.channels, stage.size, stage.size, **where).relu_()
    x = x.to(dtype=dtype, memory_format=memory_format)
    y, indices = F.max_pool2d(x, *stage.pool, return_indices=True)
    _, switches = max_pool2d_with_switches(x, *stage.pool)
    kernel = stage.conv_kernel
    weight = torch.randn(stage.channels, stage.below_channels, kernel, kernel, **where)
    return Tensors(x, y, switches, indices, weight.to(dtype=dtype, memory_format=memory_format))


def switch_indices(stage: Stage, switches: torch.Tensor) -> torch.Tensor:
    """The places in the map (row * width + column) that the switches name, as torch's indices: int64."""
    corner = torch.arange(stage.pooled, device=switches.device) * stage.stride - stage.padding
    taps = switches.long()
    rows = corner[:, None] + taps // stage.kernel
    return rows * stage.size + corner + taps % stage.kernel


class Work(NamedTuple):
    """The least that an op must do: bytes, operations on non-zeros, and those of the dense algorithm.

    precision: what the factors of products are rounded to, "float32", "tf32" or "bf16".
    """

    bytes: int
    flops: int = 0
    dense_flops: int = 0
    precision: str = "float32"


def pool_work(stage: Stage, t: Tensors) -> Work:
    """The map once in, a value and a byte a window out; one comparison a tap."""
    compares = t.y.numel() * stage.kernel**2
    return Work(t.x.nbytes + t.y.nbytes + t.switches.nbytes, compares, compares)


def unpool_work(stage: Stage, t: Tensors) -> Work:
    """A value and a byte a window in, the whole map out."""
    return Work(t.y.nbytes + t.switches.nbytes + t.x.nbytes)


def gather_work(stage: Stage, t: Tensors) -> Work:
    """The map in (hardly a cache line holds no named place), a byte in and a value out a window."""
    return Work(t.x.nbytes + t.switches.nbytes + t.y.nbytes)


def fused_work(stage: Stage, t: Tensors) -> Work:
    """Multiplies and adds, each counted; products with filter taps that fall outside the result are not."""
    u = F.max_unpool2d(t.y, t.indices, *stage.pool, output_size=(stage.size, stage.size))
    corner = torch.arange(stage.size) * stage.conv_stride - stage.conv_padding
    lines = corner[:, None] + torch.arange(stage.conv_kernel)
    taps = ((lines >= 0) & (lines < stage.below_size)).sum(
        1
    )  # of each row or column of u that reach the result
    products = taps[:, None] * taps * stage.below_channels  # [size, size]
    nonzeros = (u > 0).sum((0, 1)).cpu()
    batch = len(t.y)
    bytes_out = batch * stage.below_channels * stage.below_size**2 * t.y.element_size()
    return Work(
        t.y.nbytes + t.switches.nbytes + t.weight.nbytes + bytes_out,
        2 * int((nonzeros * products).sum()),
        2 * int(products.sum()) * batch * stage.channels,
    )
