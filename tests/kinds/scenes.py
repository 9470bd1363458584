"""What surrounds a call, and models, that no single tensor of a kind makes. Each says what is wrong, "" for nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from kinds_of_tensors import KINDS, Halves, Wrapper, mesh
from torch import nn

import zfcore
from zfcore.errors import ZfcoreError

BOX = {"box": 4, "stride": 4}


def refused(call: Callable[[], object], kind: str, *words: str) -> str:
    try:
        made = call()
    except ZfcoreError as error:
        found, said = type(error).__name__, str(error)
        missing = [word for word in words if word not in said]
        return "" if found == kind and not missing else f"{found}: {said}"
    except Exception as error:
        return f"a bare {type(error).__name__}: {error}"
    return f"no error: {made!r}"


def both(model: nn.Module, images: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    return lambda: zfcore.deconv_project(model, images, ""), lambda: zfcore.occlusion_map(model, images, **BOX)


def both_refused(model: nn.Module, images: torch.Tensor, kind: str, *words: str) -> str:
    return "; ".join(filter(None, (refused(call, kind, *words) for call in both(model, images))))


def forwards(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logit of class 1 with a box of zeros at each place, [N, Gy, Gx], by the model alone."""
    places = range(0, images.shape[-1] - 3, 4)
    scores = []
    for y in places:
        for x in places:
            covered = images.clone()
            covered[..., y : y + 4, x : x + 4] = 0
            scores.append(model(covered)[:, 1])
    return torch.stack(scores, 1).unflatten(1, (len(places), len(places)))


# ---- Surroundings ------------------------------------------------------------------------------------------


def transforms(model, images):
    said = []
    for around in (torch.vmap, torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), torch.func.jacfwd):
        for call in (zfcore.deconv_project, lambda *a, **k: zfcore.occlusion_map(*a[:2], **BOX)):
            whole = around is not torch.vmap
            given = images if whole else images[None]
            said.append(refused(lambda: around(lambda x: call(model, x, ""))(given), "UnsupportedOperation", "torch.func"))
            # The images may be plain there; what a transform follows is dropped all the same.
            said.append(
                refused(lambda: around(lambda x: call(model, images, ""))(given), "UnsupportedOperation", "torch.func")
            )
    return "; ".join(filter(None, said))


def parameters_of_a_transform(model, images):
    def project(weight):
        wrapped = torch.func.functional_call(Calls(model), {"model.0.weight": weight}, (images,))
        return wrapped.pixels.sum()

    return refused(lambda: torch.func.grad(project)(model[0].weight.detach().clone()), "UnsupportedOperation", "torch.func")


class Calls(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return zfcore.deconv_project(self.model, images, "0")


def tangents(model, images):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(images, torch.ones_like(images))
        said = [both_refused(model, dual, "UnsupportedOperation", "images carries a tangent")]
        # A level that nothing here has a tangent of changes nothing.
        zfcore.deconv_project(model, images, "")
        weight = model[0].weight.detach()
        del model[0].weight
        model[0].weight = forward_ad.make_dual(weight, torch.ones_like(weight))
        zfcore.deconv_project(model, images, "")  # an attribute, which nothing says is a parameter
        model[0]._parameters["weight"] = model[0].__dict__.pop("weight")
        said.append(both_refused(model, images, "UnsupportedOperation", "'0.weight' carries a tangent"))
    return "; ".join(filter(None, said))


def fake_mode(model, images):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        return both_refused(model, images, "UnsupportedOperation", "FakeTensor")


def traced(model, images):
    """A trace would hold the result as a constant."""

    def trace(call):
        return lambda: torch.jit.trace(lambda x: call(x), (images,), check_trace=False)

    calls = lambda x: zfcore.deconv_project(model, x, "").pixels, lambda x: zfcore.occlusion_map(model, x, **BOX).scores
    return "; ".join(filter(None, (refused(trace(call), "UnsupportedOperation", "torch.jit.trace") for call in calls)))


# ---- Models ------------------------------------------------------------------------------------------------


def dynamic_int8(model, images):
    """The engine below, plain forwards of all, and no gradient to project by."""
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    first = zfcore.deconv_project(model, images, "5")
    assert first.path == "engine"
    o = zfcore.occlusion_map(model, images, targets=1, score="logit", batch_size=1, **BOX)
    assert o.path == "forwards" and "quantized" in o.reason, o.reason
    one = torch.cat([forwards(model, image) for image in images[:, None]])
    torch.testing.assert_close(o.scores, one, rtol=1e-5, atol=1e-5)
    return refused(lambda: zfcore.deconv_project(model, images, ""), "UnsupportedOperation", "has no gradient")


def sharded_by_torch(model, images):
    from torch.distributed.fsdp import fully_shard

    whole = copy.deepcopy(model)
    for part in (model[0], model[7], model):
        fully_shard(part, mesh=mesh())
    said = both_refused(model, images, "UnsupportedOperation", "FSDP", "whole parameters")
    torch.testing.assert_close(model(images), whole(images))
    return said


def distributed_by_torch(model, images):
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    def inputs(_, given, mesh):
        return tuple(distribute_tensor(each, mesh, [Replicate()]) for each in given)

    whole = copy.deepcopy(model)
    model = distribute_module(model, mesh(), input_fn=inputs)
    said = [refused(lambda: zfcore.deconv_project(model, images, ""), "DtypeError", "'0.weight' is a DTensor")]
    o = zfcore.occlusion_map(model, images, score=lambda out: out.full_tensor()[:, 1], **BOX)
    torch.testing.assert_close(o.scores, forwards(whole, images), rtol=1e-5, atol=1e-5)
    said.append(refused(lambda: zfcore.occlusion_map(model, images, **BOX), "ArgumentError", "returned a DTensor"))
    return "; ".join(filter(None, said))


def distributed_inside(model, images):
    """DTensors that nobody sees from outside are analysed."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    class Linear(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh(), [Replicate()]))
            self.bias = linear.bias

        def forward(self, x):
            return nn.functional.linear(x, self.weight.full_tensor(), self.bias)

    whole = copy.deepcopy(model)
    model[7] = Linear(model[7])
    p, q = (zfcore.deconv_project(m, images, "", [1]) for m in (model.eval(), whole))
    torch.testing.assert_close(p.pixels, q.pixels, rtol=1e-5, atol=1e-5)
    o = zfcore.occlusion_map(model, images, targets=1, score="logit", **BOX)
    torch.testing.assert_close(o.scores, forwards(whole, images), rtol=1e-5, atol=1e-5)
    return ""


class Counts(nn.Module):
    """Writes to a buffer in each forward."""

    def __init__(self, make):
        super().__init__()
        self.register_buffer("seen", make(torch.zeros(3)))

    def forward(self, x):
        self.seen.add_(1.0)
        return x


def written_buffers(model, images):
    for make in (Wrapper, KINDS["two"], KINDS["negative"], lambda t: t):
        own = nn.Sequential(Counts(make), *model).eval()
        buffer = own[0].seen
        for call in both(own, images):
            try:
                call()
            except ZfcoreError:
                pass
            inside = getattr(buffer, "inside", getattr(buffer, "a", buffer))
            assert own[0].seen is buffer and torch.equal(inside, torch.zeros(3)), (make, inside)
    return ""


def freed_and_made_again(model, images):
    """Hooks that hold a weight for as long as its layer runs."""
    layer, weight = model[4], model[4].weight.detach().clone()
    wanted = [call().pixels if i == 0 else call().scores for i, call in enumerate(both(copy.deepcopy(model), images))]
    storage = layer.weight.untyped_storage()
    size = storage.nbytes()

    def make(*_):
        storage.resize_(size)
        layer.weight.data.copy_(weight)

    layer.register_forward_pre_hook(make)
    layer.register_forward_hook(lambda *_: (storage.resize_(0), None)[1])
    storage.resize_(0)
    o = both(model, images)[1]()
    assert o.path == "forwards" and "frees" in o.reason, o.reason
    torch.testing.assert_close(o.scores, wanted[1], rtol=1e-5, atol=1e-5)
    # Their memory is gone again when the gradient wants it.
    return refused(both(model, images)[0], "DtypeError", "'4.weight'", "freed")


def unusual_arguments(model, images):
    said = []
    for make in (KINDS["freed"], KINDS["two"], KINDS["coo"], KINDS["meta"], KINDS["fake"]):
        said += [
            refused(lambda: zfcore.occlusion_map(model, images, fill=make(images), **BOX), "DtypeError", "fill: "),
            refused(lambda: zfcore.occlusion_map(model, images, make(torch.tensor([1, 2])), **BOX), "DtypeError", "targets: "),
            refused(
                lambda: zfcore.occlusion_map(model, images, feature=("0", make(torch.tensor([1, 2]))), **BOX),
                "DtypeError", "feature's unit: ",
            ),
            refused(lambda: zfcore.deconv_project(model, images, "0", make(torch.tensor([1, 2]))), "DtypeError", "units"),
            refused(
                lambda: zfcore.deconv_project(
                    model, images, "0", [1], positions=make(torch.zeros(2, 1, 2, dtype=torch.int64))
                ),
                "DtypeError", "positions: ",
            ),
        ]  # fmt: skip
    negative = zfcore.occlusion_map(model, images, fill=KINDS["imaginary"](images), **BOX)
    plain = zfcore.occlusion_map(model, images, fill=images.clone(), **BOX)
    assert torch.equal(negative.scores, plain.scores)
    return "; ".join(filter(None, said))


def no_images(model, images):
    for place, kind in (("0", "halves"), ("7", "halves")):
        own = copy.deepcopy(model)
        layer = own.get_submodule(place)
        layer.weight = nn.Parameter(KINDS[kind](layer.weight.detach()), requires_grad=False)
        assert zfcore.deconv_project(own, images[:0], "").pixels.shape == (0, 5, *images.shape[1:])
        assert zfcore.occlusion_map(own, images[:0], **BOX).scores.shape == (0, 3, 3)
    return ""


class Mixed(nn.Module):
    """Weights of a kind that computes on a tensor's behalf, read in Python."""

    def __init__(self, model):
        super().__init__()
        self.rest = model[1:]
        self.weight = nn.Parameter(Halves((model[0].weight.detach() * 2).round().to(torch.int8)), requires_grad=False)

    def forward(self, x):
        return self.rest(nn.functional.conv2d(x, self.weight + 0))


def read_in_python(model, images):
    own = Mixed(copy.deepcopy(model)).eval()
    plain = Mixed(copy.deepcopy(model)).eval()
    plain.weight = nn.Parameter((model[0].weight.detach() * 2).round() / 2, requires_grad=False)
    for strict in (False, True):
        p, q = (zfcore.deconv_project(m, images, "", [1], strict=strict) for m in (own, plain))
        torch.testing.assert_close(p.pixels, q.pixels, rtol=1e-5, atol=1e-5)
        assert p.path == "engine"  # what it computes is plain
    return ""


SCENES = {
    scene.__name__: scene
    for scene in (
        transforms, parameters_of_a_transform, tangents, fake_mode, traced, dynamic_int8, sharded_by_torch,
        distributed_by_torch, distributed_inside, written_buffers, freed_and_made_again, unusual_arguments, no_images,
        read_in_python,
    )
}  # fmt: skip
