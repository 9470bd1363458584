"""Random small networks as Python text, from a grammar of what the engines read and of how models are written.

A line is drawn, tried on two images, and kept if it runs and its values stay small.
"""

from __future__ import annotations

import contextlib
import linecache
import random
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PREAMBLE = '''\
class Straight(torch.autograd.Function):
    """Its gradient is passed straight through."""

    @staticmethod
    def forward(ctx, x):
        return x.sign() * 0.5

    @staticmethod
    def backward(ctx, g):
        return g


class Own(torch.autograd.Function):
    """x * sigmoid(x), with its own backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s + x * s * (1 - s))


class Both(torch.autograd.Function):
    """Two results of two maps."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y, x - y

    @staticmethod
    def backward(ctx, g, h):
        x, y = ctx.saved_tensors
        return g * y + h, g * x - h


def _scripted(x: torch.Tensor) -> torch.Tensor:
    y = torch.tanh(x) + 0.25 * x
    return y * 0.5 + torch.sigmoid(y)


def _scripted_sizes(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 4:
        return F.silu(x)
    return x * 0.5


scripted, scripted_sizes = torch.jit.script(_scripted), torch.jit.script(_scripted_sizes)


def windows(x, s: int):
    n, c, h, w = x.shape
    x = x.view(n, c, h // s, s, w // s, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, c)
    x = torch.softmax(x @ x.transpose(-2, -1) * 0.3, dim=-1) @ x
    return x.view(n, h // s, w // s, s, s, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


def shuffled(x, groups: int):
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
'''


def namespace() -> dict[str, object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linecache.cache["<preamble>"] = (len(PREAMBLE), None, PREAMBLE.splitlines(True), "<preamble>")  # for TorchScript
        made = {"torch": torch, "F": F, "nn": nn, "checkpoint": checkpoint, "__name__": "random_network"}
        exec(compile(PREAMBLE, "<preamble>", "exec"), made)
    return made


class Text:
    """A network being written. after: the dtype of its parameters and images."""

    def __init__(self, seed: int, names: dict[str, object]):
        self.rng, self.names = random.Random(seed), names
        self.seed = seed
        self.dtype = torch.float32 if seed % 4 == 0 else torch.float64
        self.modules: list[str] = []
        self.body: list[str] = []
        self.count = 0
        self.oracle = True  # whether the deconvnet's oracle knows all of it
        self.own = nn.Module()
        size = self.rng.randint(8, 12), self.rng.randint(8, 12)
        if self.rng.random() < 0.4:
            size = (8, 8) if self.rng.random() < 0.5 else (12, 12)
        self.shape = (self.rng.choice((1, 3)), *size)
        torch.manual_seed(seed)
        self.live = {"x": torch.randn(2, *self.shape, dtype=self.dtype)}
        self.layers: list[str] = []

    # -- what a line may use

    def pick(self, rank: int | None = 4, like: str | None = None) -> str:
        names = [n for n, t in self.live.items() if rank is None or t.dim() == rank]
        if like is not None:
            names = [n for n in names if self.live[n].shape == self.live[like].shape]
        if not names:
            raise LookupError
        recent = names[-2:] if self.rng.random() < 0.75 else names
        return self.rng.choice(recent)

    def shape_of(self, name: str) -> list[int]:
        return list(self.live[name].shape)

    def new(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def module(self, made: str, *more: str) -> str:
        """A module of the network's, and lines that follow its making."""
        self.count += 1
        name = f"m{self.count}"
        self.pending += [f"self.{name} = {made}", *(line.replace("@", f"self.{name}") for line in more)]
        self.named.append(name)
        return f"self.{name}"

    def any(self, *choices):
        return self.rng.choice(choices)

    # -- lines

    def attempt(self) -> None:
        """One more line, or none where what was drawn does not run."""
        draw, known = self.rng.choices(LINES, WEIGHTS)[0]
        self.pending, self.named, count = [], [], self.count
        try:
            lines = draw(self)
        except (LookupError, ValueError):
            self.count = count
            return
        lines = [lines] if isinstance(lines, str) else list(lines)
        if self.run(lines):
            self.modules += self.pending
            self.layers += self.named
            self.body += lines
            self.oracle &= known
        else:
            self.count = count

    def run(self, lines: list[str]) -> bool:
        before = {name: t.clone() for name, t in self.live.items()}
        scope = {**self.names, "self": self.own, **self.live}
        buffers = {name: b.clone() for name, b in self.own.named_buffers()}
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                for line in self.pending:
                    exec(line, scope)
                self.own.to(self.dtype).eval()
                exec("\n".join(lines), scope)
            made = {n: t for n, t in scope.items() if n not in self.names and isinstance(t, Tensor)}
            fine = all(
                t.dtype == self.dtype and t.dim() > 1 and len(t) == 2 and 0 < t[0].numel() <= 1200
                and bool(t.isfinite().all()) and float(t.abs().max()) < 200
                for t in made.values()
            )  # fmt: skip
        except Exception:  # what was drawn does not run on these maps
            made, fine = {}, False
        if fine:
            self.live = made
            return True
        for name, t in before.items():
            with contextlib.suppress(RuntimeError):
                self.live[name].copy_(t)
        for name, b in self.own.named_buffers():
            if name in buffers and b.shape == buffers[name].shape:
                b.copy_(buffers[name])
        return False

    def write(self) -> None:
        wanted = self.rng.randint(3, 12)
        for _ in range(60):
            if len(self.body) >= wanted:
                break
            self.attempt()
        if self.seed % 2 == 0:  # a head of classes
            last = self.pick(None) if self.rng.random() < 0.3 else list(self.live)[-1]
            rank = len(self.shape_of(last))
            flat = f"{last}.mean((2, 3))" if rank == 4 and self.rng.random() < 0.7 else f"{last}.flatten(1)" if rank > 2 else last
            length = self.shape_of(last)[1] if "mean" in flat else self.live[last][0].numel()
            self.pending, self.named = [], []
            head = self.module(f"nn.Linear({length}, 5)")
            self.modules += self.pending
            self.layers += self.named
            self.body.append(f"return {head}({flat})")
        else:
            self.body.append(f"return {list(self.live)[-1]}")

    def source(self) -> str:
        own = "\n".join(f"        {line}" for line in self.modules)
        body = "\n".join(f"        {line}" for each in self.body for line in each.split("\n"))
        return f"class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n{own}\n\n    def forward(self, x):\n{body}\n"


# ---- The grammar ---------------------------------------------------------------------------------------------


def conv(t):
    x = t.pick()
    c, h, w = t.shape_of(x)[1:]
    groups = t.any(1, 1, 1, *(g for g in (c, 2) if c % g == 0))
    out = t.rng.randint(1, 3) * groups if groups > 1 else t.rng.randint(3, 6)
    kernel = t.any(1, 2, 3, 3, 3, (1, 3), (3, 2), 5)
    padding = t.any(0, 1, 1, (1, 0), 2, "'same'", "'valid'")
    stride = 1 if padding == "'same'" else t.any(1, 1, 1, 2, (2, 1))
    mode = t.any("zeros", "zeros", "zeros", "zeros", "reflect", "circular", "replicate")
    bias, dilation = t.any(True, True, False), t.any(1, 1, 1, 2)
    given = f"{c}, {out}, {kernel}, {stride}, {padding}, {dilation}, {groups}, {bias}, '{mode}'"
    more = []
    wrap = "{}"
    if t.rng.random() < 0.08:
        wrap = t.any("torch.nn.utils.parametrizations.weight_norm({})", "torch.nn.utils.parametrizations.spectral_norm({})")
    if t.rng.random() < 0.06:
        more.append(f"@.register_forward_hook({t.any('lambda m, a, out: out * 0.5', 'lambda m, a, out: None')})")
    m = t.module(wrap.format(f"nn.Conv2d({given})"), *more)
    return f"{t.new()} = {m}({x})"


def conv_function(t):
    x = t.pick()
    c = t.shape_of(x)[1]
    w = t.module(f"nn.Conv2d({c}, 4, 3)")
    return f"{t.new()} = " + t.any(
        f"F.conv2d({x}, {w}.weight, None, 1, 1)", f"torch.conv2d({x}, {w}.weight, bias={w}.bias, padding=(1, 1))",
        f"torch.ops.aten.conv2d({x}, {w}.weight, {w}.bias, [2, 1], [1, 1])",
        f"torch.ops.aten.convolution({x}, {w}.weight, {w}.bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)",
        f"F.conv_transpose2d({x}, {w}.weight.transpose(0, 1), stride=2)",
        f"F.conv2d({x}, {w}.weight - {w}.weight.mean((1, 2, 3), keepdim=True), padding='same')",
        f"F.conv1d({x}.flatten(2), {w}.weight.flatten(2)[:, :, :3], padding=1)",
        f"F.conv3d({x}.unsqueeze(2), {w}.weight.unsqueeze(2)).squeeze(2)",
        f"(F.unfold({x}, 3, padding=1).transpose(1, 2) @ {w}.weight.flatten(1).t()).transpose(1, 2).reshape({x}.size(0), 4, *{x}.shape[2:])",
    )  # fmt: skip


def pool(t):
    x = t.pick()
    k, s, p, ceil = t.any(2, 3, (2, 3)), t.any(1, 2, (1, 2)), t.any(0, 0, 1), t.any(True, False)
    m = t.any(
        f"nn.MaxPool2d({k}, {s}, {p}, 1, False, {ceil})", f"nn.MaxPool2d({k}, {s}, {p}, ceil_mode={ceil})",
        f"nn.AvgPool2d({k}, {s}, {p}, {ceil}, {t.any(True, False)})", f"nn.AvgPool2d({k}, {s}, divisor_override=3)",
        "nn.MaxPool2d(2, 1, dilation=2)", f"nn.AdaptiveAvgPool2d({t.any(1, 2, 3, '(2, 1)', '(None, 2)')})",
        f"nn.AdaptiveMaxPool2d({t.any(1, 2, 3)})", "nn.LPPool2d(2, 2)", "nn.ZeroPad2d((1, 0, 2, 1))", "nn.ReflectionPad2d(1)",
    )  # fmt: skip
    if t.rng.random() < 0.7:
        return f"{t.new()} = {t.module(m)}({x})"
    return f"{t.new()} = " + t.any(
        f"F.max_pool2d({x}, 2)", f"torch.max_pool2d({x}, 3, stride=1, padding=1)", f"F.avg_pool2d({x}, kernel_size=2)",
        f"F.max_pool2d({x}, 3, 2, return_indices=True)[0]", f"F.adaptive_avg_pool2d({x}, 1)",
        f"{x}.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))", f"F.interpolate(F.avg_pool2d({x}, 2), size={x}.shape[2:])",
    )  # fmt: skip


def norm(t):
    x = t.pick()
    c, h, w = t.shape_of(x)[1:]
    m = t.any(
        f"nn.BatchNorm2d({c})", f"nn.BatchNorm2d({c}, affine=False)", f"nn.GroupNorm({t.any(1, c)}, {c})", f"nn.InstanceNorm2d({c}, affine=True)",
        f"nn.LayerNorm(({c}, {h}, {w}))", f"nn.LayerNorm({w})", f"nn.LocalResponseNorm({t.any(2, 3)}, 0.5)", "nn.Dropout(0.4)",
        "nn.Dropout2d()", "nn.Identity()", f"nn.RMSNorm({w})",
    )  # fmt: skip
    more = ["@.running_mean.uniform_(-0.5, 0.5)", "@.running_var.uniform_(0.5, 2)"] if "Batch" in m else []
    return f"{t.new()} = {t.module(m, *more)}({x})"


def channel_norm(t):
    x = t.pick()
    c = t.shape_of(x)[1]
    return t.any(
        f"{t.new()} = {t.module(f'nn.LayerNorm({c})')}({x}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)",
        f"{t.new()} = F.normalize({x}, dim=1)",
        f"{t.new()} = ({x} - {x}.mean(1, keepdim=True)) / ({x}.var(1, keepdim=True) + 0.1).sqrt()",
        f"{t.new()} = F.batch_norm({x}, torch.zeros({c}, dtype=x.dtype), torch.ones({c}, dtype=x.dtype) * 2)",
    )


def known_rectifier(t):
    x = t.pick(None)
    return f"{t.new()} = " + t.any(
        f"F.relu({x})", f"torch.relu({x})", f"{x}.relu()", f"{t.module('nn.ReLU()')}({x})", f"{t.module('nn.ReLU(inplace=True)')}({x})",
        f"{t.module('nn.ReLU6()')}({x})", f"{t.module('nn.LeakyReLU(0.2)')}({x})", f"F.leaky_relu({x}, negative_slope=0.1)",
        f"F.relu_({x})", f"{x}.relu_()", f"torch.clamp({x}, min=0)", f"{x}.clamp(min=0)", f"F.relu6({x})",
    )  # fmt: skip


def other_rectifier(t):
    x = t.pick(None)
    return f"{t.new()} = " + t.any(
        f"torch.ops.aten.relu({x})", f"F.threshold({x}, 0, 0)", f"F.hardtanh({x}, 0.0, 2.0)", f"{x}.clamp_(min=0)", f"torch.clamp({x}, 0, 3)",
        f"F.leaky_relu_({x}, 0.3)", f"{x}.clamp(-0.5, 0.5)", f"torch.maximum({x}, torch.zeros_like({x}))", f"{t.module('nn.RReLU()')}({x})",
        f"torch.where({x} > 0, {x}, {x} * 0.1)", f"{x} * ({x} > 0)", f"{x}.masked_fill({x} < 0, 0.0)", f"torch.ops.aten.relu_({x})",
        f"torch.ops.aten.leaky_relu({x}, 0.2)", f"{x}.clamp_min(0.1)", f"F.relu({x}, inplace=True)",
    )  # fmt: skip


def activation(t):
    x = t.pick(None)
    module = t.any("SiLU", "Sigmoid", "Tanh", "GELU", "ELU", "Hardswish", "Hardsigmoid", "Mish", "Softplus", "SELU", "CELU",
                   "Softsign", "LogSigmoid", "Tanhshrink", "Hardtanh", "Hardshrink", "Softshrink", "PReLU")  # fmt: skip
    if t.rng.random() < 0.5:
        return f"{t.new()} = {t.module(f'nn.{module}()')}({x})"
    return f"{t.new()} = " + t.any(
        f"F.silu({x})", f"{x}.sigmoid()", f"torch.tanh({x})", f"F.gelu({x}, approximate='tanh')", f"{x}.square()", f"{x}.abs()",
        f"({x}.abs() + 0.1).sqrt()", f"torch.exp(-{x}.abs())", f"{x} ** 2", f"{x}.pow(3) * 0.1", f"torch.sin({x})", f"F.silu({x}, inplace=True)",
        f"torch.ops.aten.silu({x})", f"torch.ops.aten.sigmoid_({x})", f"{x} * torch.sigmoid({x})", f"{x}.tanh_()", f"F.elu({x}, 0.5)",
        f"F.softmax({x}, 1)", f"torch.log_softmax({x}, dim=-1) * 0.1", f"torch.erf({x})", f"{x}.cumsum(1) * 0.2", f"F.glu(torch.cat([{x}, {x} * 2], 1), 1)",
        f"1 / (1 + {x}.abs())", f"{x}.sort(1)[0]", f"({x} * 0.5).expm1().clamp(max=2)", f"torch.atan2({x}, {x}.abs() + 1)",
    )  # fmt: skip


def arithmetic(t):
    x = t.pick(None)
    y = t.pick(None, like=x)
    shape = t.shape_of(x)
    return f"{t.new()} = " + t.any(
        f"{x} + {y}", f"{x} - {y}", f"{x} * {y}", f"torch.add({x}, {y}, alpha=0.5)", f"{x} / ({y}.abs() + 1)", f"{x}.add({y})", f"{x}.mul({y})",
        f"torch.maximum({x}, {y})", f"torch.lerp({x}, {y}, 0.3)", f"({x} + {y}) * 0.5", f"{x} * 2 + 1", f"1 - {x}", f"-{x}", f"{x} / 2",
        f"torch.addcmul({x}, {x}, {y}, value=0.5)", f"torch.rsub({x}, {y})", f"torch.stack([{x}, {y}], 0).mean(0)", f"torch.stack(({x}, {y}), dim=1).sum(1)",
        f"sum([{x}, {y}, {x}])", f"torch.ops.aten.add({x}, {y})", f"{x} + torch.arange({shape[-1]}, dtype=x.dtype) * 0.1",
        f"{x} * torch.linspace(-1, 1, {shape[1]}, dtype=x.dtype).view({', '.join(['1', '-1', *['1'] * (len(shape) - 2)])})",
        f"{x} + torch.ones({x}.shape, dtype=x.dtype)", f"torch.where({x} > {y}, {x}, {y} * 0.5)", f"{x}.add(torch.zeros({x}.size(0), *{shape[1:]}, dtype=x.dtype))",
        f"torch.einsum('n...,n...->n...', {x}, {y})", f"torch.min({x}, {y})", f"torch._foreach_add([{x}], [{y}])[0]", f"{x}.mul(0.5).add(1).sub({y})",
    )  # fmt: skip


def gates(t):
    x = t.pick()
    c, h, w = t.shape_of(x)[1:]
    return f"{t.new()} = " + t.any(
        f"{x} * {x}.mean((2, 3), keepdim=True).sigmoid()",
        f"{x} * torch.sigmoid({t.module(f'nn.Conv2d({c}, {c}, 1)')}(F.adaptive_avg_pool2d({x}, 1)))",
        f"{x} * {t.module(f'nn.Sequential(nn.Linear({c}, 2), nn.SiLU(), nn.Linear(2, {c}), nn.Sigmoid())')}({x}.mean((2, 3))).view(-1, {c}, 1, 1)",
        f"{x} * {x}.mean(1, keepdim=True).tanh()", f"{x} * {x}.amax((2, 3), keepdim=True).sigmoid().expand_as({x})",
        f"{x} * F.hardsigmoid(F.adaptive_avg_pool2d({x}, 1))", f"{x} + {x}.mean((-1, -2), True)", f"{x} * {x}.mean(3).unsqueeze(3).sigmoid()",
        f"{x} * {x}.flatten(2).mean(2)[:, :, None, None]",
    )  # fmt: skip


def channels(t):
    x = t.pick()
    c = t.shape_of(x)[1]
    if c < 2:
        raise LookupError
    a = t.rng.randint(1, c - 1)
    order = t.rng.sample(range(c), c)
    v, w = t.new(), t.new()
    return t.any(
        f"{v} = {x}[:, :{a}]", f"{v} = {x}[:, {a}:]", f"{v} = {x}[:, {order}]", f"{v} = {x}.flip(1)", f"{v} = {x}.roll(1, 1)", f"{v} = {x}[:, ::2]",
        f"{v} = torch.index_select({x}, 1, torch.tensor({order}))", f"{v}, {w} = torch.split({x}, [{a}, {c - a}], 1)",
        f"{v}, {w} = {x}.chunk(2, 1)[:2]", f"{v} = shuffled({x}, {t.any(2, 3)})", f"{v} = {x}.narrow(1, {a - 1}, {a})", f"{v} = {x}[:, {a}].unsqueeze(1)",
        f"{v} = F.channel_shuffle({x}, 2)", f"{v} = torch.stack({x}.unbind(1)[::-1], 1)", f"{v} = {x}[:, torch.tensor({order}) > 0]",
        f"{v} = {x}.view({x}.shape[0], 2, -1, *{x}.shape[2:])[:, 1]", f"{v} = {x}.repeat(1, 2, 1, 1)", f"{v} = {x}.repeat_interleave(2, 1)",
        f"{v} = torch.tensor_split({x}, 2, dim=1)[0]", f"{v} = {x}.select(1, 0)[:, None]", f"{v} = {x}[:, -{a}:, ...]",
    )  # fmt: skip


def joined(t):
    x = t.pick()
    h, w = t.shape_of(x)[2:]
    parts = [n for n, m in t.live.items() if m.dim() == 4 and list(m.shape[2:]) == [h, w] and m.shape[1] <= 6]
    ys = [t.rng.choice(parts) for _ in range(t.rng.randint(1, 3))]
    v = t.new()
    return t.any(
        f"{v} = torch.cat([{', '.join([x, *ys])}], 1)", f"{v} = torch.cat(({x}, {ys[0]}), dim=-3)", f"{v} = torch.concat([{x}, {x}], {t.any(2, 3)})",
        f"{v} = torch.cat([{x}, {ys[0]} * 0.5], dim=1)", f"{v} = torch.cat([{x}, torch.zeros_like({x}[:, :1])], 1)", f"{v} = torch.hstack([{x}, {ys[0]}])",
        f"{v} = torch.cat([{x}, torch.ones({x}.size(0), 1, {h}, {w}, dtype=x.dtype)], 1)",
    )  # fmt: skip


def places(t):
    x = t.pick()
    c, h, w = t.shape_of(x)[1:]
    v = t.new()
    return f"{v} = " + t.any(
        f"{x}[:, :, 1:, :-1]", f"{x}[..., ::2]", f"F.pad({x}, (1, 1, 0, 2))", f"F.pad({x}, (1, -1))", f"F.pad({x}, (1, 1, 1, 1), mode='reflect')",
        f"F.pad({x}, (0, 0, 0, 0, 1, 0))", f"F.pad({x}, (1, 0), value=0.5)", f"F.interpolate({x}, scale_factor=2)", f"{x}.flip(3)", f"{x}.roll((1, 1), (2, 3))",
        f"F.interpolate({x}, size=({max(1, h - 1)}, {w + 1}), mode='bilinear', align_corners={t.any(True, False)})", f"F.interpolate({x}, size=7, mode='bicubic')",
        f"F.pixel_unshuffle({x}, 2)", f"F.pixel_shuffle({x}, 2)", f"{x}.transpose(2, 3)", f"{x}.permute(0, 1, 3, 2).contiguous()", f"{x}.permute(0, 3, 2, 1)",
        f"{x}.reshape({x}.size(0), -1, {h}, {w})", f"{x}.view(-1, {c}, {w}, {h})", f"{x}.view({x}.shape[0], {c}, -1, 1)", f"windows({x}, {t.any(2, 4)})",
        f"{x}.mean(2, keepdim=True)", f"{x}.amax(1, keepdim=True)", f"{x}.sum(1, keepdim=True) * 0.3", f"{x}.unsqueeze(2).squeeze(2)", f"{x}.expand(-1, 3, -1, -1)",
        f"F.fold(F.unfold({x}, 2), ({h}, {w}), 2)", f"{x}.movedim(1, -1).movedim(-1, 1)", f"{x}.swapaxes(1, 2)", f"{x}.contiguous()", f"{x}.clone()",
        f"torch.cat([{x}[:, :, ::2], {x}[:, :, 1::2]], 1)", f"{x}[:, :, [0, -1]]", f"{x}[:, :, :{max(1, h - 2)}].contiguous(memory_format=torch.channels_last)",
        f"torch.tril({x})", f"F.grid_sample({x}, F.affine_grid(torch.eye(2, 3, dtype=x.dtype).repeat({x}.size(0), 1, 1), {x}.shape, align_corners=False), align_corners=False)",
    )  # fmt: skip


def tokens(t):
    x = t.pick()
    c, h, w = t.shape_of(x)[1:]
    if h * w > 100:
        raise LookupError
    v = t.new()
    heads = 2 if c % 2 == 0 else 1
    line = t.any(
        f"{v} = {x}.flatten(2).transpose(1, 2)",
        f"{v} = F.scaled_dot_product_attention({x}.flatten(2), {x}.flatten(2), {x}.flatten(2))",
        f"{v} = torch.softmax({x}.flatten(2) @ {x}.flatten(2).transpose(1, 2) * 0.2, -1) @ {x}.flatten(2)",
        f"{v} = {t.module(f'nn.MultiheadAttention({c}, {heads}, batch_first=True)')}(*[{x}.flatten(2).transpose(1, 2)] * 3)[0]",
        f"{v} = torch.bmm({x}.flatten(2), {x}.flatten(2).mT) * 0.2",
        f"{v} = torch.einsum('nchw,kc->nkhw', {x}, torch.linspace(-1, 1, {3 * c}, dtype=x.dtype).view(3, {c}))",
        f"{v} = torch.cat([torch.ones(1, 1, {c}, dtype=x.dtype).expand({x}.shape[0], -1, -1), {x}.flatten(2).permute(0, 2, 1)], 1)",
    )
    return line


def of_tokens(t):
    x = t.pick(3)
    a, b = t.shape_of(x)[1:]
    v = t.new()
    qkv = f"{v} = {t.module(f'nn.Linear({b}, {3 * b})')}({x}).reshape({x}.size(0), {a}, 3, 1, {b}).permute(2, 0, 3, 1, 4)"
    return t.any(
        f"{v} = {t.module(f'nn.Linear({b}, {b})')}({x})", f"{v} = {t.module(f'nn.LayerNorm({b})')}({x})", f"{v} = {x}.transpose(1, 2).unsqueeze(3)",
        f"{v} = {x}.transpose(1, 2).reshape({x}.size(0), {b}, -1, 1)", f"{v} = {x}[:, 0]", f"{v} = {x}.mean(1)", f"{v} = {x}[:, None]",
        f"{qkv}\n{v} = F.scaled_dot_product_attention({v}[0], {v}[1], {v}[2]).transpose(1, 2).reshape({x}.size(0), {a}, {b})",
        f"{v} = {x} + {t.module(f'nn.TransformerEncoderLayer({b}, 1, 4, 0.0, batch_first=True)')}({x})", f"{v} = {x} + torch.arange({a}, dtype=x.dtype)[:, None] * 0.1",
    )  # fmt: skip


def in_place(t):
    x = t.pick(None)
    y = t.pick(None, like=x)
    c = t.shape_of(x)[1]
    v = t.new()
    return t.any(
        f"{x} += {y}", f"{x}.mul_(0.5)", f"{x} *= {y}", f"{x}.add_({y}, alpha=0.3)", f"{x}[:, :1] *= 2", f"{x}[:, {c - 1}:] = 0.5", f"{x}.div_(2)", f"{x}.neg_()",
        f"{v} = {x}[:, :1]\n{v} += 1", f"{v} = {x}\n{v}.mul_(0.5)", f"{v} = {x}.view({x}.shape)\n{v}.add_(0.25)", f"{x}[:, 0] = {y}[:, 0] * 2",
        f"{v} = {x}.flatten(1)\n{v}.mul_(0.7)", f"{v} = {x}.reshape({x}.size(0), -1)\n{x} += 1", f"{x}[..., 0] = 0", f"{x}[..., 1:].mul_(0.5)", f"{x}.copy_({y} * 0.5)",
        f"{x}[{x} > 1] = 1.0", f"{x}.masked_fill_({x} < -1, -1.0)", f"{v} = {x}.transpose(1, -1)\n{v} *= 0.5", f"{x}.fill_(0.5)", f"{x}.zero_()", f"{x}[:, [0]] = 0.25",
        f"torch.add({x}, {y}, out={x})", f"{x}.index_fill_(1, torch.tensor([0]), 0.5)", f"{x}.index_add_(1, torch.tensor([0]), {y}[:, :1])", f"{x}.lerp_({y}, 0.5)",
        f"{v} = {x}.chunk(2, 1)[0]\n{v}.relu_()" if c > 1 else f"{x}.sub_(1)", f"{x}.data.mul_(0.5)", f"{x}[:, 0].copy_({x}[:, -1])", f"{x}.addcmul_({y}, {y}, value=0.1)",
        f"for part in {x}.unbind(1):\n    part.mul_(0.5)", f"{x}[:] = {y} * 0.5", f"{x}[..., ::2] += {y}[..., ::2]", f"{v} = {x}.detach()\n{v}.mul_(0.5)",
    )  # fmt: skip


def made_here(t):
    x = t.pick()
    c, h, w = t.shape_of(x)[1:]
    v = t.new()
    return t.any(
        f"{v} = torch.zeros_like({x})\n{v}[:, :, 1:] = {x}[:, :, :-1]", f"{v} = {x}.new_zeros({x}.size(0), {c + 1}, {h}, {w})\n{v}[:, 1:] = {x}",
        f"{v} = torch.empty_like({x})\n{v}[:, :1] = {x}[:, -1:]\n{v}[:, 1:] = {x}[:, :-1]", f"{v} = torch.zeros({x}.shape, dtype=x.dtype)\n{v} += {x}",
        f"{v} = {x}.new_zeros({x}.shape)\n{v}[:, [0]] = {x}[:, :1] * 2", f"{v} = torch.ones_like({x})\n{v}.copy_({x})", f"{v} = torch.zeros_like({x})\n{v}[:, :, ::2, ::2] = {x}[:, :, ::2, ::2]",
        f"{v} = torch.full_like({x}, 0.3)\n{v}.add_({x})", f"{v} = torch.zeros_like({x})\nfor i in range({x}.size(1)):\n    {v}[:, i] = {x}[:, i] * (i + 1) * 0.3",
        f"{v} = {x}.new_empty({x}.shape)\n{v}.copy_({x})\n{v}[:, :, 0] = 0", f"{v} = torch.zeros_like({x})\ntorch.mul({x}, 0.5, out={v})", f"{v} = torch.empty_like({x}).copy_({x})",
        f"{v} = torch.zeros_like({x}).masked_scatter_(torch.ones_like({x}, dtype=torch.bool), {x})", f"{v} = {x}.clone()\n{v}[:, 0] += {x}[:, -1]",
        f"{v} = torch.zeros_like({x})\n{v}[{x} > 0] = 0.5", f"{v} = {x}.new_ones(1, {c}, 1, 1)\n{v} = {v} * {x}", f"{v} = torch.zeros_like({x})\n{v}.index_copy_(1, torch.tensor([0]), {x}[:, :1])",
    )  # fmt: skip


def buffers(t):
    x = t.pick()
    c = t.shape_of(x)[1]
    t.count += 1
    b, v = f"self.b{t.count}", t.new()
    t.pending.append(f"self.register_buffer('b{t.count - 1}', torch.linspace(0.5, 1.5, {c}).view(1, -1, 1, 1))")
    return t.any(
        f"{v} = {x} * {b}", f"{b}.add_(0.25)\n{v} = {x} * {b}", f"{b} = {b} * 0.5\n{v} = {x} + {b}", f"{v} = {x} * {b}\n{b}.mul_(0)",
        f"{b}[:, :1] = 0.25\n{v} = {x} - {b}", f"{v} = {x} * {b}\n{b} += 1\n{v} = {v} + {b} * 0.1", f"self.last = {x}\n{v} = self.last * {b}",
        f"{b} = {x}.mean((0, 2, 3), keepdim=True)\n{v} = {x} * 0.5", f"{v} = {x} * {b}.expand_as({x})",
        f"{b}.copy_({x}.mean((2, 3), keepdim=True)[:1])\n{v} = {x} * 0.5",
    )  # fmt: skip


def flow(t):
    x = t.pick()
    h, w = t.shape_of(x)[2:]
    v = t.new()
    return t.any(
        f"{v} = {x} * 0.5 if {x}.shape[-1] > {t.rng.randint(1, 12)} else {x} + 1", f"{v} = {x}\nwhile {v}.size(2) > 5:\n    {v} = F.avg_pool2d({v}, 2)",
        f"{v} = {x}\nfor i in range({x}.shape[1]):\n    {v} = {v} * 0.9 + i * 0.1", f"{v} = {x} if isinstance({x}, torch.Tensor) and {x}.dim() == 4 else None",
        f"{v} = {x}.view(len({x}), -1) if {x}.numel() > 10 else {x}", f"n, c, h, w = {x}.shape\n{v} = {x}.reshape(n, c * h, w).reshape(n, c, h, w)",
        f"n = {x}.size(0)\n{v} = {x}.reshape(n * {x}.size(1), 1, {h}, {w}).mul(0.5).reshape(n, -1, {h}, {w})", f"{v} = {x} * (0.5 if {x}.requires_grad else 0.5)",
        f"{v} = {x} / {x}.shape[1]", f"{v} = {x} if self.training else {x} * 0.5", f"assert {x}.shape[0] > 0\n{v} = {x} + 0.5",
        f"{v} = {x}.reshape(-1, {h}, {w})\n{v} = F.avg_pool2d({v}.unsqueeze(1), 3, 1, 1).reshape({x}.shape)",
        f"{v} = {x} * 0.5 if {x}.size(0) > 3 else {x}", f"{v} = {x} * (1 / {x}.size(0))", f"{v} = {x} * 0.5 if {x}.mean() > 0 else {x}", f"{v} = {x} - {x}.mean()",
        f"{v} = {x}.squeeze()", f"{v} = {x} * {x}.size(0)", f"{v} = {x}[:2]", f"{v} = {x} - {x}[:1]", f"{v} = {x}.flip(0)", f"{v} = {x} + torch.rand_like({x})",
    )  # fmt: skip


def regions(t):
    x = t.pick()
    c = t.shape_of(x)[1]
    v = t.new()
    part = t.module(f"nn.Sequential(nn.Conv2d({c}, {c}, 1), nn.Tanh())")
    return t.any(
        f"with torch.no_grad():\n    {v} = {x} * 2\n{v} = {v} + {x}", f"{v} = {x}.detach() * 0.5 + {x}", f"with torch.no_grad():\n    {v} = torch.sigmoid({x})",
        f"with torch.autocast('cpu', dtype=torch.bfloat16):\n    {v} = {part}({x})\n{v} = {v}.to(x.dtype)", f"with torch.enable_grad():\n    {v} = {part}({x})",
        f"with torch.no_grad():\n    {v} = {x}[:, :1]\n{v} = {v} + {x}", f"{v} = checkpoint({part}, {x}, use_reentrant={t.any(True, False)})",
        f"{v} = {part}({part}({x}))", f"with torch.no_grad():\n    {x}.clamp_(-1, 1)\n{v} = {x} * 2", f"with torch.inference_mode():\n    {v} = {x} * 1\n{v} = {x} + 1",
        f"{v} = {x}.to(torch.float32).to(x.dtype)", f"{v} = {x}.double().float().to(x.dtype)", f"{v} = {x}.half().to(x.dtype)",
    )  # fmt: skip


def own_functions(t):
    x = t.pick()
    y = t.pick(4, like=x)
    v, w = t.new(), t.new()
    return t.any(
        f"{v} = Straight.apply({x})", f"{v} = Own.apply({x})", f"{v}, {w} = Both.apply({x}, {y})", f"{v} = Own.apply({x}) + Straight.apply({y})",
        f"{v} = scripted({x})", f"{v} = scripted_sizes({x})", f"{v} = checkpoint(scripted, {x}, use_reentrant=False)", f"{v} = Both.apply({x}, {y})[1]",
        f"{v} = torch.func.vmap(lambda z: z * 0.5 + 1)({x})", f"{v} = Straight.apply({x}[:, :1]) * {x}", f"{v} = Own.apply({x}.flatten(1)).view({x}.shape)",
    )  # fmt: skip


def of_rows(t):
    x = t.pick(2)
    f = t.shape_of(x)[1]
    v = t.new()
    return f"{v} = " + t.any(
        f"{t.module(f'nn.Linear({f}, 6)')}({x})", f"{x}[:, :, None, None]", f"{x}.view({x}.size(0), -1, 1, 1)", f"F.normalize({x})", f"{x}.softmax(-1)",
        f"{t.module(f'nn.BatchNorm1d({f})')}({x})", f"{x} @ torch.ones({f}, 4, dtype=x.dtype)", f"F.layer_norm({x}, ({f},))",
    )  # fmt: skip


LINES = [  # (what draws a line, whether the deconvnet's oracle knows it)
    (conv, True), (conv_function, True), (pool, True), (norm, True), (channel_norm, True), (known_rectifier, True), (other_rectifier, False),
    (activation, True), (arithmetic, True), (gates, True), (channels, True), (joined, True), (places, True), (tokens, True), (of_tokens, True),
    (in_place, True), (made_here, True), (buffers, True), (flow, True), (regions, False), (own_functions, False), (of_rows, True),
]  # fmt: skip
WEIGHTS = [6, 2, 3, 3, 1, 4, 2, 3, 4, 2, 4, 3, 4, 2, 2, 3, 2, 1, 2, 1, 1, 1]
