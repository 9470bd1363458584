"""Derivatives forward, the transforms of torch.func, and batches over an axis of their own: by each op, in all its ways.

The max-pool is compared with torch's own; the others, which torch does not have, with the derivative backward, which
test_gradients.py compares with finite differences.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import zfcore.ops as ops

WINDOW = ([3, 3], [2, 2], [1, 1], [1, 1])


def pool(x):
    return ops.max_pool2d_with_switches(x, 3, 2, 1)[0]


def registered_pool(x):
    return torch.ops.zfcore.max_pool2d_with_switches(x, *WINDOW, False)[0]


def by_torch(x):
    return F.max_pool2d(x, 3, 2, 1)


def maps(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def squares(op):
    return lambda x: (op(x) ** 2).sum()


def dual(op, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(op(forward_ad.make_dual(x, tangent))).tangent


def reverse_over_forward(op, x, tangent):
    x = x.clone().requires_grad_()
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(op(forward_ad.make_dual(x, tangent)) ** 2).tangent
        return torch.autograd.grad(found.sum(), x)[0]


TRANSFORMS = {
    "grad": lambda op, x, v: grad(squares(op))(x),
    "jvp": lambda op, x, v: jvp(op, (x,), (v,))[1],
    "jacrev": lambda op, x, v: jacrev(op)(x),
    "jacfwd": lambda op, x, v: jacfwd(op)(x),
    "hessian": lambda op, x, v: hessian(squares(op))(x[:1, :1, :4, :4]),
    "linearize": lambda op, x, v: linearize(op, x)[1](v),
    "vmap": lambda op, x, v: vmap(op)(torch.stack([x, v])),
    "vmap of another axis": lambda op, x, v: vmap(op, 2, 3)(torch.stack([x, v], 2)),
    "grad of each": lambda op, x, v: vmap(grad(squares(op)))(torch.stack([x, v])),
    "grad through vmap": lambda op, x, v: grad(lambda z: (vmap(op)(z) ** 2).sum())(torch.stack([x, v])),
    "functionalize": lambda op, x, v: functionalize(op)(x),
    "grad through functionalize": lambda op, x, v: grad(lambda z: functionalize(op)(z).sum())(x),
    "make_fx": lambda op, x, v: make_fx(grad(squares(op)))(x)(x),
    "dual": dual,
    "reverse over forward": reverse_over_forward,
    "jvp of a map [C, H, W]": lambda op, x, v: jvp(lambda z: op(z[None]), (x[0],), (v[0],))[1],
    "autograd.functional.jvp": lambda op, x, v: torch.autograd.functional.jvp(op, x, v)[1],
    "autograd.functional.jacobian": lambda op, x, v: torch.autograd.functional.jacobian(op, x, vectorize=True),
}


@pytest.mark.parametrize("op", [pool, registered_pool])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_max_pooling_is_transformed_as_torchs_is(op, transform):
    x, v = maps(2, 3, 7, 7), maps(2, 3, 7, 7)
    found, wanted = transform(op, x, v), transform(by_torch, x, v)
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def cases():
    torch.manual_seed(0)
    x = maps(2, 4, 8, 8)
    y, switches = ops.max_pool2d_with_switches(x, 3, 2, 1)
    for overlap in ("sum", "last"):
        shared = dict(output_size=(8, 8), overlap=overlap)
        yield f"unpool2d {overlap}", lambda y, s=switches, k=shared: ops.unpool2d(y, s, 3, 2, 1, **k), (y,)
        yield f"unpool_relu2d {overlap}", lambda y, s=switches, k=shared: ops.unpool_relu2d(y, s, 3, 2, 1, **k), (y,)
        gather = lambda x, s=switches, k=overlap: ops.pool_gather2d(x, s, 3, 2, 1, overlap=k)  # noqa: E731
        yield f"pool_gather2d {overlap}", gather, (x,)
        step = dict(pool=(3, 2, 1), conv=(2, 1, 1, 2), output_size=(16, 16), overlap=overlap)
        fused = lambda y, w, s=switches, k=step: ops.unpool_relu_conv_transpose2d(y, s, w, **k)  # noqa: E731
        yield f"unpool_relu_conv_transpose2d {overlap}", fused, (y, maps(4, 2, 3, 3))


CASES = {name: (op, inputs) for name, op, inputs in cases()}


@pytest.mark.parametrize("name", CASES)
def test_derivatives_forward_agree_with_finite_differences_and_with_those_backward(name):
    op, inputs = CASES[name]
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    assert gradcheck(op, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, fast_mode=True)
    assert gradgradcheck(op, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_each_argument_may_have_an_axis_more(name):
    op, inputs = CASES[name]
    for which in range(len(inputs)):
        many = [torch.stack([x, 2 * x, -x]) if i == which else x for i, x in enumerate(inputs)]
        axes = tuple(0 if i == which else None for i in range(len(inputs)))
        wanted = torch.stack([op(*(x[k] if i == which else x for i, x in enumerate(many))) for k in range(3)])
        torch.testing.assert_close(vmap(op, axes)(*many), wanted, rtol=1e-12, atol=1e-12)
        slopes = vmap(grad(lambda *a: (op(*a) ** 2).sum(), which), axes)(*many)
        torch.testing.assert_close(
            slopes[1], grad(lambda *a: (op(*a) ** 2).sum(), which)(*(x[1] if i == which else x for i, x in enumerate(many)))
        )


def test_switches_and_maps_may_be_batched_apart():
    x = maps(3, 2, 4, 8, 8)
    y, switches = vmap(lambda each: ops.max_pool2d_with_switches(each, 2))(x)
    assert switches.dtype == torch.uint8
    back = vmap(lambda y, s: ops.unpool2d(y, s, 2))(y, switches)
    assert torch.equal(back, torch.stack([ops.unpool2d(y[i], switches[i], 2) for i in range(3)]))
    shared = vmap(lambda s: ops.unpool2d(y[0], s, 2))(switches)
    assert torch.equal(shared, torch.stack([ops.unpool2d(y[0], switches[i], 2) for i in range(3)]))


def test_half_types_and_switches_carry_no_tangent_that_is_not_theirs():
    x, v = maps(1, 2, 4, 4).bfloat16(), maps(1, 2, 4, 4).bfloat16()
    (y, switches), (tangent, none) = jvp(lambda z: ops.max_pool2d_with_switches(z, 2), (x,), (v,))
    wanted = jvp(lambda z: F.max_pool2d(z, 2), (x,), (v,))[1]
    assert torch.equal(tangent, wanted) and y.dtype == tangent.dtype == torch.bfloat16
    assert switches.dtype == torch.uint8 and not none.any()
