"""Bad arguments give a typed error that quotes them, on every backend and in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import zfcore.ops as ops
from zfcore.errors import ArgumentError, DeviceError, DtypeError, ShapeError, SwitchError, ZfcoreError

HUGE = 10**5000


@dataclass(frozen=True)
class Bad:
    """A call that must raise ``error`` with a message that ``words`` matches."""

    name: str
    call: Callable[[], object]
    error: type
    words: str


def tensors():
    """A good map, and good switches of 2x2 windows."""
    return torch.arange(32.0).view(1, 2, 4, 4), torch.zeros(1, 2, 2, 2, dtype=torch.uint8)


WINDOW = [
    ("kernel zero", dict(kernel_size=0), ArgumentError, "kernel_size=0: expected at least 1"),
    ("kernel negative", dict(kernel_size=-3), ArgumentError, "kernel_size=-3: expected at least 1"),
    (
        "kernel pair with zero",
        dict(kernel_size=(2, 0)),
        ArgumentError,
        r"kernel_size=\(2, 0\): expected at least 1",
    ),
    (
        "kernel of 256 taps",
        dict(kernel_size=(16, 16)),
        ArgumentError,
        r"kernel_size=\(16, 16\): expected at most 255",
    ),
    ("kernel past int64", dict(kernel_size=2**63), ArgumentError, f"kernel_size={2**63}: expected at most"),
    (
        "kernel under int64",
        dict(kernel_size=-(2**63) - 1),
        ArgumentError,
        f"kernel_size={-(2**63) - 1}: expected",
    ),
    ("kernel too long to print", dict(kernel_size=HUGE), ArgumentError, "kernel_size=<an int of 16610 bits>"),
    ("kernel whose product overflows", dict(kernel_size=2**62), ArgumentError, "expected at most 255 taps"),
    ("kernel text", dict(kernel_size="3"), DtypeError, "kernel_size='3': expected an int or a pair"),
    ("kernel float", dict(kernel_size=2.0), DtypeError, "kernel_size=2.0: expected an int or a pair"),
    ("kernel None", dict(kernel_size=None), DtypeError, "kernel_size=None: expected an int or a pair"),
    ("kernel bool", dict(kernel_size=True), DtypeError, "kernel_size=True: expected an int or a pair"),
    (
        "kernel of three",
        dict(kernel_size=(2, 2, 2)),
        ArgumentError,
        r"kernel_size=\(2, 2, 2\): .*\(rows, columns\)",
    ),
    ("kernel of none", dict(kernel_size=()), ArgumentError, r"kernel_size=\(\): expected an int or a pair"),
    ("kernel with text", dict(kernel_size=(2, "2")), DtypeError, r"kernel_size=\(2, '2'\): expected an int"),
    ("kernel with float", dict(kernel_size=[2, 2.5]), DtypeError, r"kernel_size=\[2, 2.5\]: expected an int"),
    ("kernel nan", dict(kernel_size=float("nan")), DtypeError, "kernel_size=nan: expected an int"),
    (
        "kernel float tensor",
        dict(kernel_size=torch.tensor(2.0)),
        DtypeError,
        "kernel_size=<a tensor of shape",
    ),
    ("kernel dict", dict(kernel_size={2: 2}), DtypeError, r"kernel_size=\{2: 2\}: expected an int"),
    ("stride zero", dict(stride=0), ArgumentError, "stride=0: expected at least 1"),
    ("stride negative", dict(stride=(1, -1)), ArgumentError, r"stride=\(1, -1\): expected at least 1"),
    ("stride past int64", dict(stride=2**64), ArgumentError, f"stride={2**64}: expected at most"),
    (
        "stride too long to print",
        dict(stride=(1, -HUGE)),
        ArgumentError,
        r"stride=\(1, <an int of 16610 bits>\)",
    ),
    (
        "stride of three",
        dict(stride=[1, 1, 1]),
        ArgumentError,
        r"stride=\[1, 1, 1\]: expected an int or a pair",
    ),
    ("stride float", dict(stride=1.5), DtypeError, "stride=1.5: expected an int or a pair"),
    ("stride text", dict(stride="2"), DtypeError, "stride='2': expected an int or a pair"),
    ("padding negative", dict(padding=-1), ArgumentError, "padding=-1: expected at least 0"),
    (
        "padding past half",
        dict(padding=2),
        ArgumentError,
        "padding=2: expected at most half of kernel_size=2",
    ),
    (
        "padding past half in columns",
        dict(kernel_size=(3, 1), padding=1),
        ArgumentError,
        "padding=1: expected at most half",
    ),
    ("padding past int64", dict(padding=2**70), ArgumentError, f"padding={2**70}: expected at most"),
    ("padding same", dict(padding="same"), DtypeError, "padding='same': expected an int"),
    ("dilation zero", dict(dilation=0), ArgumentError, "dilation=0: expected at least 1"),
    (
        "dilation negative",
        dict(dilation=-(2**62)),
        ArgumentError,
        f"dilation={-(2**62)}: expected at least 1",
    ),
    (
        "dilation past int64",
        dict(dilation=(1, 2**63)),
        ArgumentError,
        f"dilation=\\(1, {2**63}\\): expected at most",
    ),
    ("dilation None", dict(dilation=None), DtypeError, "dilation=None: expected an int"),
]


def bad_windows(call, **good):
    for name, wrong, error, words in WINDOW:
        yield Bad(name, lambda wrong=wrong: call(**{"kernel_size": 2, **good, **wrong}), error, words)


def bad_maps(name, call):
    """``call(x)`` with an x that is not a map."""
    x, _ = tensors()
    dense = r"expected \[N, C, H, W\] or \[C, H, W\]"
    floats = "expected float32, float64, bfloat16 or float16"
    yield Bad("not a tensor", lambda: call([[1.0]]), DtypeError, f"{name} is a list: expected a torch.Tensor")
    yield Bad(
        "an array", lambda: call(x.numpy()), DtypeError, f"{name} is a ndarray: expected a torch.Tensor"
    )
    yield Bad("None", lambda: call(None), DtypeError, f"{name} is a NoneType: expected a torch.Tensor")
    yield Bad("no axes", lambda: call(torch.tensor(1.0)), ShapeError, dense)
    yield Bad("two axes", lambda: call(x[0, 0]), ShapeError, rf"{name} has shape \(4, 4\): {dense}")
    yield Bad("five axes", lambda: call(x[None]), ShapeError, rf"{name} has shape \(1, 1, 2, 4, 4\): {dense}")
    yield Bad("no channels", lambda: call(x[:, :0]), ShapeError, "expected at least one channel")
    yield Bad("int32", lambda: call(x.int()), DtypeError, f"{name} has dtype torch.int32: {floats}")
    yield Bad("uint8", lambda: call(x.byte()), DtypeError, f"{name} has dtype torch.uint8: {floats}")
    yield Bad("bool", lambda: call(x.bool()), DtypeError, f"{name} has dtype torch.bool: {floats}")
    yield Bad("complex", lambda: call(x.cfloat()), DtypeError, f"{name} has dtype torch.complex64: {floats}")
    yield Bad("float8", lambda: call(x.to(torch.float8_e5m2)), DtypeError, f"torch.float8_e5m2: {floats}")
    yield Bad(
        "sparse", lambda: call(x.to_sparse()), DtypeError, "has layout torch.sparse_coo: expected a dense"
    )


def bad_switches(call):
    """``call(switches)`` with switches that do not fit the pooled map."""
    _, s = tensors()
    yield Bad(
        "switches are a list", lambda: call([0]), DtypeError, "switches is a list: expected a torch.Tensor"
    )
    yield Bad(
        "switches int64",
        lambda: call(s.long()),
        DtypeError,
        "switches has dtype torch.int64: expected torch.uint8",
    )
    yield Bad("switches int8", lambda: call(s.to(torch.int8)), DtypeError, "torch.int8: expected torch.uint8")
    yield Bad("switches float", lambda: call(s.float()), DtypeError, "torch.float32: expected torch.uint8")
    yield Bad(
        "switches of fewer channels", lambda: call(s[:, :1]), ShapeError, r"switches has shape \(1, 1, 2, 2\)"
    )
    yield Bad(
        "switches of more images", lambda: call(s.expand(3, 2, 2, 2)), ShapeError, r"\(3, 2, 2, 2\): expected"
    )
    yield Bad(
        "switches without a batch axis", lambda: call(s[0]), ShapeError, r"switches has shape \(2, 2, 2\)"
    )
    yield Bad(
        "switches elsewhere", lambda: call(s.to("meta")), DeviceError, "switches is on meta: expected cpu"
    )
    for byte in (4, 255):
        yield Bad(
            f"switch {byte}",
            lambda byte=byte: call(torch.full_like(s, byte)),
            SwitchError,
            rf"switches\[0, 0, 0, 0\] = {byte}: expected a tap of the 2x2 window, 0 to 3",
        )


def bad_overlaps(call):
    yield Bad(
        "overlap unknown",
        lambda: call(overlap="max"),
        ArgumentError,
        "overlap='max': expected 'sum' or 'last'",
    )
    yield Bad(
        "overlap None", lambda: call(overlap=None), DtypeError, "overlap=None: expected 'sum' or 'last'"
    )
    yield Bad("overlap list", lambda: call(overlap=["sum"]), DtypeError, r"overlap=\['sum'\]: expected")


def bad_sizes(call):
    """``call(output_size=)`` of 2x2 windows on a pooled 2x2 map."""
    for size, error, words in (
        ((6, 6), ShapeError, r"output_size=\(6, 6\): expected a size that pools to y's \(2, 2\)"),
        ((4, 9), ShapeError, r"output_size=\(4, 9\): expected a size that pools"),
        ((1, 4), ShapeError, r"output_size=\(1, 4\): expected a size that pools"),
        ((2**40, 2**40), ShapeError, f"output_size=\\({2**40}, {2**40}\\): expected a size that pools"),
        ((2**63 - 1, 4), ShapeError, f"output_size=\\({2**63 - 1}, 4\\): expected a size that pools"),
        ((0, 4), ArgumentError, r"output_size=\(0, 4\): expected at least 1"),
        ((4, -4), ArgumentError, r"output_size=\(4, -4\): expected at least 1"),
        ((2**63, 4), ArgumentError, f"output_size=\\({2**63}, 4\\): expected at most"),
        ((4, 4, 4), ArgumentError, r"output_size=\(4, 4, 4\): expected two sizes"),
        ((1, 2, 4, 4), ArgumentError, r"output_size=\(1, 2, 4, 4\): expected two sizes"),
        ((), ArgumentError, r"output_size=\(\): expected two sizes"),
        (4, DtypeError, r"output_size=4: expected a pair of ints \(H, W\)"),
        ("44", DtypeError, "output_size='44': expected a pair of ints"),
        ((4.0, 4), DtypeError, r"output_size=\(4.0, 4\): expected an int"),
        ((True, 4), DtypeError, r"output_size=\(True, 4\): expected an int"),
    ):
        yield Bad(f"size {str(size)[:30]}", lambda size=size: call(output_size=size), error, words)


def pool_table():
    x, _ = tensors()
    op = ops.max_pool2d_with_switches
    yield from bad_windows(lambda **kw: op(x, **kw))
    yield from bad_maps("x", lambda x: op(x, 2))
    yield Bad(
        "ceil_mode number", lambda: op(x, 2, ceil_mode=1), DtypeError, "ceil_mode=1: expected True or False"
    )
    yield Bad("ceil_mode text", lambda: op(x, 2, ceil_mode="no"), DtypeError, "ceil_mode='no': expected True")
    yield Bad("no rows", lambda: op(x[:, :, :0], 2), ShapeError, "x has 0 rows: expected at least 1")
    yield Bad("no columns", lambda: op(x[..., :0], 1), ShapeError, "x has 0 columns: expected at least 1")
    yield Bad(
        "kernel larger than the map", lambda: op(x, 5), ShapeError, r"kernel_size=\(5, 5\).*map of \(4, 4\)"
    )
    yield Bad(
        "dilated past the map",
        lambda: op(x, 2, dilation=2**62),
        ShapeError,
        f"dilation=\\({2**62}, {2**62}\\)",
    )
    yield Bad(
        "no tap in the map", lambda: op(x, 2, 1, 1, 5), ShapeError, "expected a window with a tap inside it"
    )


def unpool_table(op):
    x, s = tensors()
    y = x[:, :, :2, :2]
    yield from bad_windows(lambda **kw: op(y, s, **kw))
    yield from bad_maps("y", lambda y: op(y, s, 2))
    yield from bad_switches(lambda s: op(y, s, 2))
    yield from bad_overlaps(lambda **kw: op(y, s, 2, **kw))
    yield from bad_sizes(lambda **kw: op(y, s, 2, **kw))
    yield Bad("no rows", lambda: op(y[:, :, :0], s[:, :, :0], 2), ShapeError, "expected at least 1")
    yield Bad("a result past int64", lambda: op(y, s, 2, 2**62), ShapeError, "the result would have shape")
    yield Bad(
        "a result past memory", lambda: op(y[..., :1], s[..., :1], 2, 2**45), ShapeError, "this machine has"
    )
    yield Bad(
        "a switch outside the map",
        lambda: op(y, torch.full_like(s, 3), 2, output_size=(3, 4)),
        SwitchError,
        r"switches\[0, 0, 1, 0\] = 3 names row 3, column 1: expected a place in the 3x4 map",
    )


def gather_table():
    x, s = tensors()
    op = ops.pool_gather2d
    yield from bad_windows(lambda **kw: op(x, s, **kw))
    yield from bad_maps("x", lambda x: op(x, s, 2))
    yield from bad_switches(lambda s: op(x, s, 2))
    yield from bad_overlaps(lambda **kw: op(x, s, 2, **kw))
    yield Bad(
        "another map", lambda: op(x[..., :2], s, 2), ShapeError, r"\(4, 2\): expected a size that pools"
    )


def step_table():
    x, s = tensors()
    y, w = x[:, :, :2, :2], torch.ones(2, 3, 3, 3)
    op = ops.unpool_relu_conv_transpose2d
    yield from bad_windows(lambda **kw: op(y, s, w, pool=kw))
    yield from bad_maps("y", lambda y: op(y, s, w, pool=2))
    yield from bad_switches(lambda s: op(y, s, w, pool=2))
    yield from bad_overlaps(lambda **kw: op(y, s, w, pool=2, **kw))

    def pool(pool):
        return lambda: op(y, s, w, pool=pool)

    yield Bad("pool None", pool(None), DtypeError, "pool=None: expected a PoolParams, dict, tuple, int")
    yield Bad("pool float", pool(2.0), DtypeError, "pool=2.0: expected a PoolParams")
    yield Bad("pool bool", pool(True), DtypeError, "pool=True: expected a PoolParams")
    yield Bad("pool text", pool("2"), DtypeError, "pool='2': expected a PoolParams")
    yield Bad("pool average", pool(nn.AvgPool2d(2)), DtypeError, "expected a PoolParams, dict, tuple")
    yield Bad("pool empty tuple", pool(()), ArgumentError, r"pool=\(\): expected the fields of PoolParams")
    yield Bad(
        "pool long tuple", pool((2, 2, 0, 1, False, 0)), ArgumentError, "expected the fields of PoolParams"
    )
    yield Bad("pool without a kernel", pool({"stride": 2}), ArgumentError, "expected a kernel_size in it")
    yield Bad(
        "pool with a typo", pool({"kernel_size": 2, "strid": 2}), ArgumentError, r"pool has \['strid'\]"
    )

    def conv(conv, **kw):
        return lambda: op(y, s, w, pool=2, conv=conv, **kw)

    top = 2**31 - 1
    yield Bad(
        "conv number", conv(1), DtypeError, "conv=1: expected a ConvParams, dict, tuple, nn.Conv2d or None"
    )
    yield Bad("conv one axis", conv(nn.Conv1d(1, 1, 1)), DtypeError, "expected a ConvParams, dict")
    yield Bad("conv long tuple", conv((1, 0, 1, 1, 0, 0)), ArgumentError, "expected the fields of ConvParams")
    yield Bad(
        "conv with a typo", conv({"pad": 1}), ArgumentError, r"conv has \['pad'\]: expected only the fields"
    )
    reflect, uneven = (
        nn.Conv2d(1, 1, k, padding_mode=m, padding=p) for k, m, p in ((3, "reflect", 1), (2, "zeros", "same"))
    )
    yield Bad("conv reflects", conv(reflect), ArgumentError, "padding_mode='reflect': expected 'zeros'")
    yield Bad(
        "conv pads unevenly", conv(uneven), ArgumentError, "padding='same'.*expected a symmetric padding"
    )
    yield Bad("conv stride zero", conv({"stride": 0}), ArgumentError, "stride=0: expected at least 1")
    yield Bad(
        "conv stride 2**31", conv({"stride": 2**31}), ArgumentError, f"stride={2**31}: expected at most {top}"
    )
    yield Bad(
        "conv padding negative", conv({"padding": -1}), ArgumentError, "padding=-1: expected at least 0"
    )
    yield Bad("conv padding huge", conv({"padding": HUGE}), ArgumentError, "padding=<an int of")
    yield Bad(
        "conv dilation zero",
        conv({"dilation": (1, 0)}),
        ArgumentError,
        r"dilation=\(1, 0\): expected at least 1",
    )
    yield Bad(
        "conv dilation 2**62", conv({"dilation": 2**62}), ArgumentError, f"dilation={2**62}: expected at most"
    )
    yield Bad("conv groups zero", conv({"groups": 0}), ArgumentError, "groups=0: expected at least 1")
    yield Bad("conv groups pair", conv({"groups": (1, 1)}), DtypeError, r"groups=\(1, 1\): expected an int")
    yield Bad(
        "conv groups 3", conv({"groups": 3}), ArgumentError, "groups=3: expected a divisor of y's 2 channels"
    )
    yield Bad(
        "output_padding 1", conv({"output_padding": 1}), ArgumentError, "output_padding=1: expected less than"
    )
    yield Bad("output_padding negative", conv({"output_padding": -1}), ArgumentError, "output_padding=-1")
    yield Bad(
        "result without pixels", conv({"padding": 3}), ShapeError, r"output_size=\(0, 0\).*at least one pixel"
    )
    yield Bad("result past int64", conv({"stride": top}), ShapeError, "the result would have shape")
    far = {"padding": top, "dilation": top}
    yield Bad("result below zero", conv({"padding": top}), ShapeError, "expected at least one pixel")
    yield Bad("size of another map", conv(far, output_size=(9, 9)), ShapeError, r"\(9, 9\)")
    yield Bad(
        "size too small",
        conv(None, output_size=(2, 6)),
        ShapeError,
        r"output_size=\(2, 6\)|at least one pixel",
    )
    yield Bad(
        "size too large", conv(None, output_size=(9, 6)), ShapeError, "expected a size that pools to y's"
    )
    yield Bad(
        "size and output_padding",
        conv({"stride": 2, "output_padding": 1}, output_size=(9, 9)),
        ShapeError,
        "with this output_padding",
    )
    yield Bad(
        "size three", conv(None, output_size=(1, 6, 6)), ArgumentError, r"\(1, 6, 6\): expected two sizes"
    )
    yield Bad(
        "size huge", conv(None, output_size=(2**62, 6)), ShapeError, "expected a size that pools to y's"
    )

    def weight(w, **conv):
        return lambda: op(y, s, w, pool=2, conv=conv)

    yield Bad("weight is a list", weight([1.0]), DtypeError, "weight is a list: expected a torch.Tensor")
    yield Bad(
        "weight three axes", weight(w[0]), ShapeError, r"weight has shape \(3, 3, 3\): expected \[K, C/groups"
    )
    yield Bad("weight five axes", weight(w[None]), ShapeError, r"\(1, 2, 3, 3, 3\): expected \[K, C/groups")
    yield Bad(
        "weight of other channels",
        weight(torch.ones(3, 2, 3, 3)),
        ShapeError,
        r"3 output channels \(axis 0\): .* 2",
    )
    yield Bad("weight without filters", weight(w[:0]), ShapeError, r"\(0, 3, 3, 3\): expected no empty axis")
    yield Bad(
        "weight without channels", weight(w[:, :0]), ShapeError, r"\(2, 0, 3, 3\): expected no empty axis"
    )
    yield Bad(
        "weight without taps", weight(w[..., :0]), ShapeError, r"\(2, 3, 3, 0\): expected no empty axis"
    )
    yield Bad(
        "weight of another dtype",
        weight(w.double()),
        DtypeError,
        "torch.float64: expected y's, torch.float32",
    )
    yield Bad("weight elsewhere", weight(w.to("meta")), DeviceError, "weight is on meta: expected cpu")
    yield Bad(
        "strict_nan number",
        lambda: op(y, s, w, pool=2, strict_nan=1),
        DtypeError,
        "strict_nan=1: expected True",
    )
    yield Bad(
        "strict and a bad size",
        lambda: op(y, s, w, pool=2, output_size=(9, 6), strict_nan=True),
        ShapeError,
        "pools to y's",
    )


TABLES = {
    "max_pool2d_with_switches": pool_table,
    "unpool2d": lambda: unpool_table(ops.unpool2d),
    "unpool_relu2d": lambda: unpool_table(ops.unpool_relu2d),
    "pool_gather2d": gather_table,
    "unpool_relu_conv_transpose2d": step_table,
}


@pytest.mark.parametrize("op", TABLES)
def test_bad_arguments_give_an_error_that_names_them(backend, op):
    if backend.device != "cpu":
        pytest.skip("the arguments are checked before any kernel, as the CPU backends show")
    table = list(TABLES[op]())
    assert len(table) >= 40
    assert len({bad.name for bad in table}) == len(table)
    wrong = []
    for bad in table:
        try:
            bad.call()
        except bad.error as error:
            if not re.search(bad.words, str(error)):
                wrong.append(f"{bad.name}: {error}")
        except Exception as error:
            wrong.append(f"{bad.name}: {type(error).__name__}: {error}")
        else:
            wrong.append(f"{bad.name}: no error")
    assert not wrong, "\n".join(wrong)


def test_errors_are_those_that_a_user_would_catch():
    x, s = tensors()
    for call, kind in (
        (lambda: ops.max_pool2d_with_switches(x, 0), ValueError),
        (lambda: ops.max_pool2d_with_switches(x, 9), ValueError),
        (lambda: ops.max_pool2d_with_switches(x, 1.0), TypeError),
        (lambda: ops.unpool2d(x[:, :, :2, :2], s + 9, 2), ValueError),
    ):
        with pytest.raises(kind) as error:
            call()
        assert isinstance(error.value, ZfcoreError)


def test_the_registered_ops_check_their_arguments_too():
    """torch.ops.zfcore can be called past the public functions."""
    x, s = tensors()
    y, w, one, no = x[:, :, :2, :2], torch.ones(2, 3, 3, 3), [1, 1], [0, 0]
    registered = torch.ops.zfcore
    for call in (
        lambda: registered.max_pool2d_with_switches(x, [9, 9], one, no, one, False),
        lambda: registered.unpool2d(y, s, [2, 2], [2, 2], no, one, [9, 9], "sum"),
        lambda: registered.unpool_relu2d(y, s.long(), [2, 2], [2, 2], no, one, [4, 4], "sum"),
        lambda: registered.pool_gather2d(x, s + 9, [2, 2], [2, 2], no, one, "sum"),
        lambda: registered.unpool_relu_conv_transpose2d(
            y, s, w[:1], [2, 2], [2, 2], no, one, one, no, one, 1, [4, 4], [6, 6], "sum"
        ),
    ):
        with pytest.raises(ZfcoreError):
            call()


def main():
    """Make every bad call of every table, saying which one is next in case it ends the process."""
    for op, table in TABLES.items():
        for bad in table():
            print(f"{op}: {bad.name}", flush=True)
            try:
                bad.call()
            except bad.error:
                continue
            raise SystemExit(f"{op}: {bad.name}: no error")


def test_no_bad_argument_ends_the_process():
    done = subprocess.run(
        [sys.executable, "-c", "import test_errors; test_errors.main()"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stdout.strip().rpartition("\n")[2]
    assert done.returncode == 0, f"{done.returncode} at {last}\n{done.stderr[-2000:]}"
    assert done.stdout.count("\n") == sum(len(list(table())) for table in TABLES.values())
