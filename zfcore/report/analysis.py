"""The two analyses of one picture, as figures need them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zfcore.deconvnet import deconv_project
from zfcore.engine.measuring import last_operation
from zfcore.errors import ArgumentError, LayerNotFound
from zfcore.network import evaluating, resolve_layer
from zfcore.occlusion import Occlusion, occlusion_map
from zfcore.report.figures import FeatureProjection, LayerProjections

__all__ = ["Seen", "conv_layers", "ends_in_sigmoid", "forward_order", "look", "occlude", "project", "rectified"]


@dataclass(frozen=True)
class Seen:
    """One forward of one picture: the output, and by layer name, in the order of the forward, the largest
    activation of each unit [U]."""

    output: Tensor
    maxima: dict[str, Tensor]


def look(model: nn.Module, image: Tensor, layers: Sequence[str]) -> Seen:
    """Run the model on one picture [1, C, H, W] and note the units of `layers` (dotted names).

    Raises: LayerNotFound; ArgumentError for a layer that gives no tensor (1, units, ...).
    """
    found = {name: resolve_layer(model, name) for name in layers}
    calls: dict[str, int] = {}
    maxima: dict[str, Tensor] = {}

    def note(name, wanted):
        def hook(_module, _inputs, output):
            call = calls[name] = calls.get(name, -1) + 1
            if wanted is not None and call != wanted:
                return
            if not (isinstance(output, Tensor) and output.dim() >= 2 and len(output) == 1):
                raise ArgumentError(f"layer: {name!r} returns no maps; expected a tensor (1, units, ...)")
            maxima.pop(name, None)  # a later call takes a later place
            # Reduced now: an in-place ReLU that follows would write over the maps.
            maps = output.detach().flatten(2) if output.dim() > 2 else output.detach()[..., None]  # [1, U, P]
            maxima[name] = maps.amax(2)[0]

        return hook

    handles = [
        model.get_submodule(module).register_forward_hook(note(name, call))
        for name, (module, call) in found.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            output = model(image)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in layers if name not in maxima]
    if missing:
        raise LayerNotFound(f"layer: {missing[0]!r} does not run in the forward; expected one that does")
    return Seen(output, maxima)


def forward_order(model: nn.Module, image: Tensor) -> list[str]:
    """The names of the modules without children as a forward calls them, each as often as it is called."""
    names = [name for name, module in model.named_modules() if name and not any(module.children())]
    running = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: running.append(name))
        for name in names
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return running


def ends_in_sigmoid(model: nn.Module, image: Tensor) -> bool:
    """Whether the network's outputs are probabilities already, each class's own. image: [1, C, H, W]."""
    node = last_operation(model, image)
    return node is not None and node.name().startswith(("SigmoidBackward", "HardsigmoidBackward"))


def conv_layers(model: nn.Module, order: Sequence[str]) -> list[str]:
    """The convolutions among the modules that run."""
    return [name for name in dict.fromkeys(order) if isinstance(model.get_submodule(name), nn.Conv2d)]


def rectified(model: nn.Module, order: Sequence[str], layer: str) -> str:
    """The ReLU module that follows a convolution, at once or after its normalisation; else the convolution.

    The paper's feature maps are rectified; the sum of a map that is not says little.
    """
    for name in order[len(order) - list(reversed(order)).index(layer) :]:
        module = model.get_submodule(name)
        if isinstance(module, (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU)):
            return name
        if not isinstance(module, (nn.BatchNorm2d, nn.Identity)):
            break
    return layer


def project(
    model: nn.Module,
    image: Tensor,
    seen: Seen,
    *,
    units: Sequence[int] = (),
    top: int = 9,
    rule: str = "deconvnet",
    batch_size: int | None = None,
) -> list[LayerProjections]:
    """Project the `top` strongest units of each layer in `seen`, or `units`, of a picture [1, C, H, W]."""
    layers = []
    for name, maxima in seen.maxima.items():
        chosen = list(units) or _strongest(maxima, top)
        if chosen:
            p = deconv_project(model, image, name, chosen, rule=rule, crop=True, batch_size=batch_size)
            activations, pixels, boxes = p.activations[0].tolist(), p.pixels[0].cpu(), p.boxes[0].tolist()
        else:
            activations, pixels, boxes = [], torch.zeros(0, image.shape[1], 0, 0), []
        layers.append(LayerProjections(name, chosen, len(maxima), activations, pixels, boxes))
    return layers


def occlude(
    model: nn.Module,
    image: Tensor,
    *,
    layer: str | None,
    unit: int | None = None,
    target: int | None = None,
    batch_size: int | None = None,
    **options: object,
) -> tuple[Occlusion, FeatureProjection | None]:
    """The occlusion map of one picture [1, C, H, W], and its layer's strongest map (or `unit`) projected."""
    feature = None if layer is None else (layer, unit)
    o = occlusion_map(model, image, target, feature=feature, batch_size=batch_size, **options)
    if layer is None:
        return o, None
    unit = int(o.units[0])
    p = deconv_project(model, image, layer, [unit], batch_size=batch_size)
    return o, FeatureProjection(layer, unit, p.pixels[0, 0].cpu(), p.boxes[0, 0].tolist())


def _strongest(maxima: Tensor, top: int) -> list[int]:
    """Active units, by activation and, where equal, by index; NaN is no activation."""
    values = maxima.float().cpu()
    order = sorted((u for u in range(len(values)) if values[u] > 0), key=lambda u: (-float(values[u]), u))
    return order[:top]
