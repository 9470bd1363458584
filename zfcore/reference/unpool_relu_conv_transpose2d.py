"""One step of the deconvnet: unpool, rectify, transposed filter."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zfcore.reference._geometry import (
    accumulator,
    check_conv_transposed_size,
    check_map,
    check_result,
    check_switches,
    check_weight,
    conv_transposed_size,
    output_padding_of,
)
from zfcore.reference._params import as_conv, as_pool, size_pair
from zfcore.reference.unpool_relu2d import unpool_relu2d


def unpool_relu_conv_transpose2d(
    y, switches, weight, *, pool, conv=None, output_size=None, overlap="sum", strict_nan=False
):
    """conv_transpose2d(relu(unpool2d(y, switches)), weight); half types accumulate in float32, rounded once.

    Products with an exact zero of the unpooled map are left out, so 0 x inf and 0 x NaN of the weight give 0;
    strict_nan=True gives NaN there, as a dense convolution does.
    Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (unpooling, rectification, filtering).
    """
    if y.dim() == 3:
        z = unpool_relu_conv_transpose2d(
            y.unsqueeze(0),
            switches.unsqueeze(0),
            weight,
            pool=pool,
            conv=conv,
            output_size=output_size,
            overlap=overlap,
            strict_nan=strict_nan,
        )
        return z.squeeze(0)
    check_map("y", y)
    check_switches(y, switches)
    pool, conv = as_pool(pool), as_conv(conv)
    check_weight(y, weight, conv.groups)
    pooled, kernel = y.shape[2:], weight.shape[2:]
    unpooled, size = conv_transposed_size(
        pooled, pool, conv, kernel, None if output_size is None else size_pair(output_size)
    )
    check_conv_transposed_size(pooled, pool, conv, kernel, unpooled, size)
    check_result(y, y.size(0), weight.size(1) * conv.groups, *size)

    wide = accumulator(y.dtype)
    u = unpool_relu2d(y.to(wide), switches, *pool[:4], unpooled, overlap)  # [N, K, Hu, Wu]
    extra = output_padding_of(unpooled, size, conv, kernel)

    def transposed(u, weight):
        return F.conv_transpose2d(
            u, weight, None, conv.stride, conv.padding, extra, conv.groups, conv.dilation
        )

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        if strict_nan:
            return transposed(u, weight.to(wide)).to(y.dtype)
        return skipping_zeros(transposed, u, weight.to(wide)).to(y.dtype)


def skipping_zeros(transposed, u, weight):
    """transposed(u, weight) without the products of an exact zero of u with what is not finite."""
    if weight.isfinite().all():
        return transposed(u, weight)
    finite = torch.where(weight.isfinite(), weight, weight.sign().nan_to_num(nan=1.0))
    z = transposed(u, finite)
    rising, falling = (u > 0).to(u.dtype), (u < 0).to(u.dtype)
    above, below = (weight == torch.inf).to(u.dtype), (weight == -torch.inf).to(u.dtype)
    undefined = transposed((u != 0).to(u.dtype), weight.isnan().to(u.dtype)) > 0
    plus = (transposed(rising, above) > 0) | (transposed(falling, below) > 0)
    minus = (transposed(rising, below) > 0) | (transposed(falling, above) > 0)
    for chosen, value in ((plus, torch.inf), (minus, -torch.inf), (undefined, torch.nan)):
        z = z + torch.where(chosen, value, 0.0)
    return z
