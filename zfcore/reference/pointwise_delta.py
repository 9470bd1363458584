"""How maps of a function of each value change where their input changes inside a patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zfcore.reference._params import Places
from zfcore.reference.deconv_step import cut

# By name, each of a value and two parameters that most do not have. The native kernels number them in this order.
FUNCTIONS = {
    "sigmoid": lambda v, a, b: torch.sigmoid(v),
    "tanh": lambda v, a, b: torch.tanh(v),
    "silu": lambda v, a, b: F.silu(v),
    "hardswish": lambda v, a, b: F.hardswish(v),
    "hardsigmoid": lambda v, a, b: F.hardsigmoid(v),
    "gelu": lambda v, a, b: F.gelu(v),
    "gelu_tanh": lambda v, a, b: F.gelu(v, approximate="tanh"),
    "mish": lambda v, a, b: F.mish(v),
    "softplus": lambda v, a, b: F.softplus(v, a, b),  # a: beta, b: threshold
    "elu": lambda v, a, b: F.elu(v, a),  # a: alpha
    "exp": lambda v, a, b: torch.exp(v),
    "square": lambda v, a, b: torch.square(v),
    "abs": lambda v, a, b: torch.abs(v),
    "sqrt": lambda v, a, b: torch.sqrt(v),
}


def pointwise_delta(change, clean, function: tuple[str, float, float], places: Places):
    """f(x + change) - f(x): [B, C, h, w], with x the clean maps [N, C, H, W] and f a function by name, a and b."""
    name, a, b = function
    x = cut(clean, places.image, places.origin, places.size)
    return FUNCTIONS[name](x + change, a, b) - FUNCTIONS[name](x, a, b)
