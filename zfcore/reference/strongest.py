"""Where units are strongest."""

from __future__ import annotations

import torch


def strongest(maps, units):
    """index[n,u] = y * W + x of the largest value of maps[n, units[u]]: int64 [N, U].

    NaN is passed over, the first of equals is taken, and 0 where all are NaN.
    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.1.
    """
    flat = maps[:, units].flatten(2)
    nan = flat.isnan()
    index = torch.where(nan, torch.full_like(flat, -torch.inf), flat).argmax(-1, keepdim=True)
    # Among nothing but NaN and -inf the first -inf is the strongest.
    present = (~nan).byte().argmax(-1, keepdim=True)
    return torch.where(nan.gather(-1, index), present, index).squeeze(-1)
