"""Numbers on a device, for both engines."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=4096)
def numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64, kept and so never to be written to: made anew, each would be a copy that a GPU has to be waited for."""
    return torch.tensor(values, dtype=torch.int64, device=device)
