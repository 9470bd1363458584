"""A deconvnet in float64 that shares no code with zfcore: autograd over whole maps, every rule its own
function.

Max-pooling is written out with unfold, so that switches, overlap and borders are worked out here once more.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


class _Rectified(torch.autograd.Function):
    """relu, relu6 and leaky relu. up: the forward; low, high: where the slope is 1; slope: below."""

    @staticmethod
    def forward(ctx, z, low_slope, high, rule):
        ctx.settings = low_slope, high, rule
        ctx.save_for_backward(z)
        return torch.where(z > 0, z, z * low_slope).clamp(max=high)

    @staticmethod
    def backward(ctx, g):
        low_slope, high, rule = ctx.settings
        (z,) = ctx.saved_tensors
        if rule in ("deconvnet", "guided"):
            g = torch.where(g > 0, g, g * low_slope)
        if rule in ("gradient", "guided"):
            g = g * torch.where(z > 0, torch.where(z < high, 1.0, 0.0), low_slope).to(g)
        return g, None, None, None


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, stride, padding, dilation, ceil_mode, overlap):
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, stride, padding, dilation
        n, c, h, w = x.shape
        size = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode).shape[-2:]
        below = (size[0] - 1) * sh + (kh - 1) * dh + 1 - ph - h
        right = (size[1] - 1) * sw + (kw - 1) * dw + 1 - pw - w
        wide = F.pad(x, (pw, max(right, 0), ph, max(below, 0)), value=-torch.inf)
        number = torch.arange(h * w, dtype=torch.float64).reshape(1, 1, h, w)
        number = F.pad(number, (pw, max(right, 0), ph, max(below, 0)), value=-1)
        windows, places = [], []
        for i in range(kh):
            for j in range(kw):
                rows = slice(i * dh, i * dh + (size[0] - 1) * sh + 1, sh)
                columns = slice(j * dw, j * dw + (size[1] - 1) * sw + 1, sw)
                windows.append(wide[:, :, rows, columns])
                places.append(number[:, :, rows, columns].expand(n, c, *size))
        y, tap = torch.stack(windows).max(0)
        place = torch.stack(places).gather(0, tap[None])[0].long()
        ctx.save_for_backward(place)
        ctx.settings = (h, w), overlap
        return y

    @staticmethod
    def backward(ctx, g):
        (h, w), overlap = ctx.settings
        (place,) = ctx.saved_tensors
        n, c = g.shape[:2]
        g, place = g.reshape(n, c, -1), place.reshape(n, c, -1)
        out = g.new_zeros(n, c, h * w)
        for k in range(g.shape[2]):  # windows in raster order
            at = place[:, :, k : k + 1]
            value = g[:, :, k : k + 1]
            out.scatter_(2, at, value + out.gather(2, at) if overlap == "sum" else value)
        return out.reshape(n, c, h, w), None, None, None, None, None, None


class _Skipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


class _Deconvnet(TorchFunctionMode):
    def __init__(self, rule, overlap):
        super().__init__()
        self.rule, self.overlap = rule, overlap

    def rectified(self, x, slope=0.0, high=torch.inf, inplace=False):
        y = _Rectified.apply(x.clone() if inplace else x, slope, high, self.rule)
        return x.copy_(y) if inplace else y

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f in (F.relu, torch.relu, Tensor.relu):
            return self.rectified(args[0], inplace=kwargs.get("inplace", False) or args[1:] == (True,))
        if f in (F.relu_, torch.relu_, Tensor.relu_):
            return self.rectified(args[0], inplace=True)
        if f is F.relu6:
            return self.rectified(args[0], high=6.0, inplace=kwargs.get("inplace", False))
        if f is F.hardtanh and (kwargs["min_val"], kwargs["max_val"]) == (0.0, 6.0):  # what nn.ReLU6 calls
            return self.rectified(args[0], high=6.0, inplace=kwargs["inplace"])
        if f is F.leaky_relu:
            return self.rectified(args[0], slope=kwargs["negative_slope"])
        if f in (torch.clamp, Tensor.clamp, Tensor.clamp_min) and (args[1:] == (0,) or kwargs == {"min": 0}):
            return self.rectified(args[0])
        if f in (F.max_pool2d, torch.max_pool2d):
            names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
            kernel = _pair(given["kernel_size"])
            return _MaxPool.apply(
                args[0],
                kernel,
                _pair(given.get("stride") or kernel),
                _pair(given.get("padding", 0)),
                _pair(given.get("dilation", 1)),
                given.get("ceil_mode", False),
                self.overlap,
            )
        if f is F.local_response_norm:
            return _Skipped.apply(args[0], f(*args, **kwargs).detach())
        return f(*args, **kwargs)


class _TorchPool(nn.MaxPool2d):
    """zfcore's own pooling layer, on torch's pooling."""


def in_float64(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).double().eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MaxPool2d) and type(child) is not nn.MaxPool2d:
                window = child.kernel_size, child.stride, child.padding, child.dilation
                setattr(module, name, _TorchPool(*window, ceil_mode=child.ceil_mode))
    return model


def project(
    model, images, layer, units, positions, rule="deconvnet", seed="activation", overlap="sum", call=-1
):
    """pixels [N, U, C, H, W] and activations [N, U], float64. positions: int64 [N, U, 2], or "all"."""
    model = in_float64(model)
    module = model.get_submodule(layer)
    outputs = []
    handle = module.register_forward_hook(lambda m, a, out: outputs.append(out.clone()))
    x = images.detach().double().clone().requires_grad_()
    copies = torch.autograd.graph.saved_tensors_hooks(
        torch.clone, lambda saved: saved
    )  # in-place ReLUs overwrite
    with torch.enable_grad(), copies, _Deconvnet(rule, overlap):
        model(x.clone())
    handle.remove()
    out = outputs[call]
    maps = out.detach() if out.dim() == 4 else out.detach()[:, :, None, None]
    rows = torch.arange(len(x))
    pixels, activations = [], []
    for i, unit in enumerate(units):
        g = torch.zeros_like(maps)
        if isinstance(positions, str):
            g[:, unit] = maps[:, unit] if seed == "activation" else 1.0
            activations.append(maps[:, unit].sum((-2, -1)))
        else:
            at = rows, unit, positions[:, i, 0], positions[:, i, 1]
            activations.append(maps[at])
            g[at] = maps[at] if seed == "activation" else 1.0
        (p,) = torch.autograd.grad(out, x, g.reshape(out.shape), retain_graph=True, allow_unused=True)
        pixels.append(torch.zeros_like(x) if p is None else p)
    return torch.stack(pixels, 1), torch.stack(activations, 1)


def crop(pixels, boxes):
    """pixels [N, U, C, H, W] cut to boxes [N, U, 4], zeros outside the image."""
    n, u, _, height, width = pixels.shape
    cut = []
    for i in range(n):
        for j in range(u):
            y0, x0, y1, x1 = boxes[i, j].tolist()
            cut.append(F.pad(pixels[i, j], (-x0, x1 - width, -y0, y1 - height)))
    return torch.stack(cut).unflatten(0, (n, u))
