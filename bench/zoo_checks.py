"""What `zoo.py` does with one network: which paths it takes, whether the answers are right, how long they take.

Everything is told as it is found, to a function note(**facts), so that what a network that kills the process or takes
too long had shown until then is kept.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import torch
import torch.nn.functional as F
import zfcore
import zfcore.occlusion as occlusion
from timing import interleave, ratio, timed
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zfcore.engine.grid import Grid
from zfcore.network import read_network
from zoo_networks import Network

Note = Callable[..., None]
Score = str | Callable[[object], Tensor]

READ_BOX, READ_STRIDE = 32, 8  # of an occlusion whose path is asked for
EXACT_BOX = 56  # where scores are compared, with a stride of one and a half: 9 positions of 224 x 224
SPEED_BOX = 32  # box and stride where they are timed: 49 positions
PLAIN_BATCHES = (1, 4, 16)
LOOP_BATCH = 4  # of the loop of plain forwards that scores are held against
CAPTUM_PERTURBATIONS = 16
TIMED_UNITS, EXACT_UNITS = 8, 2
RULES = ("gradient", "deconvnet")
SECONDS, ROUNDS = 2.0, 2  # of timing, at least


# ---- a network and its images


def calibrate(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Gives it statistics and factors as of a network that was trained a little.

    A new network's batch normalisation does nothing, and branches that begin as zero hide what is wrong in them.
    """
    with torch.no_grad():
        for name, value in model.named_parameters():
            largest = value.abs().max().item()
            if largest == 0 and value.dim() > 1:
                value.normal_(0, max(1, value[0].numel()) ** -0.5)
            elif largest == 0 and name.endswith("weight"):
                value.uniform_(0.5, 1.5)
            elif 0 < largest <= 1e-4 and value.numel() < 1e5:  # a layer scale
                value.fill_(0.5)
        norms = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        model(torch.randn(2, *shape))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def tensors_of(output: object) -> Iterator[Tensor]:
    """Those of floating point, in order; "logits" and "out" of several results first."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for name in sorted(output, key=lambda name: name not in ("logits", "out")):
            yield from tensors_of(output[name])
    elif isinstance(output, list | tuple):
        for each in output:
            yield from tensors_of(each)


def first_tensor(output: object) -> Tensor:
    """The tensor that scores are read of."""
    found = next(tensors_of(output), None)
    if found is None:
        raise TypeError(f"the network returns a {type(output).__name__} without a tensor of floating point")
    return found


def channel_mean(output: object) -> Tensor:
    """The mean of the first channel, (rows,), of what is no table of logits."""
    values = first_tensor(output)
    return values[:, 0].reshape(len(values), -1).mean(1)


def score_of(output: object) -> Score:
    return "logit" if isinstance(output, Tensor) and output.dim() == 2 and output.size(1) > 1 else channel_mean


def described(output: object) -> str:
    if isinstance(output, Tensor):
        return " x ".join(map(str, output.shape[1:]))
    return type(output).__name__


def middle_and_late(model: nn.Module, images: Tensor) -> tuple[dict[str, str], object]:
    """Two layers that give maps, "mid" and "late" in the order of their calls, and the model's output for two images.

    Two, so that what is computed from weights alone is told from a map of an image.
    """
    images = images.repeat(2, 1, 1, 1)
    maps: list[str] = []

    def seen(name):
        def hook(module, args, output):
            if isinstance(output, Tensor) and output.dim() == 4 and len(output) == len(images):
                if min(output.shape[2:]) > 1 and output.size(1) >= EXACT_UNITS:
                    maps.append(name)

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                stack.callback(module.register_forward_hook(seen(name)).remove)
        output = model(images)
    return ({"mid": maps[len(maps) // 2], "late": maps[-1]} if maps else {}), output


def side(wanted: int, shape: tuple[int, int, int]) -> int:
    """Of a box: smaller in a small picture, so that there are several positions."""
    return max(1, min(wanted, min(shape[1:]) // 4))


# ---- paths


class Decided(BaseException):
    """Stops occlusion_map once it has chosen who measures: no `except Exception` is to keep it."""


def occlusion_path(model: nn.Module, images: Tensor, score: Score, box: int, stride: int) -> tuple[str, str]:
    """Who measures the positions, "engine" or "forwards", and why, as occlusion_map decides; nothing is measured."""
    choose = occlusion._sweep

    def chosen(*arguments):
        raise Decided(choose(*arguments))

    with mock.patch.object(occlusion, "_sweep", chosen), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            occlusion.occlusion_map(model, images, score=score, box=box, stride=stride)
        except Decided as decided:
            ((sweep, reason),) = decided.args
    return ("forwards", reason) if sweep is None else ("engine", "")


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:600]


@contextlib.contextmanager
def attempt(note: Note, what: str) -> Iterator[None]:
    """Goes on after an error, which is noted."""
    note(step=what)
    try:
        yield
    except Exception as error:  # whatever the model, the library or the other side makes of it
        note(**{f"{what}_failed": failure(error)})


def read(model: nn.Module, images: Tensor, layers: dict[str, str], score: Score, note: Note) -> None:
    """Which paths the two functions take, and whether the whole network is read."""
    shape = tuple(images.shape[1:])
    for which, layer in layers.items():
        with attempt(note, f"{which}_read"):
            try:
                read_network(model, shape, layer, images)
            except zfcore.UnsupportedOperation as error:
                note(**{f"{which}_path": "dense", f"{which}_reason": str(error)})
            else:
                note(**{f"{which}_path": "engine", f"{which}_reason": ""})
    with attempt(note, "whole_read"):
        try:
            stage = read_network(model, shape).layer
        except zfcore.UnsupportedOperation as error:
            note(whole=False, whole_reason=str(error))
        else:
            note(whole=True, whole_reason="", whole_shape=list(stage.shape))
    with attempt(note, "occlusion_read"):
        path, reason = occlusion_path(model, images, score, side(READ_BOX, shape), side(READ_STRIDE, shape))
        note(occlusion_path=path, occlusion_reason=reason)


# ---- right answers


class _PassedOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


# Rectifiers that work in place, and the same out of place.
IN_PLACE = {
    "relu_": torch.relu, "leaky_relu_": F.leaky_relu, "hardtanh_": F.hardtanh, "clamp_": torch.clamp,
    "clip_": torch.clamp, "clamp_min_": torch.clamp_min,
}  # fmt: skip
MAY_BE_IN_PLACE = (F.relu, F.relu6, F.leaky_relu, F.hardtanh)


class _Seen(TorchFunctionMode):
    """Makes autograd's graph show every rectifier, and passes contrast normalisation over, as every rule does.

    The node of one that works in place on a view would be hidden inside another node.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.local_response_norm:
            with torch.no_grad():
                y = function(*args, **kwargs)
            return _PassedOver.apply(args[0] if args else kwargs["input"], y)
        if (name := getattr(function, "__name__", "")) in IN_PLACE:
            x, *rest = args
            return x.copy_(IN_PLACE[name](x.clone(), *rest, **kwargs))
        if function in MAY_BE_IN_PLACE:
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            if given.get("inplace"):
                x = given["input"]
                return x.copy_(function(**{**given, "input": x.clone(), "inplace": False}))
        return function(*args, **kwargs)


def slope_below(node: object) -> float | None:
    """Of autograd's node of a rectifier, its slope below zero; None of another node."""
    kind = node.name().rstrip("0123456789")  # which tell, among others, what works in place
    if kind == "ReluBackward":
        below = node.next_functions[0][0]
        # Of a magnitude it takes nothing away: F.lp_pool2d has one inside, where a root's slope is infinite.
        return None if below is not None and below.name().startswith("AbsBackward") else 0.0
    if kind == "LeakyReluBackward":
        return float(node._saved_negative_slope)
    if kind == "HardtanhBackward" and float(node._saved_min_val) == 0:
        return 0.0
    if kind in ("ClampBackward", "ClampMinBackward"):
        low = node._saved_min
        return 0.0 if isinstance(low, int | float) and low == 0 else None
    return None


@contextlib.contextmanager
def rectified_way_down(root: object) -> Iterator[None]:
    """The deconvnet's rule in autograd's graph: what comes down is rectified as the rectifier's input was.

    On the graph, so that it does not matter how the model called the rectifier.
    """

    def rule(slope):
        def hook(below, above):
            g = above[0]
            return (torch.where(g < 0, g * slope, g) if slope else F.relu(g), *below[1:])

        return hook

    with contextlib.ExitStack() as stack:
        known, waiting = {root}, [root]
        while waiting:
            node = waiting.pop()
            slope = slope_below(node)
            if slope is not None:
                stack.callback(node.register_hook(rule(slope)).remove)
            following = {each for each, _ in node.next_functions if each is not None} - known
            known |= following
            waiting += following
        yield


def oracle(model: nn.Module, images: Tensor, layer: str, at: list[list[int]], rule: str) -> list[Tensor]:
    """Projections [C, H, W] by autograd of single values (unit, row, column) of the layer's last call, in one image."""
    outputs: list[Tensor] = []
    leaf = images.clone().requires_grad_()
    handle = model.get_submodule(layer).register_forward_hook(lambda m, args, out: outputs.append(out.clone()))
    try:
        with torch.enable_grad(), _Seen():
            model(leaf.clone())  # which may write to its input
    finally:
        handle.remove()
    output = outputs[-1]
    down = rectified_way_down(output.grad_fn) if rule == "deconvnet" else contextlib.nullcontext()
    with down:
        return [torch.autograd.grad(output[0, u, i, j], leaf, retain_graph=True)[0][0] for u, i, j in at]


def whole_picture(projection: zfcore.Projection, unit: int, shape: tuple[int, int, int]) -> Tensor:
    """[C, H, W]: the pixels of a cropped projection where they lie."""
    y0, x0, y1, x1 = projection.boxes[0, unit].tolist()
    height, width = shape[1:]
    whole = torch.zeros(shape)
    top, left, bottom, right = max(0, y0), max(0, x0), min(height, y1), min(width, x1)
    part = projection.pixels[0, unit, :, top - y0 : bottom - y0, left - x0 : right - x0]
    whole[:, top:bottom, left:right] = part
    return whole


def furthest(found: Tensor, right: Tensor) -> float:
    """The largest difference; what is no number, or infinite, on both sides alike is none."""
    same = (found == right) | (found.isnan() & right.isnan())
    difference = (found - right).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return difference.masked_fill(same, 0).max().item()


def largest_of(values: Tensor) -> float:
    return values.abs()[values.isfinite()].max().item() if values.isfinite().any() else 0.0


def relative(error: float, scale: float) -> float:
    return error / scale if scale else float(error > 0)


def exact_deconv(model: nn.Module, images: Tensor, which: str, layer: str, rule: str, note: Note) -> None:
    shape = tuple(images.shape[1:])
    units = range(EXACT_UNITS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = zfcore.deconv_project(model, images, layer, units, rule=rule, seed="one", crop=True)
    places = [[unit, *place] for unit, place in zip(units, found.positions[0].tolist(), strict=True)]
    errors, dead = [], True
    for unit, right in enumerate(oracle(model, images, layer, places, rule)):
        largest = largest_of(right)
        dead &= largest == 0
        errors.append(relative(furthest(whole_picture(found, unit, shape), right), largest))
    note(
        **{
            f"{which}_{rule}_error": max(errors),
            f"{which}_{rule}_dead": dead,
            f"{which}_exact_path": found.path,
            f"{which}_exact_reason": found.reason,
        }
    )


def occluded(images: Tensor, grid: Grid, batch: int) -> Iterator[Tensor]:
    """The picture with each box at zero, in batches."""
    for first in range(0, len(grid), batch):
        rows = images.repeat(min(batch, len(grid) - first), 1, 1, 1)
        for row, place in enumerate(range(first, first + len(rows))):
            rows[row][(slice(None), *grid[place])] = 0
        yield rows


def plain_scores(
    model: nn.Module, images: Tensor, grid: Grid, score: Callable[[object], Tensor], batch: int
) -> Tensor:
    """[Gy, Gx]: the scores by a loop of plain forwards."""
    with torch.no_grad():
        return torch.cat([score(model(rows)) for rows in occluded(images, grid, batch)]).view(grid.rows, grid.columns)


@contextlib.contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Not a copy, which not every model allows; float32 values come back as they were."""
    torch.set_default_dtype(torch.float64)
    model.double()
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        model.float()


def callable_score(score: Score, target: Tensor | None) -> Callable[[object], Tensor]:
    return score if callable(score) else lambda output: output[:, int(target[0])]


def exact_occlusion(model: nn.Module, images: Tensor, score: Score, note: Note) -> None:
    box = side(EXACT_BOX, images.shape[1:])
    stride = box + box // 2
    grid = Grid.over(images.shape[-2:], (box, box), (stride, stride))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = zfcore.occlusion_map(model, images, score=score, box=box, stride=stride)
    path, reason = found.path, found.reason
    note(occlusion_exact_path=path, occlusion_exact_reason=reason)
    one = callable_score(score, found.targets)
    plain = plain_scores(model, images, grid, one, LOOP_BATCH).double()
    right = plain
    with attempt(note, "float64"), in_float64(model):
        right = plain_scores(model, images.double(), grid, one, LOOP_BATCH)
    span, largest = (right.max() - right.min()).item(), largest_of(right)
    error = furthest(found.scores[0].double(), right)
    note(
        occlusion_error=relative(error, span),
        occlusion_error_of_largest=relative(error, largest),
        plain_error=relative(furthest(plain, right), span),
    )


def exact(model: nn.Module, images: Tensor, layers: dict[str, str], score: Score, note: Note) -> None:
    """Projections against autograd, of their largest magnitude; scores against float64, of their range."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for which, layer in layers.items():
        for rule in RULES:
            with attempt(note, f"{which}_{rule}"):
                exact_deconv(model, images, which, layer, rule, note)
    with attempt(note, "occlusion_exact"):
        exact_occlusion(model, images, score, note)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    note(changed=changed[:3], training=any(module.training for module in model.modules()))


# ---- times


def captum_attr():
    import captum.attr

    return captum.attr


def speed_deconv(model: nn.Module, images: Tensor, which: str, layer: str, note: Note) -> None:
    attr = captum_attr()
    deconvolution = attr.NeuronDeconvolution(model, model.get_submodule(layer))

    def project():
        return zfcore.deconv_project(model, images, layer, range(units), seed="one", crop=True)

    units = TIMED_UNITS
    with torch.no_grad():
        shapes = []
        handle = model.get_submodule(layer).register_forward_hook(lambda m, a, out: shapes.append(out.shape))
        model(images)
        handle.remove()
    units = min(units, shapes[-1][1])
    first = project()
    places = [(unit, *place) for unit, place in enumerate(first.positions[0].tolist())]

    def attribute():
        return [deconvolution.attribute(images, place).detach() for place in places]

    deconvolution.attribute(images, places[0])
    times = interleave({"captum": attribute, "zfcore": project}, SECONDS, ROUNDS)
    note(
        **{
            f"{which}_ms": 1e3 * min(times["zfcore"]),
            f"{which}_captum_ms": 1e3 * min(times["captum"]),
            f"{which}_to_captum": ratio(times["captum"], times["zfcore"]),
            f"{which}_speed_path": first.path,
        }
    )


def best_batch(model: nn.Module, images: Tensor, batches: tuple[int, ...]) -> int:
    """Of plain forwards, the one whose images take least."""
    with torch.no_grad():
        rows = {batch: images.repeat(batch, 1, 1, 1) for batch in batches}
        for each in rows.values():
            model(each)
        return min(batches, key=lambda batch: timed(lambda: model(rows[batch])) / batch)


def speed_occlusion(model: nn.Module, images: Tensor, score: Score, note: Note) -> None:
    box = side(SPEED_BOX, images.shape[1:])
    grid = Grid.over(images.shape[-2:], (box, box), (box, box))

    def measure():
        return zfcore.occlusion_map(model, images, score=score, box=box, stride=box)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = measure()
    path, reason = first.path, first.reason
    one = callable_score(score, first.targets)
    batch = best_batch(model, images, PLAIN_BATCHES)
    note(occlusion_speed_path=path, occlusion_speed_reason=reason, positions=len(grid), plain_batch=batch)
    rows = {"zfcore": measure, "plain": lambda: plain_scores(model, images, grid, one, batch)}
    with attempt(note, "captum"):
        peer = captum_attr().Occlusion(lambda rows: one(model(rows)))
        window = (images.size(1), box, box)
        options = {"sliding_window_shapes": window, "strides": window, "perturbations_per_eval": CAPTUM_PERTURBATIONS}

        def attribute():
            with torch.no_grad():
                return peer.attribute(images, **options)

        map = attribute()[0, 0]
        agreed = (map - first.heatmap()[0]).abs().max().item()
        note(captum_difference=relative(agreed, (map.max() - map.min()).item()))
        rows["captum"] = attribute
    times = interleave(rows, SECONDS, ROUNDS)
    note(occlusion_ms=1e3 * min(times["zfcore"]))
    for name in rows.keys() - {"zfcore"}:
        note(
            **{
                f"occlusion_{name}_ms": 1e3 * min(times[name]),
                f"occlusion_to_{name}": ratio(times[name], times["zfcore"]),
            }
        )


def speed(model: nn.Module, images: Tensor, layers: dict[str, str], score: Score, note: Note) -> None:
    """How many times as fast as Captum and as plain batched forwards; above 1 is faster."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for which, layer in layers.items():
            with attempt(note, f"{which}_speed"):
                speed_deconv(model, images, which, layer, note)
        with attempt(note, "occlusion_speed"):
            speed_occlusion(model, images, score, note)


STAGES = {"read": read, "exact": exact, "speed": speed}


def examine(network: Network, what: tuple[str, ...], note: Note) -> None:
    """All stages of one network; what it does and what becomes of it are noted."""
    start = time.perf_counter()
    note(step="make")
    torch.manual_seed(0)
    try:
        model = network.make().eval()
    except ImportError as error:
        note(status="not installed", error=failure(error))
        return
    except Exception as error:  # a network that this version of its library does not have, or not so
        note(status="not made", error=failure(error))
        return
    note(step="run", parameters=sum(p.numel() for p in model.parameters()))
    images = torch.randn(1, *network.shape)
    try:
        if set(what) != {"read"}:
            calibrate(model, network.shape)
        layers, output = middle_and_late(model, images)
        score = score_of(output)
        values = first_tensor(output)
    except Exception as error:  # the network itself, before zfcore has seen it
        note(status="not run", error=failure(error))
        return
    note(layers=layers, output=described(output), finite=bool(values.isfinite().all()))
    for stage in what:
        STAGES[stage](model, images, layers, score, note)
        note(tried=stage)
    note(status="done", step="", seconds=round(time.perf_counter() - start, 2))
