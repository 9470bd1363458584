"""The registered overloads, which exported programs call, check every number: the same ones that the functions refuse.

The ops of the engines and the binding meet more of them in tests/attack.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import zfcore.ops as ops
from zfcore.errors import ArgumentError, DtypeError, ShapeError, ZfcoreError

X = torch.randn(2, 4, 8, 8)
Y, SWITCHES = ops.max_pool2d_with_switches(X, 2)
WEIGHT = torch.randn(4, 3, 3, 3)
WINDOW = dict(kernel_size=[2, 2], stride=[2, 2], padding=[0, 0], dilation=[1, 1])
STEP = dict(
    kernel_size=[2, 2], pool_stride=[2, 2], pool_padding=[0, 0], pool_dilation=[1, 1], stride=[1, 1], padding=[0, 0],
    dilation=[1, 1], groups=1, unpooled_size=[8, 8], output_size=[10, 10], overlap="sum",
)  # fmt: skip


def pool(x=X, **window):
    return torch.ops.zfcore.max_pool2d_with_switches(x, **{**WINDOW, **window}, ceil_mode=False)


def unpool(name):
    def call(y=Y, switches=SWITCHES, output_size=(8, 8), overlap="sum", **window):
        op = getattr(torch.ops.zfcore, name)
        return op(y, switches, **{**WINDOW, **window}, output_size=output_size, overlap=overlap)

    return call


def gather(x=X, switches=SWITCHES, overlap="sum", **window):
    return torch.ops.zfcore.pool_gather2d(x, switches, **{**WINDOW, **window}, overlap=overlap)


def fused(y=Y, switches=SWITCHES, weight=WEIGHT, **arguments):
    # The window's names, as the other ops have them, are the pool's here.
    arguments = {f"pool_{name}" if name in ("stride", "padding", "dilation") else name: v for name, v in arguments.items()}
    arguments = {name.removeprefix("conv_"): value for name, value in arguments.items()}
    return torch.ops.zfcore.unpool_relu_conv_transpose2d(y, switches, weight, **{**STEP, **arguments})


OPS = {
    "max_pool2d_with_switches": pool,
    "unpool2d": unpool("unpool2d"),
    "unpool_relu2d": unpool("unpool_relu2d"),
    "pool_gather2d": gather,
    "unpool_relu_conv_transpose2d": fused,
}
BAD = [
    (dict(kernel_size=[0, 2]), ArgumentError, r"kernel_size=\(0, 2\): expected at least 1"),
    (dict(kernel_size=[-2, -2]), ArgumentError, "expected at least 1"),
    (dict(kernel_size=[32, 32]), ArgumentError, "expected at most 255 taps"),
    (dict(kernel_size=[2, 2, 2]), ArgumentError, "expected an int or a pair"),
    (dict(stride=[0, 1]), ArgumentError, "stride=.*expected at least 1"),
    (dict(stride=[-(2**63), 1]), ArgumentError, "stride=.*expected at least 1"),
    (dict(dilation=[0, 0]), ArgumentError, "dilation=.*expected at least 1"),
    (dict(dilation=[2**62, 2**62]), (ArgumentError, ShapeError), "dilation"),
    (dict(padding=[-1, 0]), ArgumentError, "padding=.*expected at least 0"),
    (dict(padding=[2**62, 0], dilation=[2, 2]), ArgumentError, "expected at most half"),
    (dict(padding=[2, 2]), ArgumentError, "expected at most half"),
    (dict(stride=[2**62, 2**62], padding=[1, 1], kernel_size=[3, 3]), (ArgumentError, ShapeError), "stride|size"),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_the_numbers_of_a_window_are_checked(op, change, error, words):
    OPS[op]()
    if op == "max_pool2d_with_switches" and change.get("stride") == [2**62, 2**62]:
        y, _ = pool(**change)  # a single window, which never steps
        assert torch.equal(y[:, :, 0, 0], X[:, :, :2, :2].amax((2, 3)))
        return
    with pytest.raises(error, match=words):
        OPS[op](**change)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(conv_stride=[0, 0]), ArgumentError, "stride=.*expected at least 1"),
        (dict(conv_dilation=[0, 1]), ArgumentError, "dilation=.*expected at least 1"),
        (dict(conv_padding=[-1, 0]), ArgumentError, "padding=.*expected at least 0"),
        (dict(conv_stride=[2**31, 1]), ArgumentError, "expected at most 2147483647"),
        (dict(groups=0), ArgumentError, "groups=0: expected at least 1"),
        (dict(groups=-4), ArgumentError, "groups=-4: expected at least 1"),
        (dict(groups=3), ArgumentError, "expected a divisor of y's 4 channels"),
        (dict(unpooled_size=[8]), ArgumentError, "unpooled_size=.*expected two sizes"),
        (dict(output_size=[10, 10, 10]), ArgumentError, "output_size=.*expected two sizes"),
        (dict(output_size=[-10, 10]), ShapeError, "output_size"),
        (dict(output_size=[2**62, 2**62]), ShapeError, "output_size"),
        (dict(overlap="first"), ArgumentError, "expected 'sum' or 'last'"),
    ],
)
def test_the_numbers_of_the_fused_step_are_checked(change, error, words):
    with pytest.raises(error, match=words):
        fused(**change)


@pytest.mark.parametrize("op", OPS)
def test_tensors_without_memory_and_nothing_at_all_are_refused(op):
    name = "y" if op.startswith("unpool") else "x"
    freed = torch.randn(2, 4, 8, 8) if name == "x" else torch.randn(2, 4, 4, 4)
    freed.untyped_storage().resize_(0)
    part = torch.randn(3, *freed.shape[1:])[1:]
    part.untyped_storage().resize_(0)
    for without in (freed, part):  # a part of freed memory has an address, and nothing there
        with pytest.raises(DtypeError, match="has no memory of its own"):
            OPS[op](**{name: without})
    with pytest.raises(DtypeError, match="NoneType|without a shape"):
        OPS[op](**{name: None})


def test_what_a_number_could_end_ends_no_process():
    """All of them once more in a process of their own, the worst of what was found first."""
    code = (
        "import torch, sys; sys.path.insert(0, sys.argv[1]); import test_registered_numbers as t\n"
        "for call in t.OPS.values():\n"
        "    for change, *_ in t.BAD:\n"
        "        try: call(**change)\n"
        "        except t.ZfcoreError: pass\n"
        "one = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)\n"
        "try: torch.ops.zfcore.unpool2d(one.float(), one, [32, 32], [1, 1], [0, 0], [1, 1], [32, 32], 'sum')\n"
        "except t.ZfcoreError: print('refused')\n"
    )
    here = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code, here], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "refused\n", done.stderr[-2000:]


def test_an_exported_program_runs_and_refuses_as_the_functions_do(tmp_path):
    class Net(torch.nn.Module):
        def forward(self, x):
            return ops.max_pool2d_with_switches(x, 2)[0]

    torch.export.save(torch.export.export(Net(), (X,)), tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.equal(loaded(X), Y)
    freed = X.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ZfcoreError):
        loaded(freed)
