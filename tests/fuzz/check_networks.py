"""What must hold of a random network: its stages, projections and occlusion maps are what the model alone gives."""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from pathlib import Path

import processes
import random_networks
import torch
from torch import Tensor, nn

import zfcore
from zfcore.errors import UnsupportedOperation, ZfcoreError
from zfcore.network import read_network

sys.path.insert(0, str(Path(__file__).parents[1] / "deconvnet"))
import deconvnet_oracle  # noqa: E402

BATCHES = (1, 2, 5)


class Checks:
    def __init__(self, seed: int, names: dict[str, object]):
        self.seed, self.names = seed, names
        text = random_networks.Text(seed, names)
        text.write()
        self.text, self.source = text, text.source()
        scope = dict(names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(self.source, scope)
        self.made = scope["Net"]
        self.failures: list[str] = []
        generator = torch.Generator().manual_seed(seed)
        self.images = {n: torch.randn(n, *text.shape, generator=generator, dtype=torch.float64).to(text.dtype) for n in BATCHES}
        self.exact = text.dtype is torch.float64

    def model(self) -> nn.Module:
        """As it is before its first forward."""
        torch.manual_seed(self.seed)
        return self.made().to(self.text.dtype).eval()

    def fail(self, what: str) -> None:
        self.failures.append(f"seed {self.seed}, images {self.text.shape} {self.text.dtype}: {what}\n{self.source}")

    def close(self, found: Tensor, wanted: Tensor, loose: float = 1.0) -> bool:
        if found.shape != wanted.shape:
            return False
        tolerance = (1e-9 if self.exact else 3e-3) * loose
        found, wanted = found.detach().double(), wanted.detach().double()
        return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max().clamp(min=1e-3)))

    # -- values

    def values(self) -> bool:
        """Whether the network was read."""
        model = self.model()
        before = {name: t.clone() for name, t in model.state_dict().items()}
        attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        random = torch.get_rng_state()
        try:
            network = read_network(model, self.text.shape, example=self.images[1])
        except ZfcoreError:
            network = None
        except Exception:
            self.fail(f"reading it fails: {traceback.format_exc(limit=-4)}")
            network = None
        after = model.state_dict()
        if before.keys() != after.keys() or not all(torch.equal(before[k], after[k]) for k in before):
            self.fail("reading it changed its parameters or buffers")
        if attributes != {name: set(vars(module)) for name, module in model.named_modules()}:
            self.fail("reading it changed its attributes")
        if not torch.equal(random, torch.get_rng_state()):
            self.fail("reading it changed the random state")
        if network is None:
            return False
        for n in BATCHES:
            try:
                with torch.no_grad():
                    wanted = self.model()(self.images[n].clone())
            except Exception:
                continue  # the model takes no such number of images
            try:
                with torch.no_grad():
                    found = network.forward(self.images[n].clone(), lambda stage, inputs: stage.run(*inputs))
            except Exception:
                self.fail(f"the stages fail on {n} images: {traceback.format_exc(limit=-4)}")
                break
            if not self.close(found, wanted):
                self.fail(f"the stages' values on {n} images are {self.difference(found, wanted)}")
                break
        return True

    def difference(self, found: Tensor, wanted: Tensor) -> str:
        if found.shape != wanted.shape:
            return f"{tuple(found.shape)}, the model's {tuple(wanted.shape)}"
        off = (found.double() - wanted.double()).abs().max()
        return f"off by {off:.3g} of {wanted.abs().max():.3g}"

    def slopes(self) -> None:
        """The stages' gradient of the output is autograd's."""
        if "LPPool" in self.source:  # whose slope is infinite at 0
            return
        try:
            network = read_network(self.model(), self.text.shape, example=self.images[1], gradient=True)
        except ZfcoreError:
            return
        found, wanted = (self.gradient(self.images[2], way) for way in (
            lambda images: network.forward(images, lambda stage, inputs: stage.run(*inputs)), self.model(),
        ))  # fmt: skip
        if wanted is not None and not self.close(found, wanted, 1000 if self.exact else 10):
            self.fail(f"the stages' gradient is {self.difference(found, wanted)}")

    def gradient(self, images: Tensor, way) -> Tensor | None:
        copies = torch.autograd.graph.saved_tensors_hooks(_copied, lambda t: t)
        images = images.clone().requires_grad_()
        try:
            with copies, torch.enable_grad():
                out = way(images * 1.0)
                weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
                (slope,) = torch.autograd.grad((out * weights).sum(), images, allow_unused=True)
        except RuntimeError:  # autograd has no way down
            return None
        return torch.zeros_like(images) if slope is None else slope

    # -- projections

    def projections(self) -> None:
        layers = self.layers() if self.by_itself() is not None and "LPPool" not in self.source else []
        if not layers:
            return
        name, shape = self.text.rng.choice(layers)
        unit = self.text.rng.randrange(shape[1])
        size = shape[2:] if len(shape) == 4 else (1, 1)
        at = torch.tensor([[[self.text.rng.randrange(n) for n in size]] for _ in range(2)])
        images = self.images[2]
        wanted = self.by_autograd(images, name, unit, at)
        if "LocalResponseNorm" not in self.source:  # which every rule passes over
            for dense in (False, True):
                self.project(images, name, unit, at, "gradient", wanted, dense)
        if self.text.oracle and wanted is not None:
            try:
                pixels, _ = deconvnet_oracle.project(self.model(), images, name, [unit], at)
            except Exception:
                return  # that the oracle cannot do
            for dense in (False, True):
                self.project(images, name, unit, at, "deconvnet", pixels[:, 0], dense)

    def layers(self) -> list[tuple[str, tuple[int, ...]]]:
        found, model = {}, self.model()
        handles = [
            module.register_forward_hook(lambda m, a, out, name=name: found.__setitem__(name, out))
            for name, module in model.named_modules()
            if name.startswith("m") and not isinstance(module, torch.jit.ScriptModule) and not name.count("parametrizations")
        ]
        with torch.no_grad():
            model(self.images[1].clone())
            alone = {name: out.dim() for name, out in found.items() if isinstance(out, Tensor)}
            model(self.images[2].clone())
        for handle in handles:
            handle.remove()
        return [
            (name, tuple(out.shape)) for name, out in found.items()
            if isinstance(out, Tensor) and out.dim() in (2, 4) and len(out) == 2 and alone.get(name) == out.dim()
        ]  # fmt: skip

    def by_autograd(self, images: Tensor, name: str, unit: int, at: Tensor) -> Tensor | None:
        outputs, model = [], self.model()
        model.get_submodule(name).register_forward_hook(lambda m, a, out: outputs.append(out.clone()))

        def way(images):
            model(images)
            out = outputs[-1]
            maps = out if out.dim() == 4 else out[:, :, None, None]
            values = maps[torch.arange(2), unit, at[:, 0, 0], at[:, 0, 1]]
            return values.square() / 2  # whose slope is the value: the seed

        copies = torch.autograd.graph.saved_tensors_hooks(_copied, lambda t: t)
        leaf = images.clone().requires_grad_()
        try:
            with copies, torch.enable_grad():
                (slope,) = torch.autograd.grad(way(leaf * 1.0).sum(), leaf, allow_unused=True)
        except RuntimeError:
            return None
        return torch.zeros_like(images) if slope is None else slope

    def project(self, images, name, unit, at, rule, wanted, dense) -> None:
        what = f"{rule} of {name!r}, unit {unit} at {at.tolist()}, {'dense' if dense else 'engine'}"
        with only_dense() if dense else contextlib.nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = zfcore.deconv_project(self.model(), images.clone(), name, unit, positions=at, rule=rule).pixels[:, 0]
            except ZfcoreError as error:
                if wanted is not None and bool(wanted.any()):
                    self.fail(f"{what}: refused, which autograd can: {type(error).__name__}: {error}")
                return
            except Exception as error:
                # What autograd cannot do either is for the model's author to know, in torch's own words.
                if not (isinstance(error, RuntimeError) and wanted is None):
                    self.fail(f"{what}: {traceback.format_exc(limit=-5)}")
                return
        if wanted is not None and not self.close(found, wanted, 1000 if self.exact else 10):
            self.fail(f"{what}: the pixels are {self.difference(found, wanted)}")

    # -- occlusion

    def remembers(self) -> bool:
        """Whether its second forward computes something else than its first."""
        model = self.model()
        with torch.no_grad():
            first, second = (model(self.images[2].clone()) for _ in range(2))
        return not self.close(second, first)

    def by_itself(self) -> Tensor | None:
        """What the model computes, if it computes that of each image, whatever others stand beside it."""
        images = self.images[2]
        try:
            with torch.no_grad():
                out = self.model()(images.clone())
                for i in range(2):
                    for times in (1, 7):
                        again = self.model()(images[i : i + 1].repeat(times, 1, 1, 1))
                        if len(again) != times or not self.close(again, out[i : i + 1].expand_as(again)):
                            return None
        except Exception:
            return None
        return out

    def occlusion(self) -> None:
        images = self.images[2]
        out = self.by_itself()
        if out is None or out.dim() != 2 or out.shape[1] < 2 or self.remembers():
            return
        target = self.text.rng.randrange(out.shape[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = zfcore.occlusion_map(self.model(), images.clone(), target, box=(3, 2), stride=2, fill=0.3, score="logit")
            except ZfcoreError as error:
                self.fail(f"occlusion refused: {type(error).__name__}: {error}")
                return
            except Exception:
                self.fail(f"occlusion: {traceback.format_exc(limit=-5)}")
                return
        scores = torch.empty_like(found.scores)
        for i, row in enumerate(found.boxes.tolist()):
            for j, (y0, x0, y1, x1) in enumerate(row):
                occluded = images.clone()
                occluded[:, :, y0:y1, x0:x1] = 0.3
                with torch.no_grad():
                    scores[:, i, j] = self.model()(occluded)[:, target]
        if not self.close(found.scores, scores, 10):
            self.fail(f"occlusion ({found.path}): the scores are {self.difference(found.scores, scores)}")


def _copied(t: Tensor) -> Tensor:
    """What autograd saves, buffers too, which the forward may write to later."""
    return t if isinstance(t, nn.Parameter) else t.clone()


@contextlib.contextmanager
def only_dense():
    def refuse(*args, **kwargs):
        raise UnsupportedOperation("the dense path is asked for")

    module = sys.modules["zfcore.deconvnet"]
    read, module.read_network = module.read_network, refuse
    try:
        yield
    finally:
        module.read_network = read


def work(case: list) -> list[str]:
    seed, parts = case
    processes.at("write")
    checks = Checks(seed, _NAMES)
    for part in parts:
        processes.at(part)
        try:
            getattr(checks, part)()
        except Exception:
            checks.fail(f"{part}: the check itself fails: {traceback.format_exc(limit=-4)}")
    return checks.failures


if __name__ == "__main__":
    _NAMES = random_networks.namespace()
    torch.set_num_threads(1)
    processes.serve(work)
