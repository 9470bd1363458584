"""Every torch function that takes a tensor, called in a model's forward between two convolutions, in natural ways."""

from __future__ import annotations

import inspect
import random
import re
import traceback
import warnings
import zlib

import numpy
import processes
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zfcore.errors import ZfcoreError
from zfcore.network import read_network

SHAPE = (3, 6, 8)
BATCHES = (2, 1, 7)
# They are no operation of a model: they start other processes, wait for devices, or write to the terminal.
_LEFT_OUT = re.compile(
    r"cuda|cudnn|miopen|mps|xpu|vulkan|hpu|mtia|ipu|_sym_|sym_|__setstate__|__reduce|_test_|compile|set_default|pin_memory"
    r"|record_stream|__cuda|share_memory|_assert|_print|from_file|_debug|_has_compatible|__torch_function__|__init|__new__"
    r"|__class|__subclass|__getattr|__setattr|__delattr|__dir__|__sizeof__|__doc__|__weakref__|__dict__|__slots__"
    r"|_make_subclass|_make_wrapper|__torch_dispatch__|__del__|_handle_torch|_c10d|_wrapper_subclass|_symm_"
)


def functions() -> dict[str, object]:
    """By name: what may be overridden, tensors' methods and attributes, nn.functional, and ATen's operations."""
    found: dict[str, object] = {}
    for function in torch.overrides.get_testing_overrides():
        name = torch.overrides.resolve_name(function) or f"torch.{getattr(function, '__name__', function)}"
        found.setdefault(name, function)
    for owner, prefix in ((Tensor, "torch.Tensor."), (F, "torch.nn.functional."), (torch, "torch.")):
        for name in sorted(dir(owner)):
            function = getattr(owner, name)
            if owner is not Tensor and (name.startswith("_") or inspect.isclass(function) or name not in _tensor_names(owner)):
                continue
            if callable(function):
                found.setdefault(prefix + name, function)
            elif inspect.isgetsetdescriptor(function) or isinstance(function, property):
                found.setdefault(f"{prefix}{name}.__get__", function.__get__)
    for name in sorted({n.partition(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")}):
        packet = getattr(torch.ops.aten, name[6:], None)
        if packet is None:
            continue
        schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
        if any(s.arguments and str(s.arguments[0].type) in ("Tensor", "List[Tensor]") for s in schemas):
            found[f"torch.ops.aten.{name[6:]}"] = packet
    return {name: found[name] for name in sorted(found) if not _LEFT_OUT.search(name)}


_overridable: dict[object, set[str]] = {}


def _tensor_names(owner: object) -> set[str]:
    """Of a module's functions, those that take tensors."""
    if not _overridable:
        for each, those in torch.overrides.get_overridable_functions().items():
            if each in (torch, F):
                _overridable[each] = {getattr(function, "__name__", "") for function in those}
    return _overridable[owner]


# ---- How they are called -------------------------------------------------------------------------------------

CALLS = {
    "(x)": lambda x, c: ((x,), {}),
    "(x, 2)": lambda x, c: ((x, 2), {}),
    "(x, 1)": lambda x, c: ((x, 1), {}),
    "(x, 0.5)": lambda x, c: ((x, 0.5), {}),
    "(x, -1)": lambda x, c: ((x, -1), {}),
    "(x, x)": lambda x, c: ((x, x), {}),
    "(x, y)": lambda x, c: ((x, x * 0.5 + 0.1), {}),
    "(x, x, x)": lambda x, c: ((x, x, x), {}),
    "(x, 1, 2)": lambda x, c: ((x, 1, 2), {}),
    "(x, 0.1, 0.9)": lambda x, c: ((x, 0.1, 0.9), {}),
    "(x, 1, True)": lambda x, c: ((x, 1, True), {}),
    "(x, (2, 2))": lambda x, c: ((x, (2, 2)), {}),
    "(x, [1])": lambda x, c: ((x, [1]), {}),
    "(x, [2, 3], True)": lambda x, c: ((x, [2, 3], True), {}),
    "(x, dim=1)": lambda x, c: ((x,), {"dim": 1}),
    "(x, other=x)": lambda x, c: ((x,), {"other": x}),
    "(input=x)": lambda x, c: ((), {"input": x}),
    "(x, constant)": lambda x, c: ((x, c), {}),
    "(constant, x)": lambda x, c: ((c, x), {}),
    "(x, constant, constant)": lambda x, c: ((x, c, c), {}),
    "(x, filters)": lambda x, c: ((x, torch.linspace(-1, 1, 144, dtype=x.dtype).view(4, 4, 3, 3)), {}),
    "(x, 1, places)": lambda x, c: ((x, 1, torch.tensor([2, 0, 1, 3])), {}),
    "([x, y])": lambda x, c: (([x, x * 2],), {}),
    "([x, y], 1)": lambda x, c: (([x, x * 2], 1), {}),
    "(mask)": lambda x, c: ((x > 0,), {}),
    "(x, mask)": lambda x, c: ((x, x > 0), {}),
    "(x, mask, 0.5)": lambda x, c: ((x, x > 0, 0.5), {}),
    "(mask, x, x)": lambda x, c: ((x > 0, x, x * 2), {}),
    "(matrix)": lambda x, c: ((x.flatten(1),), {}),
    "(matrix, 1)": lambda x, c: ((x.flatten(1), 1), {}),
    "(matrix, matrix)": lambda x, c: ((x.flatten(1), x.flatten(1)), {}),
    "(matrix, weights)": lambda x, c: ((x.flatten(1), torch.linspace(-1, 1, 5 * 4 * 48, dtype=x.dtype).view(5, -1)), {}),
    "(vectors)": lambda x, c: ((x.mean((2, 3)),), {}),
    "(rows)": lambda x, c: ((x.flatten(2),), {}),
    "(rows, rows)": lambda x, c: ((x.flatten(2), x.flatten(2).transpose(1, 2)), {}),
    "(number of images)": lambda x, c: ((x, len(x)), {}),
    "in order of its names": None,
}
_NAMED = {
    "dim": 1, "dims": [1], "other": "y", "input": "x", "self": "x", "tensor": "x", "x": "x", "weight": "c", "size": [2, 2],
    "output_size": 2, "kernel_size": 2, "mask": "m", "index": "i", "value": 0.5, "target": "y", "exponent": 2, "p": 2,
    "tensors": "l", "repeats": [1, 2, 1, 1], "shape": [-1, 4, 48], "eps": 1e-5, "groups": 2, "dim0": 1, "dim1": 2,
    "source": "y", "src": "y", "min": -0.5, "max": 0.5, "n": 2, "k": 2, "condition": "m", "dtype": torch.float32,
    "normalized_shape": [8], "num_groups": 2, "pad": [1, 1], "padding": 1, "stride": 1, "alpha": 0.5, "lambd": 0.5,
    "threshold": 0.1, "downscale_factor": 2, "upscale_factor": 2, "scale_factor": 2.0, "mat2": "y", "end": "y",
    "start": 0, "length": 2, "step": 1, "axis": 1, "chunks": 2, "sections": 2, "split_size": 2, "split_size_or_sections": 2,
    "equation": "bchw->bhwc", "operands": "x", "indices": "i", "ord": 2, "bins": 4, "diagonal": 0, "offset": 0,
}  # fmt: skip


def by_names(function: object, x: Tensor, c: Tensor) -> tuple[tuple, dict]:
    """Arguments without a default, by what their names stand for."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        schema = getattr(function, function.overloads()[0])._schema
        wanted = [(a.name, str(a.type)) for a in schema.arguments if not a.has_default_value()]
    else:
        like = torch.overrides.get_testing_overrides().get(function, function)
        parameters = inspect.signature(like).parameters.values()
        wanted = [(p.name, "") for p in parameters if p.default is p.empty and p.kind in (0, 1)]
    letters = {"x": x, "y": x * 0.5 + 0.1, "c": c, "m": x > 0, "i": torch.tensor([1, 0]), "l": [x, x * 2]}
    typed = {"Tensor": "x", "List[Tensor]": "l", "int": 1, "float": 0.5, "number": 2, "List[int]": [1, 1], "bool": False,
             "Optional[Tensor]": None, "List[float]": [1.0, 1.0], "str": "mean"}  # fmt: skip
    made = []
    for name, kind in wanted:
        value = _NAMED.get(name, "x")
        if kind and (name not in _NAMED or (kind in ("Tensor", "List[Tensor]")) != (value in ("x", "y", "c", "m", "i", "l"))):
            value = typed.get(kind, "x")
        made.append(letters[value] if isinstance(value, str) and value in letters else value)
    return tuple(made), {}


class Between(nn.Module):
    """A convolution, the function, and another convolution where its result is a map."""

    def __init__(self, function: object, call: str, alias: bool):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.register_buffer("constant", torch.linspace(-1, 2, 4).view(1, 4, 1, 1))
        self.notes = {"calls": [1, 2]}
        self.function, self.call, self.alias = function, call, alias

    def forward(self, x):
        x = self.first(x)
        kept = x[:, 1:3] if self.alias else None  # a view, which work in place on x changes
        build = CALLS[self.call]
        args, kwargs = by_names(self.function, x, self.constant) if build is None else build(x, self.constant)
        made = self.function(*args, **kwargs)
        tensors = [t for t in pytree.tree_leaves(made) if isinstance(t, Tensor)]
        y = tensors[0] if tensors else x
        if y.is_complex():
            y = torch.view_as_real(y)
        if not y.is_floating_point():
            y = y.to(torch.float32)
        if kept is not None:
            x = x + kept.mean(1, keepdim=True)
            return y * 2 if y.shape != x.shape else self.last(y + x)
        return self.last(y) if y.dim() == 4 and y.shape[1] == 4 else y * 2


# ---- What must hold ------------------------------------------------------------------------------------------


def state(model: nn.Module) -> list:
    """What reading a model may not change."""
    return [
        {name: (id(t), t.detach().clone(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()},
        {name: parameter.grad for name, parameter in model.named_parameters()},
        [{key: id(value) for key, value in vars(module).items()} for module in model.modules()],
        repr(model.notes),
        torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate(), torch.is_grad_enabled(),
        torch.get_default_dtype(), model.training,
    ]  # fmt: skip


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, numpy.ndarray):
        return numpy.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = (t.detach().double().nan_to_num(1e30, 1e31, -1e31) for t in (a, b))
    scale = b[b.abs() < 1e29].abs().max().clamp(min=1) if (b.abs() < 1e29).any() else 1.0
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(scale))


def answer(model: nn.Module, images: Tensor, way=None) -> tuple[Tensor, Tensor | None]:
    """The model's output, and the gradient of a sum of it by the images, where there is one."""
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        out = model(images * 1.0) if way is None else way(images * 1.0)
        if not isinstance(out, Tensor) or not out.requires_grad:
            return out, None
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        (slope,) = torch.autograd.grad((out * weights).sum(), images, allow_unused=True)
    return out, slope


def failures_of(name: str, function: object, call: str, alias: bool, number: int, seed: int) -> list[str]:
    label = f"{name}{call}" + (", with a view in use" if alias else "")
    torch.manual_seed(seed)
    model = Between(function, call, alias).eval()
    images = {n: torch.randn(n, *SHAPE) for n in BATCHES}
    wanted, slope, works, differentiable = {}, None, True, True
    try:
        with torch.no_grad():
            wanted = {n: model(images[n].clone()) for n in BATCHES}
        works = all(isinstance(out, Tensor) for out in wanted.values())
    except Exception:
        works = False  # then anything typed will do
    failures = []
    for gradient in (False, True) if works else (False,):
        processes.at([name, number, "read"])
        before = state(model)
        try:
            network = read_network(model, SHAPE, gradient=gradient)
        except ZfcoreError:
            network = None
        except BaseException:
            failures.append(f"{label}, gradient={gradient}: {traceback.format_exc(limit=-4)}")
            network = None
        if not same(before, state(model)):
            failures.append(f"{label}, gradient={gradient}: reading changed the model or the random state")
        if network is None or not works:
            continue

        def by_stages(images, network=network):
            return network.returned(network.forward(images, lambda stage, inputs: stage.run(*inputs)))

        for n in BATCHES:
            try:
                with torch.no_grad():
                    found = by_stages(images[n].clone())
            except Exception:
                failures.append(f"{label}, {n} images: the stages fail: {traceback.format_exc(limit=-3)}")
                break
            torch.manual_seed(seed + n)  # random functions must have been refused
            with torch.no_grad():
                out = model(images[n].clone())
            if not (close(found, out) and close(out, wanted[n])):
                failures.append(f"{label}, gradient={gradient}, {n} images: {_difference(found, out)}")
                break
        if gradient and not failures and not re.search(r"logical_\w+_$", name):  # to whose writes autograd is blind
            try:
                slope = answer(model, images[2])[1]
            except Exception:
                differentiable = False
            if differentiable:
                try:
                    found = answer(model, images[2], by_stages)[1]
                except Exception:
                    failures.append(f"{label}: the stages' gradient fails: {traceback.format_exc(limit=-3)}")
                    continue
                zero = torch.zeros_like(images[2])
                found, slope = (zero if g is None else g for g in (found, slope))
                if not close(found, slope):
                    failures.append(f"{label}: the gradient is another: {_difference(found, slope)}")
    return failures


def _difference(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape:
        return f"{tuple(found.shape)} is not the model's {tuple(wanted.shape)}"
    return f"off by {(found.double() - wanted.double()).abs().max():.3g}"


def work(case: list) -> list[str]:
    """The ways to call a function from one on: all of them, or so many."""
    name, first, count = case
    function = _FUNCTIONS[name]
    ways = [(call, False) for call in CALLS]
    if re.search(r"[^_]_$|__i\w+__$|out$", name):  # it works in place
        ways += [(call, True) for call in CALLS]
    if count is not None:
        ways = random.Random(name).sample(ways, min(count, len(ways)))
    failures = []
    for number, (call, alias) in list(enumerate(ways))[first:]:
        processes.at([name, number, "model"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = failures_of(name, function, call, alias, number, zlib.crc32(f"{name}{call}".encode()))
        failures += found
    return failures


if __name__ == "__main__":
    _FUNCTIONS = functions()
    torch.set_num_threads(1)
    processes.serve(work)
