"""Every op at ZFNet's shapes, batch 32 (256 on a GPU), both layouts, beside the PyTorch path that a user would write.

Rows of a group: `pytorch`; `zfcore`, which gives the same answer as that path; `zfcore-sum` where
overlapping windows can name one place twice: PyTorch's unpooling keeps one of the values (`overlap="last"`),
zfcore's default adds them; `reference`, zfcore's own definition in plain PyTorch, at the smallest shape; on a GPU
`zfcore-triton`, pooling's twin of the kernel in CUDA C++.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import stages
import torch
import torch.nn.functional as F
from device import on_gpu
from stages import Stage, Tensors
from twins import TWIN, on_triton

from zfcore import ops, use_backend

# Of a fused step, relative to the largest magnitude of the result; on a GPU the other side transforms its inputs.
MAX_ERROR = 1e-4 if on_gpu() else 1e-5


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def close(ours, theirs):
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= MAX_ERROR, f"relative error {error:.1e}"


class Op(NamedTuple):
    """rows: each a call without arguments; check(outputs by row, stage, tensors) before they are timed."""

    rows: Callable[[Stage, Tensors], dict[str, Callable[[], object]]]
    check: Callable[[dict[str, object], Stage, Tensors], None]
    work: Callable[[Stage, Tensors], stages.Work]


def summed(stage: Stage, t: Tensors) -> torch.Tensor:
    """Unpooling that adds, as torch's gradient of max-pooling does it."""
    window = ((size, size) for size in stage.pool)
    return torch.ops.aten.max_pool2d_with_indices_backward(t.y, t.x, *window, (1, 1), False, t.indices)


def unpooled_and_rectified(stage: Stage, t: Tensors) -> torch.Tensor:
    return F.max_unpool2d(t.y, t.indices, *stage.pool, output_size=(stage.size,) * 2).relu_()


def filtered(stage: Stage, t: Tensors, u: torch.Tensor) -> torch.Tensor:
    return F.conv_transpose2d(
        u, t.weight, None, stage.conv_stride, stage.conv_padding, output_padding=stage.output_padding
    )


def pool_rows(stage, t):
    own = functools.partial(ops.max_pool2d_with_switches, t.x, *stage.pool)
    rows = {"pytorch": lambda: F.max_pool2d(t.x, *stage.pool, return_indices=True), "zfcore": own}
    return {**rows, TWIN: on_triton(own)} if on_gpu() else rows


def check_pool(outputs, stage, t):
    expected, indices = outputs["pytorch"]
    for row in outputs.keys() - {"pytorch"}:
        y, switches = outputs[row]
        same(y, expected)
        same(stages.switch_indices(stage, switches), indices)


def unpool_relu_rows(stage, t):
    unpool = functools.partial(
        ops.unpool_relu2d, t.y, t.switches, *stage.pool, output_size=(stage.size, stage.size)
    )
    return {
        "pytorch": lambda: unpooled_and_rectified(stage, t),
        "zfcore": lambda: unpool(overlap="last"),
        "zfcore-sum": unpool,
    }


def check_unpool_relu(outputs, stage, t):
    same(outputs["zfcore"], outputs["pytorch"])
    close(outputs["zfcore-sum"], summed(stage, t).relu_())


def unpool_rows(stage, t):
    size = (stage.size, stage.size)
    return {
        "pytorch": lambda: summed(stage, t),
        "zfcore": lambda: ops.unpool2d(t.y, t.switches, *stage.pool, output_size=size),
    }


def check_unpool(outputs, stage, t):
    close(outputs["zfcore"], outputs["pytorch"])


def gather_rows(stage, t):
    indices = t.indices.flatten(2)
    return {
        "pytorch": lambda: t.x.flatten(2).gather(2, indices).unflatten(2, t.y.shape[2:]),
        "zfcore": lambda: ops.pool_gather2d(t.x, t.switches, *stage.pool),
    }


def check_gather(outputs, stage, t):
    same(outputs["zfcore"], outputs["pytorch"])


def fused_rows(stage, t):
    step = functools.partial(
        ops.unpool_relu_conv_transpose2d,
        t.y,
        t.switches,
        t.weight,
        pool=stage.pool,
        conv=(stage.conv_stride, stage.conv_padding),
        output_size=(stage.below_size,) * 2,
    )
    return {
        "pytorch": lambda: filtered(stage, t, unpooled_and_rectified(stage, t)),
        "zfcore": lambda: step(overlap="last"),
        "zfcore-sum": step,
    }


def check_fused(outputs, stage, t):
    close(outputs["zfcore"], outputs["pytorch"])
    close(outputs["zfcore-sum"], filtered(stage, t, summed(stage, t).relu_()))


OPS = {
    "max_pool2d_with_switches": Op(pool_rows, check_pool, stages.pool_work),
    "unpool_relu2d": Op(unpool_relu_rows, check_unpool_relu, stages.unpool_work),
    "unpool2d": Op(unpool_rows, check_unpool, stages.unpool_work),
    "pool_gather2d": Op(gather_rows, check_gather, stages.gather_work),
    "unpool_relu_conv_transpose2d": Op(fused_rows, check_fused, stages.fused_work),
}
REFERENCE_STAGE = stages.STAGES[-1]


class Case(NamedTuple):
    op: str
    stage: Stage
    layout: str
    dtype: torch.dtype = torch.float32

    @property
    def group(self) -> str:
        suffix = "" if self.dtype is torch.float32 else "-bf16"
        return f"{self.op} {self.stage.name}{suffix} {self.layout}"


# A stage's tensors serve all its ops in turn.
CASES = [Case(op, stage, layout) for stage in stages.STAGES for layout in stages.LAYOUTS for op in OPS]
CASES += [
    Case("max_pool2d_with_switches", stages.STAGES[0], layout, torch.bfloat16) for layout in stages.LAYOUTS
]
GROUPS = [case.group for case in CASES]


def row_names(case: Case) -> list[str]:
    names = ["pytorch", "zfcore"]
    if case.op in ("unpool_relu2d", "unpool_relu_conv_transpose2d"):
        names.append("zfcore-sum")
    if case.op == "max_pool2d_with_switches" and on_gpu():
        names.append(TWIN)
    if case.stage is REFERENCE_STAGE:
        names.append("reference")
    return names


tensors = functools.lru_cache(maxsize=1)(stages.make_tensors)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(
    ("case", "row"),
    [
        pytest.param(case, row, id=f"{case.group} {row}".replace(" ", "-"))
        for case in CASES
        for row in row_names(case)
    ],
)
def test_op(case, row, groups, benchmark):
    t = tensors(case.stage, case.layout, case.dtype)
    op = OPS[case.op]

    rows = op.rows(case.stage, t)
    if row == "reference":
        with use_backend("reference"):
            groups.alone(benchmark, case.group, row, rows["zfcore"])
    else:
        groups.row(
            benchmark,
            case.group,
            row,
            rows,
            check=lambda outputs: op.check(outputs, case.stage, t),
            work=lambda: op.work(case.stage, t),
        )
