"""What a convolution of pictures changes by where boxes cover them: conv_boxes on a GPU.

    d_b   = change[image[b]] under box b, in the patch at origin[b], and zero elsewhere
    out_b = as conv_delta makes it of d_b

The kernel is conv_delta's, which reads its windows out of the whole pictures: no patch is ever laid out, where one of
32 x 32 pixels takes 12 KB. The pictures stay in the second-level cache, so that of the least bytes those of the patches,
written and read, are gone.

Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
"""

from __future__ import annotations

import torch

from .conv_delta import launch


def conv_boxes(
    change: torch.Tensor,
    boxes: torch.Tensor,
    patch: tuple[int, int],
    filters: torch.Tensor,
    window: tuple,
    groups: int,
    image: torch.Tensor,
    origin: torch.Tensor,
    out_origin: torch.Tensor,
    out: torch.Tensor,
    clean: torch.Tensor | None = None,
    slope: float = 0.0,
    upper: float = float("inf"),
    tf32: bool = False,
) -> torch.Tensor:
    """Launches the kernel, and returns ``out``.

    Args:
        change: [N, C, H, W] float32, bfloat16 or float16, channels last and dense: what each picture changes by where it
            is covered.
        boxes: [B, 4] int64, contiguous: y0, x0, y1, x1 in pixels; y1 and x1 are not covered.
        patch: the size of the patches. Of one that is of no picture, or not in it, nothing is read.
        The others as of ``conv_delta``.
    """
    if boxes.shape != (len(out), 4) or not boxes.is_contiguous():
        raise ValueError(f"boxes of {tuple(boxes.shape)}: expected {(len(out), 4)}, dense")
    return launch(
        change, patch, boxes, filters, window, groups, image, origin, out_origin, out, clean, slope, upper, tf32
    )  # fmt: skip
