"""How a convolution's output changes where its input changes inside a patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zfcore.reference._params import ConvChange, Places
from zfcore.reference.deconv_step import cut
from zfcore.reference.relu_delta import rectified


def conv_delta(delta, weight, step: ConvChange, places: Places, clean=None, scale=None):
    """[B, K, *places.size]: what the output changes by where the input changes by ``delta`` [B, C, h, w].

    weight: [K, C / groups, kh, kw]. scale: [K], multiplies what each filter gives. clean: [N, K, *step.above], the
    outputs z about which the change g is rectified, by step.rectifier: f(z + g) - f(z); None for g itself.
    Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
    """
    kernel, stride, padding, dilation = step.window
    each = torch.arange(len(delta), device=delta.device)
    corner = torch.tensor([-p for p in padding], device=delta.device)
    reach = [(n - 1) * s + d * (k - 1) + 1 for n, k, s, d in zip(step.above, kernel, stride, dilation)]
    under = cut(delta, each, corner - places.origin, reach)  # all that any window of the map looks at
    change = F.conv2d(under, weight, None, stride, 0, dilation, step.groups)
    if scale is not None:
        change = change * scale[:, None, None]
    change = cut(change, each, places.out_origin, places.size)
    if clean is None:
        return change
    return rectified(cut(clean, places.image, places.out_origin, places.size), change, step.rectifier)
