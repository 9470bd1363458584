"""The rules of the way down, put on autograd's graph of a forward that has run.

They act on the graph's nodes, which are ATen operations, so it does not matter by which of torch's names, or from which
language, an operation was called.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zfcore import forks
from zfcore.engine.job import times
from zfcore.errors import ArgumentError, UnsupportedOperation
from zfcore.network import Rectifier
from zfcore.ops import max_pool2d_with_switches, unpool2d

MAX_TAPS = 255  # of a pooling window: a switch is one byte


# ---- Nodes of the graph ------------------------------------------------------------------------------------


def put_rules(output: Tensor, leaf: Tensor, rule: str, overlap: str, plain: list) -> bool:
    """Hooks on the nodes from an output down, and whether they reach the leaf.

    plain: nodes that look like rectifiers and are none.
    """
    reached = output is leaf
    nodes = [output.grad_fn]
    seen = set(nodes)
    for node in nodes:
        if node is None:
            continue
        reached |= getattr(node, "variable", None) is leaf
        for below, _ in node.next_functions:
            if below not in seen:
                seen.add(below)
                nodes.append(below)
        name = node.name()
        if "DifferentiableGraph" in name:
            raise Hidden("TorchScript hides operations; expected a model of Python functions and modules")
        if "NotImplemented" in name:  # torch warns, and goes down no further
            raise UnsupportedOperation("an operation of the model has no gradient; expected one whose operations have")
        if "CompiledFunction" in name:
            raise UnsupportedOperation("a compiled part of the model hides its operations; expected one that is not")
        rectifier = None if node in plain else _rectifier(name, node)
        if rectifier is not None:
            node.register_hook(_rectified(node, rectifier, rule))
        elif overlap == "last" and (kind := _POOLS.get(name.rstrip("0123456789"))):
            node.register_hook(kind(node))
    return reached


class Hidden(Exception):
    """TorchScript has made one node of several operations."""


def _is_zero(value: object) -> bool:
    return isinstance(value, int | float) and value == 0


def _rectifier(name: str, node: torch.autograd.graph.Node) -> Rectifier | None:
    """What a node rectifies as, if it does."""
    kind = name.rstrip("0123456789").removesuffix("Backward")
    if kind == "Relu":
        below = node.next_functions[0][0]
        within = below is not None and below.name().startswith("AbsBackward")  # `lp_pool2d`'s, which rectifies nothing
        return None if within else Rectifier(F.relu)
    if kind == "Hardtanh":  # ReLU6 too
        low, high = node._saved_min_val, node._saved_max_val
    elif kind == "Clamp":
        low, high = node._saved_min, node._saved_max
    elif kind == "ClampMin":
        low, high = node._saved_min, None
    elif kind == "Threshold":
        low, high = node._saved_threshold, None
    elif kind == "LeakyRelu":
        slope = node._saved_negative_slope
        return Rectifier(F.leaky_relu, slope=float(slope)) if 0 <= slope <= 1 else None
    else:
        return None
    if not _is_zero(low) or isinstance(high, Tensor) or (high is not None and high <= 0):
        return None
    return Rectifier(F.relu, upper=math.inf if high is None else float(high))


def _rectified(node: torch.autograd.graph.Node, rectifier: Rectifier, rule: str) -> Callable:
    """A hook that replaces what a rectifier's node gives down."""
    # The result of a ReLU, and of a leaky one, has the sign of what it read.
    passes = None
    if rule != "deconvnet":
        z = node._saved_self if hasattr(node, "_saved_self") else node._saved_result
        passes = rectifier.derivative(z.detach())

    def hook(below: tuple, above: tuple) -> tuple | None:
        g = above[0]
        if g is None or below[0] is None:
            return None
        if rule != "gradient":
            g = rectifier.rectify(g)
        if passes is not None:
            g = times(g, passes)
        return g, *below[1:]

    return hook


def _unpooled(switches: Tensor, window: tuple, size: tuple) -> Callable:
    def hook(below: tuple, above: tuple) -> tuple | None:
        g = above[0]
        if g is None or below[0] is None:
            return None
        return unpool2d(g, switches, *window, size, "last"), *below[1:]

    return hook


def _torchs_pool(node: torch.autograd.graph.Node) -> Callable:
    kernel = node._saved_kernel_size
    if math.prod(kernel) > MAX_TAPS:
        raise ArgumentError(
            f"overlap: 'last' with windows {tuple(kernel)}; expected windows of at most {MAX_TAPS} taps, or 'sum'"
        )
    window = kernel, node._saved_stride or kernel, node._saved_padding, node._saved_dilation
    x = node._saved_self.detach()
    _, switches = max_pool2d_with_switches(x, *window, node._saved_ceil_mode)
    return _unpooled(switches, window, x.shape[-2:])


def _own_pool(node: torch.autograd.graph.Node) -> Callable:
    (switches,) = node.saved_tensors
    return _unpooled(switches, node.window, node.size)


_POOLS = {
    "MaxPool2DWithIndicesBackward": _torchs_pool,
    "zfcore_max_pool2d_with_switchesBackward": _own_pool,
}


# ---- The forward -------------------------------------------------------------------------------------------


def flush_torchscript(model: nn.Module) -> None:
    """Has TorchScript's functions, and a model's TorchScript modules, forget that they run operations as one node."""
    compiled = list(torch.jit._state._python_cu.get_functions())
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            compiled += [module._c._get_method(name) for name in module._c._method_names()]
    for each in compiled:
        each._debug_flush_compilation_cache()


class _PassOver(torch.autograd.Function):
    """Contrast normalisation on the way up, nothing on the way down."""

    @staticmethod
    def forward(ctx, x, run):
        return run(x)

    @staticmethod
    def backward(ctx, g):
        return g, None


_RECTIFIERS = frozenset(
    f"{name}{in_place}"
    for name in ("relu", "relu6", "hardtanh", "threshold", "leaky_relu", "clamp", "clip", "clamp_min")
    for in_place in ("", "_")
) | {"_threshold"}  # which is what F.threshold is called
_SPLITS = frozenset(("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit"))


class _AsNodes(TorchFunctionMode):
    """Runs the few operations otherwise that would not be nodes of the graph that a rule can be put on.

    Contrast normalisation is many operations. A rectifier that works in place on a view of a map is inside the node
    that writes the view back. This thread alone is affected.
    """

    def __init__(self, apart: bool, plain: list):
        super().__init__()
        self.apart, self.plain = apart, plain

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        name = getattr(function, "__name__", "").partition(".")[0]
        if not isinstance(x, Tensor):
            return function(*args, **kwargs)
        if name in _RECTIFIERS:
            return self.rectify(function, name, x, args, kwargs)
        if function is F.local_response_norm:
            rest = {key: value for key, value in kwargs.items() if key != "input"}
            return _PassOver.apply(x, lambda x: function(x, *args[1:], **rest))
        if self.apart and name in _SPLITS:
            return self.views(x, function(*args, **kwargs))
        return function(*args, **kwargs)

    def rectify(self, function, name, x, args, kwargs):
        """On a copy, where x is a view, which is written back if the function works in place."""
        view = x._is_view()
        worked = x.clone() if view else x
        result = function(worked, *args[1:], **kwargs) if args else function(**{**kwargs, "input": worked})
        if "threshold" in name and _put_below(*args, **kwargs) != 0:
            self.plain.append(result.grad_fn)  # its node does not say what it puts below the threshold
        return x.copy_(result) if view and result is worked else result

    @staticmethod
    def views(x: Tensor, parts: tuple[Tensor, ...]) -> list[Tensor]:
        """The same views, each on its own: autograd lets none of several be written to."""
        return type(parts)(x.as_strided(part.shape, part.stride(), part.storage_offset()) for part in parts)


def _put_below(input=None, threshold=0, value=0, *_, **__) -> float:
    """The value that a call of F.threshold puts where its input is not above the threshold."""
    return value


class _Checkpoints:
    """Checkpoints that rerun a function inside the backward, unseen, run it once, in threads that say so."""

    def __init__(self) -> None:
        self.users: set[object] = set()
        self.threads = threading.local()
        self.renew()
        forks.renewed(self.renew)

    def renew(self) -> None:
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        before = getattr(self.threads, "seen", False)
        leave = functools.partial(self.turn_for, user := object(), False)
        try:
            forks.entered(leave)
            self.turn_for(user, True)
            self.threads.seen = True
            yield
        finally:
            self.threads.seen = before
            forks.left(leave)

    def turn_for(self, user: object, wants: bool) -> None:
        replaced = torch.utils.checkpoint.CheckpointFunction
        with self.lock:
            (self.users.add if wants else self.users.discard)(user)
            if self.users and "apply" not in replaced.__dict__:
                original = replaced.apply

                def apply(function, preserve, *args):
                    if getattr(self.threads, "seen", False):
                        return function(*args)
                    return original(function, preserve, *args)

                replaced.apply = apply
            elif not self.users and "apply" in replaced.__dict__:
                del replaced.apply  # the class's own; its parent's is what it was


_checkpoints = _Checkpoints()


@contextlib.contextmanager
def as_nodes(apart: bool, plain: list) -> Iterator[None]:
    """Runs a forward, and the reruns of its checkpoints, so that `put_rules` finds a node for each operation.

    apart: views that one operation makes several of are made one by one. plain: filled for `put_rules`.
    """
    with _checkpoints.seen(), torch.jit.optimized_execution(False), _AsNodes(apart, plain):
        yield
