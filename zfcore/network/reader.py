"""Reads a network into stages with torch.fx.

What the reader knows becomes a stage; the first operation it does not know, and control flow that fx cannot follow,
raise UnsupportedOperation with the operation's name. Only what leads to the layer asked for is read.
"""

from __future__ import annotations

import builtins
import difflib
import math
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zfcore import ops
from zfcore.errors import LayerNotFound, UnsupportedOperation
from zfcore.network.geometry import Field, Window, pair
from zfcore.network.stages import Rectifier, Stage, batch_norm_scale, switches_of

# fx replaces nn.Module.__call__ for the whole process while it traces; one trace at a time, and the tracer below
# lets the calls of other threads through.
_tracing = threading.Lock()


class _Tracer(fx.Tracer):
    def __init__(self):
        super().__init__(autowrap_functions=())
        self.thread = threading.get_ident()
        self.calls: dict[str, list[fx.Node]] = {}  # module name -> the node that each of its calls returned

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return _known_module(m) is not None or super().is_leaf_module(m, qualified_name)

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        out = super().call_module(m, forward, args, kwargs)
        if isinstance(out, fx.Proxy):
            self.calls.setdefault(name, []).append(out.node)
        return out

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


@dataclass
class Network:
    """A network, read up to one layer: its stages in the order they run, the input first and the layer last."""

    model: nn.Module
    stages: list[Stage]

    @property
    def layer(self) -> Stage:
        return self.stages[-1]

    def consumers(self) -> dict[Stage, list[Stage]]:
        """Who reads each stage."""
        readers: dict[Stage, list[Stage]] = {stage: [] for stage in self.stages}
        for stage in self.stages:
            for source in stage.inputs:
                readers[source].append(stage)
        return readers


# ---- Layers by name ----------------------------------------------------------------------------------------------


def resolve_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, int | None]:
    """The dotted name of a layer, and which of its calls is meant: None for the last.

    Args:
        layer: a module of the model, or its name; "name@i" means the i-th call, from 0.

    Raises:
        LayerNotFound: the model has no such module; the message lists the nearest names.
    """
    names = dict(model.named_modules(remove_duplicate=False))
    if isinstance(layer, nn.Module):
        for name, module in names.items():
            if module is layer:
                return name, None
        raise LayerNotFound(f"layer={type(layer).__name__}(...): expected a module of the model, which this is not")
    if not isinstance(layer, str):
        raise LayerNotFound(f"layer={layer!r}: expected a module's name or a module, got {type(layer).__name__}")
    name, _, call = layer.partition("@")
    if name in names and name and (not call or call.isdecimal()):
        first = next(n for n, module in names.items() if module is names[name])  # the name that fx gives it
        return first, int(call) if call else None
    known = [n for n in names if n]
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:8]
    raise LayerNotFound(f"layer={layer!r}: the model has no such module; the nearest names are {', '.join(near)}")


# ---- Operations --------------------------------------------------------------------------------------------------


class _Unknown(Exception):
    """The operation, with these arguments, is not one that the engines know."""


def _bind(names: str, defaults: dict, args: tuple, kwargs: dict) -> dict:
    bound = dict(defaults)
    order = names.split()
    if len(args) > len(order) or not set(kwargs) <= {*order, "inplace"}:
        raise _Unknown
    bound.update(zip(order, args))
    bound.update(kwargs)
    return bound


def _weight(value) -> Callable[[], Tensor]:
    """Reads a parameter when it is used, so that a change of the weights is seen."""
    return value if callable(value) and not isinstance(value, Tensor) else (lambda: value)


def _conv(stage: Stage, get_weight, get_bias, stride, padding, dilation, groups):
    stride, dilation = pair(stride), pair(dilation)
    kernel = tuple(get_weight().shape[-2:])
    if get_weight().dim() != 4:
        raise _Unknown
    if padding == "valid":
        padding = 0
    even = True
    if padding == "same":
        before = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel))
        even = all(d * (k - 1) % 2 == 0 for d, k in zip(dilation, kernel))
    else:
        before = padding = pair(padding)
    stage.kind, stage.window = "conv", Window(kernel, stride, before, dilation)
    stage.options = {"weight": get_weight, "groups": int(groups), "even_padding": even}
    stage.run = lambda x: F.conv2d(x, get_weight(), get_bias(), stride, padding, dilation, groups)


def _conv_module(stage, m, args, kwargs):
    if m.padding_mode != "zeros":
        raise _Unknown
    _conv(stage, lambda: m.weight, lambda: m.bias, m.stride, m.padding, m.dilation, m.groups)


def _conv_function(stage, args, kwargs):
    b = _bind(
        "input weight bias stride padding dilation groups",
        dict(bias=None, stride=1, padding=0, dilation=1, groups=1), args, kwargs,
    )  # fmt: skip
    weight, bias = b["weight"], b["bias"]
    if not isinstance(weight, _Constant) or not isinstance(bias, _Constant | None):
        raise _Unknown
    _conv(stage, weight, bias or (lambda: None), b["stride"], b["padding"], b["dilation"], b["groups"])


def _relu(stage, rectifier: Rectifier):
    stage.kind, stage.options, stage.run = "relu", {"rectifier": rectifier}, rectifier.forward


_RELU = Rectifier(F.relu)
_RELU6 = Rectifier(F.relu6, upper=6.0)


def _leaky(slope: float) -> Rectifier:
    if not 0 <= slope <= 1:
        raise _Unknown
    return Rectifier(lambda x: F.leaky_relu(x, slope), slope=float(slope))


def _hardtanh(low, high) -> Rectifier:
    if low != 0:
        raise _Unknown
    return Rectifier(lambda x: F.hardtanh(x, low, high), upper=float(high))


def _clamp(stage, args, kwargs):
    b = _bind("input min max", dict(min=None, max=None), args, kwargs)
    low, high = b["min"], b["max"]
    if isinstance(low, Tensor | Stage) or isinstance(high, Tensor | Stage) or low != 0:
        raise _Unknown
    _relu(stage, _RELU if high is None else _hardtanh(0, high))


def _threshold(threshold, value) -> Rectifier:
    if threshold != 0 or value != 0:
        raise _Unknown
    return _RELU


def _max_pool(stage, kernel, stride, padding, dilation, ceil_mode, return_indices=False):
    if return_indices:
        raise _Unknown
    window = Window(pair(kernel), pair(kernel if stride in (None, [], ()) else stride), pair(padding), pair(dilation))
    stage.kind, stage.window = "max_pool", window
    stage.options = {"ceil_mode": bool(ceil_mode)}
    stage.run = lambda x: switches_of(x, window, bool(ceil_mode))[0]


def _avg_pool(stage, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override):
    kernel, padding = pair(kernel), pair(padding)
    stride = kernel if stride in (None, [], ()) else pair(stride)
    run = lambda x: F.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)  # noqa: E731
    stage.run = run
    # Windows at the edge that divide by fewer pixels would need each patch to know where it lies.
    uniform = divisor_override is not None or (padding == (0, 0) or count_include_pad) and not ceil_mode
    if not uniform:
        stage.kind = "map"
        return
    stage.kind, stage.window = "avg_pool", Window(kernel, stride, padding, (1, 1))
    stage.options = {"divisor": divisor_override or kernel[0] * kernel[1]}


def _batch_norm(stage, get):
    """get(): a dict of the normalisation's tensors and eps."""
    if get()["running_mean"] is None:
        raise _Unknown
    stage.kind = "batch_norm"
    stage.options = {"scale": lambda: batch_norm_scale(get())}

    def run(x):
        g = get()
        return F.batch_norm(x, g["running_mean"], g["running_var"], g["weight"], g["bias"], False, 0.0, g["eps"])

    stage.run = run


def _batch_norm_module(stage, m, args, kwargs):
    names = ("running_mean", "running_var", "weight", "bias", "eps")
    _batch_norm(stage, lambda: {name: getattr(m, name) for name in names})


def _batch_norm_function(stage, args, kwargs):
    b = _bind(
        "input running_mean running_var weight bias training momentum eps",
        dict(weight=None, bias=None, training=False, momentum=0.1, eps=1e-5), args, kwargs,
    )  # fmt: skip
    names = ("running_mean", "running_var", "weight", "bias")
    if b["training"] is not False or any(not isinstance(b[name], _Constant | None) for name in names):
        raise _Unknown
    _batch_norm(stage, lambda: {n: b[n] and b[n]() for n in names} | {"eps": b["eps"]})


def _identity(stage):
    stage.kind, stage.run = "identity", lambda x: x


def _lrn(stage, run):
    stage.kind, stage.run = "lrn", run


def _whole_map(stage, run):
    stage.kind, stage.run = "map", run


class _Constant:
    """A tensor of the model: a parameter, a buffer or an attribute, read when it is used."""

    def __init__(self, model: nn.Module, target: str):
        self.model, self.target = model, target

    def __call__(self) -> Tensor:
        value = self.model
        for part in self.target.split("."):
            value = getattr(value, part)
        return value


def _out_of_place(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return (lambda x: module(x.clone())) if getattr(module, "inplace", False) else module


# Modules: f(stage, module, args, kwargs) fills the stage in. Their calls take one tensor.
_MODULES: dict[type, Callable] = {
    nn.Conv2d: _conv_module,
    nn.ReLU: lambda s, m, a, k: _relu(s, _RELU),
    nn.ReLU6: lambda s, m, a, k: _relu(s, _RELU6),
    nn.LeakyReLU: lambda s, m, a, k: _relu(s, _leaky(m.negative_slope)),
    nn.Hardtanh: lambda s, m, a, k: _relu(s, _hardtanh(m.min_val, m.max_val)),
    nn.Threshold: lambda s, m, a, k: _relu(s, _threshold(m.threshold, m.value)),
    nn.MaxPool2d: lambda s, m, a, k: _max_pool(
        s, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.AvgPool2d: lambda s, m, a, k: _avg_pool(
        s, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.BatchNorm2d: _batch_norm_module,
    nn.BatchNorm1d: lambda s, m, a, k: _whole_map(s, m),
    nn.LocalResponseNorm: lambda s, m, a, k: _lrn(s, m),
    nn.Dropout: lambda s, m, a, k: _identity(s),
    nn.Dropout1d: lambda s, m, a, k: _identity(s),
    nn.Dropout2d: lambda s, m, a, k: _identity(s),
    nn.AlphaDropout: lambda s, m, a, k: _identity(s),
    nn.FeatureAlphaDropout: lambda s, m, a, k: _identity(s),
    nn.Identity: lambda s, m, a, k: _identity(s),
}
for _type in (
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Linear, nn.Flatten, nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Sigmoid,
    nn.Tanh, nn.SiLU, nn.GELU, nn.ELU, nn.Softplus, nn.Hardsigmoid, nn.Hardswish,
):  # fmt: skip
    _MODULES[_type] = lambda s, m, a, k: _whole_map(s, _out_of_place(m))


def _known_module(module: nn.Module) -> Callable | None:
    """What reads a module of this class. A subclass that computes something else is not known by its parent's name."""
    for base in type(module).__mro__:
        if base in _MODULES:
            same = all(
                getattr(type(module), method, None) is getattr(base, method, None)
                for method in ("forward", "_conv_forward")
            )
            return _MODULES[base] if same else None
    return None


def _call(function, args, kwargs, arguments):
    """`function` with the stages among `args` replaced by their values."""
    values = iter(arguments)
    put = lambda a: next(values) if isinstance(a, Stage) else a() if isinstance(a, _Constant) else a  # noqa: E731
    full = [[put(b) for b in a] if isinstance(a, list | tuple) else put(a) for a in args]
    return function(*full, **{k: put(v) for k, v in kwargs.items()})


def _generic(function):
    def fill(stage, args, kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
        _whole_map(stage, lambda *values: _call(function, args, kwargs, values))

    return fill


def _arithmetic(function, kind):
    """add, sub, mul, div: of stages, or of a stage and a constant."""

    def fill(stage, args, kwargs):
        if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode") is not None or len(args) != 2:
            raise _Unknown
        left, right = args
        both = isinstance(left, Stage) and isinstance(right, Stage)
        if both and kind == "add" and left.shape == right.shape:
            stage.kind, stage.run = "add", function
            return
        number = isinstance(left, int | float) or isinstance(right, int | float)
        run = lambda *values: _call(function, args, {}, values)  # noqa: E731
        if number and kind in ("add", "sub"):
            sign = -1.0 if kind == "sub" and isinstance(left, int | float) else 1.0
            stage.kind, stage.options, stage.run = "scale", {"factor": sign}, run
        elif number and (kind == "mul" or kind == "div" and isinstance(left, Stage)):
            constant = right if isinstance(left, Stage) else left
            stage.kind, stage.run = "scale", run
            stage.options = {"factor": float(constant) if kind == "mul" else 1.0 / constant}
        else:
            _whole_map(stage, run)

    return fill


def _cat(stage, args, kwargs):
    b = _bind("tensors dim", dict(dim=0), args, kwargs)
    parts = b["tensors"]
    if not all(isinstance(p, Stage) for p in parts):
        raise _Unknown
    if b["dim"] in (1, -3) and all(len(p.shape) == 3 for p in parts):
        stage.kind, stage.run = "cat", lambda *values: torch.cat(values, 1)
    else:
        _generic(torch.cat)(stage, args, kwargs)


def _dropout(stage, args, kwargs):
    b = _bind("input p training inplace", dict(p=0.5, training=True), args, kwargs)
    if b["training"] is not False:
        raise _Unknown  # F.dropout's own default is to drop, whatever the model's mode
    _identity(stage)


def _functional(fill_from_bound, names, **defaults):
    return lambda stage, args, kwargs: fill_from_bound(stage, **_bind(names, defaults, args, kwargs))


def _without_input(fill):
    def filled(stage, input, inplace=False, **options):  # noqa: A002
        return fill(stage, **options)

    return filled


_relu_function = _functional(_without_input(lambda s: _relu(s, _RELU)), "input inplace")
_FUNCTIONS: dict[Callable, Callable] = {
    F.conv2d: _conv_function,
    torch.conv2d: _conv_function,
    F.relu: _relu_function,
    F.relu_: _relu_function,
    torch.relu: _relu_function,
    torch.relu_: _relu_function,
    F.relu6: _functional(_without_input(lambda s: _relu(s, _RELU6)), "input inplace"),
    F.leaky_relu: _functional(
        _without_input(lambda s, negative_slope: _relu(s, _leaky(negative_slope))),
        "input negative_slope inplace", negative_slope=0.01,
    ),
    F.hardtanh: _functional(
        _without_input(lambda s, min_val, max_val: _relu(s, _hardtanh(min_val, max_val))),
        "input min_val max_val inplace", min_val=-1.0, max_val=1.0,
    ),
    F.threshold: _functional(
        _without_input(lambda s, threshold, value: _relu(s, _threshold(threshold, value))),
        "input threshold value inplace",
    ),
    torch.clamp: _clamp,
    torch.clip: _clamp,
    torch.clamp_min: _functional(_without_input(lambda s, min: _clamp(s, (None, min), {})), "input min"),  # noqa: A002
    F.dropout: _dropout,
    F.dropout2d: _dropout,
    F.alpha_dropout: _dropout,
    F.batch_norm: _batch_norm_function,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.add: _arithmetic(torch.add, "add"),
    operator.add: _arithmetic(operator.add, "add"),
    operator.iadd: _arithmetic(operator.add, "add"),
    torch.sub: _arithmetic(torch.sub, "sub"),
    operator.sub: _arithmetic(operator.sub, "sub"),
    operator.isub: _arithmetic(operator.sub, "sub"),
    torch.mul: _arithmetic(torch.mul, "mul"),
    operator.mul: _arithmetic(operator.mul, "mul"),
    operator.imul: _arithmetic(operator.mul, "mul"),
    torch.div: _arithmetic(torch.div, "div"),
    operator.truediv: _arithmetic(operator.truediv, "div"),
    operator.itruediv: _arithmetic(operator.truediv, "div"),
}  # fmt: skip
for _f in (
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.linear, torch.flatten, F.softmax, torch.softmax, F.log_softmax,
    torch.log_softmax, torch.sigmoid, F.sigmoid, torch.tanh, F.tanh, F.silu, F.gelu, F.elu, F.softplus, F.hardsigmoid,
    F.hardswish, torch.mean, torch.sum, torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose,
):  # fmt: skip
    _FUNCTIONS[_f] = _generic(_f)

_FUNCTIONS[F.local_response_norm] = lambda stage, args, kwargs: _lrn(
    stage, lambda x: _call(F.local_response_norm, args, kwargs, (x,))
)
_pool_defaults = dict(stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False)
_max_pool_function = _functional(
    lambda stage, input, kernel_size, **options: _max_pool(stage, kernel_size, **options),  # noqa: A006
    "input kernel_size stride padding dilation ceil_mode return_indices", **_pool_defaults,
)  # fmt: skip
_FUNCTIONS[F.max_pool2d] = _FUNCTIONS[torch.max_pool2d] = _max_pool_function
_FUNCTIONS[ops.max_pool2d_with_switches] = _functional(
    lambda stage, x, kernel_size, **options: _max_pool(stage, kernel_size, **options),
    "x kernel_size stride padding dilation ceil_mode",
    **{name: value for name, value in _pool_defaults.items() if name != "return_indices"},
)
_avg_pool_function = _functional(
    lambda stage, input, kernel_size, **options: _avg_pool(stage, kernel_size, **options),  # noqa: A006
    "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
    stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None,
)  # fmt: skip
_FUNCTIONS[F.avg_pool2d] = _avg_pool_function

_METHODS: dict[str, Callable] = {
    name: _FUNCTIONS[function]
    for name, function in {
        "relu": torch.relu, "relu_": torch.relu, "clamp": torch.clamp, "clamp_": torch.clamp, "clip": torch.clamp,
        "clip_": torch.clamp, "clamp_min": torch.clamp_min, "clamp_min_": torch.clamp_min, "add": torch.add, "add_": torch.add,
        "sub": torch.sub, "sub_": torch.sub, "mul": torch.mul, "mul_": torch.mul, "div": torch.div, "div_": torch.div,
    }.items()
}  # fmt: skip
for _name in ("view", "reshape", "flatten", "mean", "sum", "squeeze", "unsqueeze", "permute", "transpose", "sigmoid",
              "tanh", "softmax", "log_softmax", "expand", "expand_as"):  # fmt: skip
    _METHODS[_name] = _generic(lambda x, *a, _name=_name, **k: getattr(x, _name)(*a, **k))
_METHODS["contiguous"] = lambda stage, args, kwargs: _identity(stage)

# Operations whose way down has a rule: what the dense path replaces as they happen.
_RULED = {
    F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.hardtanh, F.threshold, torch.clamp, torch.clip,
    torch.clamp_min, F.local_response_norm, F.max_pool2d, torch.max_pool2d,
}  # fmt: skip
_RULED_METHODS = {
    getattr(Tensor, name): name
    for name in ("relu", "relu_", "clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_")
}


def rule_of_function(function: Callable, args: tuple, kwargs: dict) -> tuple[Stage | None, bool]:
    """The stage that a call of a torch function would be, if its way down has a rule, and whether it works in place."""
    name = _RULED_METHODS.get(function)
    if name is None and function not in _RULED:
        return None, False
    stage = Stage(0, "map", "", [])
    plain = {k: v for k, v in kwargs.items() if k != "inplace"}
    try:
        (_METHODS[name.removesuffix("_")] if name else _FUNCTIONS[function])(stage, args, plain)
    except _Unknown:  # a clamp that is no ReLU, a pool that returns indices: autograd's own gradient is right
        return None, False
    place = _INPLACE_ARGUMENT.get(function)
    in_place = (
        (name or getattr(function, "__name__", "")).endswith("_")
        or bool(kwargs.get("inplace"))
        or (place is not None and len(args) > place and bool(args[place]))
    )
    return stage, in_place


_INPLACE_ARGUMENT = {F.relu: 1, F.relu6: 1, F.leaky_relu: 2, F.hardtanh: 3, F.threshold: 3}  # its place among the args

# Plain Python on sizes: evaluated for the batch at hand, never a stage.
_SIZE_FUNCTIONS = {
    operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv, builtins.int, builtins.getattr,
    math.prod, operator.truediv, builtins.len,
}  # fmt: skip
_SIZE_METHODS = {"size", "dim", "numel"}
_IN_PLACE_FUNCTIONS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, F.relu_, torch.relu_,
}  # fmt: skip
_VIEWS = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "expand", "expand_as"}


# ---- Reading -----------------------------------------------------------------------------------------------------


class _BatchSize(int):
    """A number that follows from the batch's size: of use to a reshape only, since a stage serves any batch."""


def _described(node: fx.Node, model: nn.Module) -> str:
    """How an error names an operation: 'features.3' (Foo), or 'foo_1' (torch.foo)."""
    if node.op == "call_module":
        return f"'{node.target}' ({type(model.get_submodule(node.target)).__name__})"
    if node.op == "call_method":
        return f"'{node.name}' (Tensor.{node.target})"
    target = node.target
    if callable(target):
        target = f"{getattr(target, '__module__', '') or ''}.{getattr(target, '__name__', target)}".lstrip(".")
    inside = list(node.meta.get("nn_module_stack") or {})
    return f"'{node.name}' ({target})" + (f" in '{inside[-1]}'" if inside and inside[-1] else "")


def trace(model: nn.Module) -> tuple[fx.Graph, dict[str, list[fx.Node]]]:
    """The model's fx graph, and the nodes that each of its modules' calls returned.

    Raises UnsupportedOperation with fx's own reason when the model's control flow depends on its input.
    """
    with _tracing:
        tracer = _Tracer()
        try:
            graph = tracer.trace(model)
        except Exception as error:  # tracing runs the user's code on proxies, which may fail in any way
            where = f"'{type(model).__name__}'"
            raise UnsupportedOperation(f"{where} cannot be traced: {type(error).__name__}: {error}") from error
    tracer.calls.setdefault("", []).append(next(n for n in graph.nodes if n.op == "output").args[0])
    return graph, tracer.calls


def read_network(
    model: nn.Module, image_shape: tuple[int, int, int], layer: str | nn.Module | None = None
) -> Network:
    """Read a model, in eval mode, up to `layer` (default: its output) for images of `image_shape`.

    Args:
        model: takes one image batch [N, C, H, W].
        image_shape: (C, H, W) of the images, in pixels.
        layer: a module or its dotted name; of a module called several times the last call, "name@i" for another.

    Raises:
        LayerNotFound: there is no such layer, or it is never called.
        UnsupportedOperation: an operation on the way to the layer, named in the message, is not one the engines read.
    """
    name, call = resolve_layer(model, layer) if layer is not None else ("", None)
    graph, calls = trace(model)
    return Network(model, _Reader(model, graph, calls).read(image_shape, _node_of(calls, name, call)))


def _node_of(calls: dict[str, list[fx.Node]], name: str, call: int | None) -> fx.Node:
    nodes = calls.get(name, [])
    if not nodes:
        raise LayerNotFound(f"layer={name!r}: expected a layer that the model calls and that returns a tensor")
    if call is not None and call >= len(nodes):
        raise LayerNotFound(f"layer='{name}@{call}': the model calls {name!r} {len(nodes)} times, from @0")
    node = nodes[-1 if call is None else call]
    if not isinstance(node, fx.Node):
        raise UnsupportedOperation(f"{name!r} returns {type(node).__name__}, expected a tensor")
    return node


class _WithSwitches:
    """What max_pool2d_with_switches returns: the pooled map, and switches."""

    def __init__(self, stage: Stage):
        self.stage = stage


class _Reader:
    def __init__(self, model: nn.Module, graph: fx.Graph, calls: dict[str, list[fx.Node]]):
        self.model = model
        self.graph = graph
        self.names: dict[fx.Node, str] = {}  # the innermost module whose call returned the node
        for name, nodes in calls.items():
            for i, node in enumerate(nodes):
                if isinstance(node, fx.Node) and name:
                    self.names.setdefault(node, name if len(nodes) == 1 else f"{name}@{i}")
        self.values: dict[fx.Node, object] = {}  # Stage, _Constant or a plain Python value
        self.fakes: dict[Stage, Tensor] = {}
        self.now: dict[fx.Node, fx.Node] = {}  # a node whose value an in-place operation replaced -> that operation
        self.lost: dict[fx.Node, fx.Node] = {}  # a view of such a value -> the in-place operation
        self.stages: list[Stage] = []

    def read(self, image_shape, target: fx.Node) -> list[Stage]:
        needed = self.ancestors(target)
        parameter = next(self.model.parameters(), torch.empty(0))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad():
            fake = torch.empty((2, *image_shape), dtype=parameter.dtype, device=parameter.device)
            inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
            for extra in inputs[1:]:
                if extra in needed and not extra.args:
                    raise UnsupportedOperation(f"'{extra.name}' is a second input, expected one image batch")
            for node in self.graph.nodes:
                if node in needed:
                    self.values[node] = self.value_of(node, fake)
                if node is target:
                    break
        layer = self.values[self.current(target)]
        if not isinstance(layer, Stage):
            raise UnsupportedOperation(f"{_described(target, self.model)} is not a tensor of the image")
        return self.reachable(layer)

    def ancestors(self, target: fx.Node) -> set[fx.Node]:
        """What the target is computed from. An in-place operation changes what it is given, so those before the
        target count too wherever they touch one of these."""
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        needed: set[fx.Node] = set()
        queue = [target]
        while queue:
            node = queue.pop()
            if node in needed:
                continue
            needed.add(node)
            queue += node.all_input_nodes
            queue += [u for u in node.users if order[u] < order[target] and self.in_place(u) and u.args[0] is node]
        return needed

    def reachable(self, layer: Stage) -> list[Stage]:
        keep, queue = set(), [layer]
        while queue:
            stage = queue.pop()
            if stage not in keep:
                keep.add(stage)
                queue += stage.inputs
        stages = [stage for stage in self.stages if stage in keep]
        for i, stage in enumerate(stages):
            stage.index = i
        return stages

    def in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.model.get_submodule(node.target), "inplace", False))
        if node.op == "call_method":
            return node.target.endswith("_") and not node.target.endswith("__")
        return node.op == "call_function" and (
            node.target in _IN_PLACE_FUNCTIONS or node.kwargs.get("inplace") is True or self.positional_in_place(node)
        )

    @staticmethod
    def positional_in_place(node: fx.Node) -> bool:
        place = _INPLACE_ARGUMENT.get(node.target)
        return place is not None and len(node.args) > place and node.args[place] is True

    def current(self, node: fx.Node) -> fx.Node:
        """The node that holds this value now, after the in-place operations so far."""
        while node in self.now:
            node = self.now[node]
        return node

    def argument(self, node: fx.Node):
        if node in self.lost:
            raise UnsupportedOperation(
                f"{_described(self.lost[node], self.model)} works in place on a view of '{node.name}'"
            )
        return self.values[self.current(node)]

    def value_of(self, node: fx.Node, fake: Tensor):
        if node.op == "placeholder":
            if any(stage.kind == "input" for stage in self.stages):
                return node.args[0]
            return self.add(Stage(0, "input", node.name, []), fake)
        if node.op == "get_attr":
            constant = _Constant(self.model, node.target)
            return constant if isinstance(constant(), Tensor) else constant()
        args = fx.node.map_arg(node.args, self.argument)
        kwargs = dict(fx.node.map_arg(node.kwargs, self.argument))
        if isinstance(args[0] if args else None, _WithSwitches):
            if node.target is operator.getitem and args[1] == 0:
                return args[0].stage
            raise UnsupportedOperation(f"{_described(node, self.model)} uses switches, which only a pool's way down does")
        stages = [s for a in (*args, *kwargs.values()) for s in (a if isinstance(a, list | tuple) else [a])]
        stages = [s for s in stages if isinstance(s, Stage)]
        plain = self.plain_value(node, args, kwargs, stages)
        if plain is not _Unknown:
            return plain
        stage = Stage(0, "map", self.names.get(node, node.name), list(stages))
        try:
            self.fill(stage, node, args, kwargs)
            result = stage.run(*[self.fakes[s] for s in stages])
        except (_Unknown, TypeError) as error:
            why = f": {error}" if str(error) else ""
            raise UnsupportedOperation(
                f"{_described(node, self.model)} is not an operation that the engines read{why}"
            ) from error
        if not isinstance(result, Tensor) or result.dim() < 2 or len(result) != 2:
            raise UnsupportedOperation(f"{_described(node, self.model)} does not keep the batch axis")
        self.note_aliases(node, stage)
        self.add(stage, result)
        if node.target is ops.max_pool2d_with_switches:
            for user in node.users:  # named after the module, whose output is the pooled map alone
                stage.name = self.names.get(user, stage.name)
            return _WithSwitches(stage)
        return stage

    def plain_value(self, node, args, kwargs, stages):
        """Sizes and arithmetic on them, evaluated now; _Unknown where the node is an operation on tensors."""
        if node.op == "call_method" and node.target in _SIZE_METHODS and isinstance(args[0], Stage):
            return self.size_of(args[0], *args[1:]) if node.target == "size" else len(args[0].shape) + 1
        if node.op == "call_function":
            if node.target is builtins.getattr and isinstance(args[0], Stage):
                if args[1] == "shape":
                    return self.size_of(args[0])
                raise UnsupportedOperation(f"{_described(node, self.model)}: Tensor.{args[1]} is not read")
            if not stages and node.target in _SIZE_FUNCTIONS and not any(isinstance(a, _Constant) for a in args):
                value = node.target(*args, **kwargs)
                tainted = node.target is not operator.getitem and any(isinstance(a, _BatchSize) for a in args)
                return _BatchSize(value) if tainted else value
        return _Unknown

    @staticmethod
    def size_of(stage: Stage, axis: int | None = None):
        sizes = (_BatchSize(2), *stage.shape)
        return sizes if axis is None else sizes[axis]

    def fill(self, stage: Stage, node: fx.Node, args, kwargs) -> None:
        if node.op == "call_module":
            module = self.model.get_submodule(node.target)
            known = _known_module(module)
            if known is None or len(args) != 1 or kwargs or not isinstance(args[0], Stage):
                raise _Unknown
            if module._forward_hooks or module._forward_pre_hooks:  # they may change what the module computes
                raise _Unknown("it has forward hooks")
            known(stage, module, args, kwargs)
            return
        table = _METHODS if node.op == "call_method" else _FUNCTIONS
        known = table.get(node.target)
        if known is None or not stage.inputs:
            raise _Unknown
        flat = [b for a in (*args, *kwargs.values()) for b in (a if isinstance(a, list | tuple) else [a])]
        if any(isinstance(a, _BatchSize) for a in flat):
            if node.op != "call_method" and node.target is not torch.reshape or node.target not in (
                "view", "reshape", torch.reshape,
            ):  # fmt: skip
                raise _Unknown
            known(stage, args, kwargs)
            tail = stage.run(self.fakes[stage.inputs[0]]).shape[1:]
            stage.run = lambda x: x.reshape(len(x), *tail)
            return
        if len(stage.inputs) == 1 and len(args) and isinstance(args[0], Stage) and self.in_place(node):
            kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
        known(stage, args, kwargs)

    def note_aliases(self, node: fx.Node, stage: Stage) -> None:
        """Keeps track of what shares memory, so that an in-place operation changes all who look at it later."""
        if not self.in_place(node):
            return
        source = node.args[0]
        while True:
            source = self.current(source)
            self.now[source] = node
            if source.op in ("placeholder", "get_attr") or not isinstance(self.values.get(source), Stage):
                break
            before = self.values[source]
            for other in self.graph.nodes:  # views of another shape cannot be replaced by the new value
                if other in self.values and other is not node and other.op == "call_method" and other.target in _VIEWS:
                    if other.args[0] is source:
                        self.lost[other] = node
            shares = before.kind == "identity" or (
                source.op == "call_method" and source.target in _VIEWS or source.target is torch.flatten
            ) or source.op == "call_module" and isinstance(self.model.get_submodule(source.target), nn.Flatten)
            if not shares:
                break
            if before.kind != "identity":
                self.lost[source.args[0]] = node
                break
            source = source.args[0]

    def add(self, stage: Stage, fake: Tensor) -> Stage:
        stage.shape = tuple(fake.shape[1:])
        stage.field = self.field_of(stage)
        self.fakes[stage] = fake
        self.stages.append(stage)
        return stage

    @staticmethod
    def field_of(stage: Stage) -> Field | None:
        """What a position of the stage's output sees of the picture."""
        if stage.kind == "input":
            return Field()
        fields = [source.field for source in stage.inputs]
        if stage.kind == "map" or any(f is None for f in fields) or len(stage.shape) != 3:
            return None
        if stage.window is not None:
            # The window's own field, carried through what lies below it.
            w, below = stage.window, fields[0]
            size, jump, offset = [], [], []
            for a in (0, 1):
                reach = w.dilation[a] * (w.kernel[a] - 1)
                size.append(below.size[a] + reach * below.jump[a])
                jump.append(below.jump[a] * w.stride[a])
                offset.append(below.offset[a] - w.padding[a] * below.jump[a])
            return Field(tuple(size), tuple(jump), tuple(offset))
        merged = fields[0]
        for other in fields[1:]:
            merged = merged and merged.union(other)
        return merged
