"""occlusion_map against a plain loop of forwards, against Captum, and at its edges."""

import copy
import math
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zfcore.engine.measuring import Answers
from zfcore.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    LayerNotFound,
    ShapeError,
    UnitNotFound,
    UnsupportedOperation,
)
from zfcore.occlusion import Occlusion, occlusion_map
from zfcore.ops import use_backend

CLASSES = 7
# Networks that the engine cannot read are among those below, and say so; test_sweep looks at what they say.
pytestmark = pytest.mark.filterwarnings("ignore:zfcore. plain forwards run this network")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Maps of a few kilobytes: with more threads, most of the time goes in threads waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class VGGLike(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True),
            nn.MaxPool2d(2), nn.AdaptiveAvgPool2d((3, 3)), nn.Flatten(), nn.Linear(108, 20),
            nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(20, CLASSES),
        )  # fmt: skip


class AlexNetLike(nn.Module):
    """All functional, odd sizes, ceil_mode, LRN, grouped and dilated convolutions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 5, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(12, 8, 3, padding=2, dilation=2)
        self.full = nn.Linear(8 * 4 * 4, CLASSES)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(x)), 3, 2, ceil_mode=True)
        x = F.local_response_norm(x, 5)
        x = F.relu(self.grouped(x))
        x = F.relu(self.dilated(x))
        return self.full(F.dropout(F.adaptive_avg_pool2d(x, 4).flatten(1), 0.5, self.training))


class ResNetLike(nn.Module):
    """BatchNorm, one in-place ReLU used again and again, a skip."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.full = nn.Linear(8, CLASSES)
        for norm in self.norms:
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, -1, 1)

    def forward(self, x):
        x = self.relu(self.norms[0](self.stem(x)))
        y = self.relu(self.norms[1](self.a(x)))
        x = self.relu(x + self.norms[2](self.b(y)))
        return self.full(x.mean((2, 3)))


class InceptionLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.narrow = nn.Conv2d(6, 4, 1)
        self.wide = nn.Conv2d(6, 4, (1, 5), padding=(0, 2))
        self.pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(6, 4, 1))
        self.head = nn.Sequential(nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Linear(108, CLASSES))

    def forward(self, x):
        x = F.max_pool2d(self.stem(x).relu(), 2)
        return self.head(torch.cat([self.narrow(x), self.wide(x), self.pooled(x)], 1).relu_())


NETWORKS = [VGGLike, AlexNetLike, ResNetLike, InceptionLike]
GRIDS = [  # image, box, stride: none divides the image
    ((29, 37), (7, 9), (5, 4)),
    ((33, 24), 10, 7),
    ((23, 23), (23, 5), (3, 5)),
]


def network(kind, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().eval()


def pictures(count, size, seed=1) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def as_pair(value):
    return value if isinstance(value, tuple) else (value, value)


def by_forwards(model, images, box, stride, fill=0.0):
    """The definition: one forward for each position. Logits [N, Gy, Gx, classes] and boxes."""
    (height, width), (bh, bw), (sy, sx) = images.shape[-2:], as_pair(box), as_pair(stride)
    ys = [i * sy for i in range(math.ceil(max(height - bh, 0) / sy) + 1)]
    xs = [i * sx for i in range(math.ceil(max(width - bw, 0) / sx) + 1)]
    rows = []
    with torch.no_grad():
        for image in images:
            for y in ys:
                for x in xs:
                    covered = image.clone()
                    where = (slice(None), slice(y, y + bh), slice(x, x + bw))
                    paint = torch.as_tensor(fill, dtype=image.dtype)
                    paint = paint[:, None, None] if paint.dim() == 1 else paint
                    covered[where] = paint.expand_as(image)[where]
                    rows.append(model(covered[None])[0])
    boxes = torch.tensor([[(y, x, min(y + bh, height), min(x + bw, width)) for x in xs] for y in ys])
    return torch.stack(rows).view(len(images), len(ys), len(xs), -1), boxes


def close(actual, wanted, tolerance=1e-5):
    return (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("size, box, stride", GRIDS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_equals_a_plain_loop_of_forwards(kind, size, box, stride):
    model, images = network(kind), pictures(2, size)
    logits, boxes = by_forwards(model, images, box, stride)
    clean = model(images).detach()
    top = clean.argmax(1)
    o = occlusion_map(model, images, box=box, stride=stride, batch_size=5)
    assert torch.equal(o.boxes, boxes) and o.boxes.dtype == torch.int64
    assert torch.equal(o.labels, logits.argmax(-1)) and o.labels.dtype == torch.int64
    assert torch.equal(o.targets, top) and torch.equal(o.clean_labels, top)
    rows = torch.arange(2)
    assert close(o.scores, logits.softmax(-1)[rows, :, :, top])
    assert close(o.clean, clean.softmax(1)[rows, top])
    assert o.activation is None and o.units is None and o.clean_activation is None

    given = torch.tensor([3, 5])
    o = occlusion_map(model, images, given, box=box, stride=stride, score="logit", fill=0.7)
    logits, _ = by_forwards(model, images, box, stride, 0.7)
    assert close(o.scores, logits[rows, :, :, given])
    assert close(o.clean, clean[rows, given])
    assert torch.equal(o.targets, given) and torch.equal(o.clean_labels, top)


@pytest.mark.parametrize("size, box, stride", GRIDS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_heatmap_equals_captum(kind, size, box, stride):
    attr = pytest.importorskip("captum.attr", reason="the peer that this compares with")
    model, images = network(kind), pictures(2, size)
    targets = torch.tensor([2, 6])
    o = occlusion_map(model, images, targets, box=box, stride=stride)
    peer = attr.Occlusion(lambda x: model(x).softmax(1)).attribute(
        images,
        target=targets,
        baselines=0,
        sliding_window_shapes=(3, *as_pair(box)),
        strides=(3, *as_pair(stride)),
        perturbations_per_eval=4,
    )
    heat = o.heatmap()
    assert heat.shape == (2, *size) and heat.dtype == torch.float32
    assert (heat - peer[:, 0]).abs().max() <= 1e-5 * peer.abs().max() + 1e-7


@pytest.mark.parametrize(
    "fill",
    [
        -1.5, 2, torch.tensor(0.25, dtype=torch.float64), [0.1, -0.2, 0.3], torch.tensor([3.0, 2.0, 1.0]),
        torch.linspace(-1, 1, 3 * 29 * 37).view(3, 29, 37), pictures(1, (29, 37), seed=9)[0],
    ],
)  # fmt: skip
def test_fills(fill):
    model, images = network(VGGLike), pictures(2, (29, 37))
    logits, _ = by_forwards(model, images, (7, 9), (5, 4), fill)
    o = occlusion_map(model, images, 1, box=(7, 9), stride=(5, 4), fill=fill, score="logit")
    assert close(o.scores, logits[..., 1])


def test_fill_with_a_picture_for_each_image():
    model, images = network(VGGLike), pictures(2, (29, 37))
    fills = images.flip(0).clone()
    o = occlusion_map(model, images, 1, box=9, stride=6, fill=fills, score="logit")
    for n in range(2):
        alone = occlusion_map(model, images[n], 1, box=9, stride=6, fill=fills[n], score="logit")
        assert close(o.scores[n], alone.scores[0])


def test_painting_an_image_with_itself_changes_nothing():
    model, images = network(ResNetLike), pictures(2, (29, 37))
    o = occlusion_map(model, images, box=9, stride=6, fill=images)
    assert (o.scores - o.clean[:, None, None]).abs().max() <= 1e-6
    assert o.heatmap().abs().max() <= 1e-6


@pytest.mark.parametrize("batch_size", [1, 2, 7, 48, 95, 96, 1000, None])
def test_any_batch_size_gives_the_same_map(batch_size):
    model, images = network(AlexNetLike), pictures(2, (29, 37))
    o = occlusion_map(model, images, box=(7, 9), stride=(5, 4), batch_size=batch_size, feature=("first", 3))
    logits, _ = by_forwards(model, images, (7, 9), (5, 4))
    assert close(o.scores, logits.softmax(-1)[torch.arange(2), :, :, o.targets])
    assert o.activation.shape == o.scores.shape


def test_positions_of_several_images_share_one_reused_buffer():
    seen, storage = [], []

    class Spy(VGGLike):
        def forward(self, x):
            if x.sum() > 1e9:  # which keeps the engine out
                return x
            seen.append(len(x))
            storage.append(x.data_ptr())
            return super().forward(x)

    images = pictures(3, (16, 16))
    occlusion_map(network(Spy), images, box=8, stride=4, batch_size=5)  # 3 x 3 positions each
    assert seen == [1, 2] + [5, 5, 5, 5, 5, 2]
    assert len(set(storage[2:])) == 1 and images.data_ptr() not in storage


class WritesItsInput(VGGLike):
    """Normalises in place, as many networks do: what a row of the buffer held is lost."""

    def forward(self, x):
        return super().forward(x.mul_(0.5).sub_(0.1))


@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_a_network_that_writes_to_its_input(batch_size):
    images, fill = pictures(3, (16, 16)), pictures(1, (16, 16), seed=3)[0]
    before = images.clone(), fill.clone()
    o = occlusion_map(network(WritesItsInput), images, box=5, stride=3, fill=fill, batch_size=batch_size)
    assert torch.equal(images, before[0]) and torch.equal(fill, before[1])
    model = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), network(VGGLike))  # the same, out of place
    with torch.no_grad():
        model[0].weight.fill_(0.5), model[0].bias.fill_(-0.1)
    want = occlusion_map(model, images, box=5, stride=3, fill=fill)
    assert close(o.scores, want.scores) and close(o.clean, want.clean)


def test_under_inference_mode():
    images = pictures(2, (16, 16))
    want = occlusion_map(network(WritesItsInput), images, box=5, stride=3)
    with torch.inference_mode():
        o = occlusion_map(network(WritesItsInput), images.clone(), box=5, stride=3, batch_size=3)
        assert torch.is_inference_mode_enabled()
    assert close(o.scores, want.scores) and not o.scores.is_inference()


def test_a_score_that_is_a_view_of_the_input():
    images = pictures(2, (16, 16))
    o = occlusion_map(nn.Flatten(), images, box=(1, 1), stride=9, score=lambda out: out[:, 0], batch_size=2)
    want = images[:, 0, 0, 0][:, None, None].repeat(1, 3, 3)
    want[:, 0, 0] = 0
    assert torch.equal(o.scores, want)


@pytest.mark.parametrize("box, shape", [(16, (1, 1)), (40, (1, 1)), ((4, 100), (5, 1)), ((16, 4), (1, 5))])
def test_a_box_as_long_as_the_image_has_one_position(box, shape):
    model, images = network(VGGLike), pictures(1, (16, 16))
    o = occlusion_map(model, images, box=box, stride=3)
    assert o.scores.shape == (1, *shape)
    assert o.boxes[..., 2:].max() == 16
    if shape == (1, 1):
        blank = model(torch.zeros_like(images)).softmax(1)[0, o.targets[0]]
        assert close(o.scores[0, 0, 0], blank)
        assert torch.allclose(o.heatmap(), (o.clean - o.scores[0, 0, 0]).expand(1, 16, 16))


def test_pixels_that_no_box_covers_are_nan():
    o = occlusion_map(network(VGGLike), pictures(1, (16, 16)), box=2, stride=5)
    covered = torch.zeros(16, dtype=torch.bool)
    for start in (0, 5, 10, 15):
        covered[start : start + 2] = True
    assert torch.equal(~o.heatmap()[0].isnan(), covered[:, None] & covered[None])


def test_a_box_past_the_edge_covers_nothing():
    model, images = network(VGGLike), pictures(1, (16, 16))
    o = occlusion_map(model, images, box=2, stride=(30, 9))
    assert o.boxes[:, 0].tolist() == [[0, 0, 2, 2], [16, 0, 16, 2]]
    assert close(o.scores[0, 1], o.clean[0].expand(3))


def test_a_score_that_is_not_finite_stays_where_it_was_measured():
    o = Occlusion(
        scores=torch.tensor([[[0.5, math.nan]]]), labels=None, activation=None, clean=torch.tensor([1.0]),
        boxes=torch.tensor([[[0, 0, 1, 2], [0, 2, 1, 4]]]), clean_labels=None, targets=None,
        clean_activation=None, units=None, image_size=(1, 4),
    )  # fmt: skip
    assert torch.allclose(o.heatmap(), torch.tensor([[[0.5, 0.5, math.nan, math.nan]]]), equal_nan=True)


def layer_outputs(model, module, images):
    seen = []
    handle = module.register_forward_hook(lambda m, i, output: seen.append(output.clone()))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen


def covered_pictures(images, o):
    """[N * Gy * Gx, C, H, W]"""
    rows = []
    for image in images:
        for y0, x0, y1, x1 in o.boxes.flatten(0, 1).tolist():
            rows.append(image.clone())
            rows[-1][:, y0:y1, x0:x1] = 0
    return torch.stack(rows)


def test_feature_is_the_total_activation_of_one_map():
    model, images = network(ResNetLike), pictures(2, (29, 37))
    o = occlusion_map(model, images, box=(7, 9), stride=(5, 4), feature=("a", 5), batch_size=7)
    maps = layer_outputs(model, model.a, covered_pictures(images, o))[0]
    assert close(o.activation, maps[:, 5].sum((1, 2)).view(o.scores.shape))
    assert close(o.clean_activation, layer_outputs(model, model.a, images)[0][:, 5].sum((1, 2)))
    assert o.units.tolist() == [5, 5]
    drop = o.clean_activation[:, None, None] - o.activation
    as_score = occlusion_map(model, images, box=(7, 9), stride=(5, 4))
    whole = Occlusion(**{**vars(as_score), "scores": -drop, "clean": torch.zeros(2)})
    assert close(o.activation_heatmap(), whole.heatmap())


def test_feature_of_each_images_strongest_map_and_of_one_unit_each():
    model, images = network(VGGLike), pictures(3, (24, 20))
    totals = layer_outputs(model, model[6], images)[0].sum((2, 3))
    o = occlusion_map(model, images, box=8, stride=8, feature=(model[6], None), batch_size=4)
    assert torch.equal(o.units, totals.argmax(1))
    assert close(o.clean_activation, totals.amax(1))
    maps = layer_outputs(model, model[6], covered_pictures(images, o))[0].sum((2, 3))
    owners = torch.arange(3).repeat_interleave(len(o.boxes.flatten(0, 1)))
    assert close(o.activation.flatten(), maps[torch.arange(len(maps)), o.units[owners]])
    each = occlusion_map(model, images, box=8, stride=8, feature=("6", [4, 0, 11]))
    assert each.units.tolist() == [4, 0, 11]
    assert close(each.activation.flatten(), maps[torch.arange(len(maps)), each.units[owners]])


def test_feature_before_an_in_place_relu_is_what_the_layer_returned():
    model, images = network(VGGLike), pictures(1, (24, 20))
    o = occlusion_map(model, images, box=8, stride=8, feature=("5", 2))
    kept = copy.deepcopy(model)
    kept[6].inplace = False
    assert close(o.clean_activation, layer_outputs(kept, kept[5], images)[0][:, 2].sum((1, 2)))


def test_feature_of_a_module_that_is_called_several_times():
    model, images = network(ResNetLike), pictures(1, (24, 20))
    model.relu.inplace = False
    calls = [output[:, 3].sum((1, 2)) for output in layer_outputs(model, model.relu, images)]
    for name, call in (("relu@0", 0), ("relu@1", 1), ("relu@2", 2), ("relu", 2)):
        o = occlusion_map(model, images, box=12, stride=12, feature=(name, 3))
        assert close(o.clean_activation, calls[call]), name


def test_feature_of_a_fully_connected_layer():
    model, images = network(VGGLike), pictures(2, (24, 20))
    o = occlusion_map(model, images, box=12, stride=12, feature=("10", 4))
    kept = copy.deepcopy(model)
    kept[11].inplace = False
    assert close(o.clean_activation, layer_outputs(kept, kept[10], images)[0][:, 4])


def test_callable_score_reads_any_output():
    class Many(VGGLike):
        def forward(self, x):
            return {"logits": super().forward(x), "pixels": x.mean((1, 2, 3))}

    model, images = network(Many), pictures(2, (16, 16))
    o = occlusion_map(
        model, images, box=5, stride=4, score=lambda out: out["logits"][:, 2] - out["logits"][:, 1]
    )
    assert o.labels is None and o.clean_labels is None and o.targets is None
    plain = network(VGGLike)
    logits, _ = by_forwards(plain, images, 5, 4)
    assert close(o.scores, logits[..., 2] - logits[..., 1])

    table = occlusion_map(plain, images, box=5, stride=4, score=lambda out: out.logsumexp(1))
    assert close(table.scores, logits.logsumexp(-1))
    assert torch.equal(table.labels, logits.argmax(-1))
    assert torch.equal(table.targets, table.clean_labels)


def test_one_output():
    class Binary(VGGLike):
        def forward(self, x):
            return super().forward(x)[:, :1]

    model, images = network(Binary), pictures(2, (16, 16))
    with pytest.raises(ArgumentError, match="score: 'probability' of a network with one output"):
        occlusion_map(model, images)
    logit = occlusion_map(model, images, box=5, stride=4, score="logit")
    chance = occlusion_map(model, images, box=5, stride=4, score=lambda out: out[:, 0].sigmoid())
    assert torch.allclose(chance.scores, logit.scores.sigmoid())


def test_probabilities_are_not_taken_for_logits():
    model = nn.Sequential(network(VGGLike), nn.Softmax(1))
    images = pictures(2, (16, 16))
    with pytest.raises(ArgumentError, match="probabilities already.*score='logit'"):
        occlusion_map(model, images)
    as_they_are = occlusion_map(model, images, box=5, stride=4, score="logit")
    assert close(as_they_are.scores, occlusion_map(model[0], images, box=5, stride=4).scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_images_of_any_float_dtype(dtype):
    model, images = network(VGGLike), pictures(2, (16, 16)).to(dtype)
    o = occlusion_map(model, images, box=5, stride=4)
    want = occlusion_map(model, images.float(), box=5, stride=4)
    assert o.scores.dtype == torch.float32 and torch.equal(o.scores, want.scores)


def test_networks_of_other_dtypes():
    model, images = network(VGGLike), pictures(2, (16, 16))
    exact = occlusion_map(copy.deepcopy(model).double(), images, box=5, stride=4)
    assert exact.scores.dtype == torch.float64 and exact.heatmap().dtype == torch.float64
    assert close(occlusion_map(model, images, box=5, stride=4).scores.double(), exact.scores)
    narrow = occlusion_map(copy.deepcopy(model).bfloat16(), images, exact.targets, box=5, stride=4)
    assert narrow.scores.dtype == torch.float32
    assert close(narrow.scores.double(), exact.scores, 3e-2)


def test_bf16_is_close_and_says_so_in_the_arithmetic():
    seen = []

    class Spy(VGGLike):
        def forward(self, x):
            if x.sum() > 1e9:  # which keeps the engine out
                return x
            seen.append(self[0](x).dtype)
            return super().forward(x)

    model, images = network(Spy), pictures(2, (16, 16))
    exact = occlusion_map(model, images, box=5, stride=4)
    assert set(seen) == {torch.float32}
    seen.clear()
    narrow = occlusion_map(model, images, exact.targets, box=5, stride=4, precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert narrow.scores.dtype == torch.float32
    assert close(narrow.scores, exact.scores, 2e-2) and not torch.equal(narrow.scores, exact.scores)


def test_exact_whatever_surrounds_the_call():
    model, images = network(VGGLike), pictures(2, (16, 16))
    want = occlusion_map(model, images, box=5, stride=4)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            o = occlusion_map(model, images, box=5, stride=4)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(o.scores, want.scores)


def layouts(images):
    yield "channels_last", images.contiguous(memory_format=torch.channels_last)
    yield "sliced", torch.cat([images, images], 3)[..., : images.shape[3]]
    yield "transposed", images.transpose(2, 3).contiguous().transpose(2, 3)
    yield "offset", torch.cat([torch.zeros(1), images.flatten()])[1:].view_as(images)
    yield "requires grad", images.clone().requires_grad_()


def test_images_of_any_layout():
    model, images = network(VGGLike), pictures(2, (16, 16))
    want = occlusion_map(model, images, box=5, stride=4)
    for name, laid_out in layouts(images):
        assert close(occlusion_map(model, laid_out, box=5, stride=4).scores, want.scores), name
    one = images[:1].expand(3, -1, -1, -1)
    assert close(occlusion_map(model, one, box=5, stride=4).scores[2:], want.scores[:1])


def test_one_image_without_a_batch_axis():
    model, images = network(VGGLike), pictures(1, (16, 16))
    o = occlusion_map(model, images[0], 3, box=5, stride=4)
    assert o.scores.shape == (1, 4, 4)
    assert torch.equal(o.scores, occlusion_map(model, images, [3], box=5, stride=4).scores)


def test_no_images():
    o = occlusion_map(network(VGGLike), torch.empty(0, 3, 16, 16), box=5, stride=4, feature=("0", 3))
    assert o.scores.shape == o.labels.shape == o.activation.shape == (0, 4, 4)
    assert o.heatmap().shape == (0, 16, 16) and len(o.clean) == 0 and len(o.targets) == 0


def test_repr_is_short():
    o = occlusion_map(network(VGGLike), pictures(2, (16, 16)), box=5, stride=4, feature=("0", 3))
    assert repr(o) == "Occlusion(2 images of 16 x 16, grid 4 x 4, activation, torch.float32, cpu)"


def test_the_same_bits_twice():
    model, images = network(InceptionLike), pictures(2, (29, 37))
    first, second = (occlusion_map(model, images, box=7, stride=5, feature=("stem", 1)) for _ in range(2))
    assert torch.equal(first.scores, second.scores) and torch.equal(first.activation, second.activation)
    assert torch.equal(first.heatmap(), second.heatmap())


def state(model):
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
    }


def same_state(a, b):
    values = a.pop("values"), b.pop("values")
    return a == b and all(torch.equal(x, values[1][name]) for name, x in values[0].items())


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_model_is_left_as_it_was(kind):
    torch.manual_seed(0)
    model = kind().train()
    next(model.children()).eval()  # a mixture of modes must come back as it was
    images = pictures(2, (16, 16))
    layer = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    before, generator = state(model), torch.get_rng_state()
    grad = torch.is_grad_enabled()
    occlusion_map(model, images, box=5, stride=4, feature=(layer, 0))
    assert same_state(before, state(model))
    assert torch.equal(torch.get_rng_state(), generator) and torch.is_grad_enabled() == grad


class Trap(nn.Module):
    """Passes its input on until it has been called `calls` times; then raises."""

    def __init__(self, calls):
        super().__init__()
        self.left = calls

    def forward(self, x):
        if x.isnan().any():  # which keeps the reader out, so that forwards are run
            return x
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("trapped")
        return x


@pytest.mark.parametrize("calls", [0, 1, 3])  # in the first clean forward, the second, on the grid
@pytest.mark.parametrize("where", range(len(VGGLike()) + 1))
def test_the_model_is_left_as_it_was_when_a_layer_raises(where, calls):
    torch.manual_seed(0)
    layers = list(VGGLike())
    layers.insert(where, Trap(calls))
    model = nn.Sequential(*layers).train()
    before, generator = state(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="trapped"):
        occlusion_map(model, pictures(2, (16, 16)), box=5, stride=4, batch_size=4, feature=("0", 1))
    assert same_state(before, state(model))
    assert torch.equal(torch.get_rng_state(), generator) and torch.is_grad_enabled()


def test_threads_that_share_a_model_do_not_disturb_each_other():
    torch.manual_seed(0)
    model = ResNetLike().train()
    jobs = [(pictures(2, (20, 24), seed=s), s % 8) for s in range(8)]
    want = [occlusion_map(model, x, box=6, stride=5, feature=("a", u), batch_size=4) for x, u in jobs]
    wrong, start = [], threading.Barrier(len(jobs))

    def work(index):
        images, unit = jobs[index]
        start.wait()
        for _ in range(6):
            o = occlusion_map(model, images, box=6, stride=5, feature=("a", unit), batch_size=4)
            if not (close(o.scores, want[index].scores) and close(o.activation, want[index].activation)):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_progress_counts_positions(monkeypatch):
    bars = []

    class Bar:
        disable = False

        def __init__(self, total, **options):
            self.total, self.done = total, 0
            bars.append(self)

        def update(self, count):
            self.done += count

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("zfcore.progress.Drawn", Bar)
    occlusion_map(network(VGGLike), pictures(2, (16, 16)), box=5, stride=4, batch_size=5, progress=True)
    occlusion_map(network(VGGLike), pictures(2, (16, 16)), box=5, stride=4)
    assert [(bar.total, bar.done) for bar in bars] == [(32, 32)]


def test_nothing_is_printed(capfd):
    occlusion_map(network(VGGLike), pictures(1, (16, 16)), box=5, stride=4)
    assert capfd.readouterr() == ("", "")


def test_batches_of_forwards_keep_to_the_cache(monkeypatch):
    """batch_size=None looks at the largest map, so a wide network gets a smaller batch."""
    monkeypatch.setattr("zfcore.occlusion.sweeps", lambda images: False)
    sizes = {}
    for width in (8, 256):
        seen = []
        model = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 4),
        )
        model.register_forward_pre_hook(lambda m, inputs, seen=seen: seen.append(len(inputs[0])))
        with pytest.warns(UserWarning, match="plain forwards"):
            occlusion_map(model, pictures(1, (48, 48)), box=8, stride=4)
        sizes[width] = max(seen)
    assert sizes[8] == 121  # all positions at once
    assert sizes[256] * 256 * 48 * 48 * 4 <= 20 * 2**20 < (sizes[256] + 1) * 256 * 48 * 48 * 4


def test_strict_reads_the_network():
    class Branches(VGGLike):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    images = pictures(1, (16, 16))
    want = occlusion_map(network(VGGLike), images, box=5, stride=4)
    assert torch.equal(
        occlusion_map(network(VGGLike), images, box=5, stride=4, strict=True).scores, want.scores
    )
    model = network(Branches).train()
    assert occlusion_map(model, images, box=5, stride=4, batch_size=1).scores.shape == (1, 4, 4)
    with pytest.raises(UnsupportedOperation):
        occlusion_map(model, images, box=5, stride=4, strict=True)
    assert model.training


def test_strict_reads_a_network_whose_feature_it_watches():
    model, images = network(VGGLike), pictures(1, (16, 16))
    free = occlusion_map(model, images, box=5, stride=4, feature=("0", 2))
    strict = occlusion_map(model, images, box=5, stride=4, feature=("0", 2), strict=True)
    assert torch.equal(free.activation, strict.activation)


IMAGES = pictures(2, (16, 16))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"model": lambda x: x}, DtypeError, "model: a function; expected a torch.nn.Module"),
        ({"images": [1, 2]}, DtypeError, "images: a list; expected a tensor"),
        ({"images": IMAGES.long()}, DtypeError, "images: torch.int64; expected a floating"),
        ({"images": IMAGES.to(torch.complex64)}, DtypeError, "images: torch.complex64"),
        ({"images": IMAGES[0, 0]}, ShapeError, r"images: shape \(16, 16\); expected"),
        ({"images": IMAGES[None]}, ShapeError, r"images: shape \(1, 2, 3, 16, 16\)"),
        ({"images": IMAGES[:, :, :0]}, ShapeError, r"images: shape \(2, 3, 0, 16\)"),
        ({"images": IMAGES.to("meta")}, DeviceError, "images: on the meta device"),
        ({"targets": CLASSES}, UnitNotFound, "targets: class 7; expected 0 to 6"),
        ({"targets": [0, 99]}, UnitNotFound, "targets: class 99"),
        ({"targets": -1}, UnitNotFound, "targets: -1; expected 0 or more"),
        ({"targets": [1, 2, 3]}, ShapeError, r"targets: shape \(3,\); expected one int or \(2,\)"),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, ShapeError, "targets: shape"),
        ({"targets": 1.5}, DtypeError, "targets: 1.5; expected an int"),
        ({"targets": True}, DtypeError, "targets: True"),
        ({"targets": "cat"}, DtypeError, "targets: 'cat'"),
        ({"box": 0}, ArgumentError, "box: 0; expected a whole number of at least 1"),
        ({"box": -3}, ArgumentError, "box: -3"),
        ({"box": (4, 0)}, ArgumentError, "box: 0"),
        ({"box": (4, 4, 4)}, ArgumentError, r"box: \(4, 4, 4\); expected a whole number or a pair"),
        ({"box": 2.5}, DtypeError, "box: 2.5"),
        ({"box": True}, DtypeError, "box: True"),
        ({"box": None}, DtypeError, "box: None"),
        ({"stride": 0}, ArgumentError, "stride: 0"),
        ({"stride": "4"}, DtypeError, "stride: '4'"),
        ({"batch_size": 0}, ArgumentError, "batch_size: 0"),
        ({"batch_size": 1.0}, DtypeError, "batch_size: 1.0"),
        ({"fill": "grey"}, DtypeError, "fill: 'grey'; expected a number or a tensor"),
        ({"fill": None}, DtypeError, "fill: None"),
        ({"fill": True}, DtypeError, "fill: torch.bool"),
        ({"fill": [1.0, 2.0]}, ShapeError, r"fill: shape \(2,\); expected a number, \(3,\), \(3, 16, 16\)"),
        ({"fill": torch.zeros(16, 16)}, ShapeError, "fill: shape"),
        ({"score": "loss"}, ArgumentError, "score: 'loss'; expected one of"),
        ({"score": None}, ArgumentError, "score: None"),
        (
            {"score": lambda out: out},
            ShapeError,
            r"score: the callable returned .*\(\d, 7\).*expected a tensor \(\d,\)",
        ),
        ({"score": lambda out: 3.0}, ShapeError, "score: the callable returned a float"),
        ({"precision": "fp8"}, ArgumentError, "precision: 'fp8'; expected one of"),
        ({"feature": "0"}, ArgumentError, r"feature: '0'; expected a pair \(layer, unit\)"),
        ({"feature": ("nowhere", 0)}, LayerNotFound, "nowhere"),
        ({"feature": (nn.ReLU(), 0)}, LayerNotFound, "ReLU"),
        ({"feature": ("0", 8)}, UnitNotFound, "feature: unit 8 of layer '0'; expected 0 to 7"),
        ({"feature": ("0", -1)}, UnitNotFound, "unit: -1"),
        ({"feature": ("0", 1.5)}, DtypeError, "unit: 1.5"),
        ({"feature": ("0", [1, 2, 3])}, ShapeError, "unit: shape"),
        ({"feature": ("1@4", 0)}, LayerNotFound, "'1@4' did not run"),
    ],
)
def test_errors_name_the_argument_its_value_and_what_was_expected(change, error, words):
    arguments = {"model": network(VGGLike), "images": IMAGES, "box": 5, "stride": 4, **change}
    with pytest.raises(error, match=words):
        occlusion_map(**arguments)


@pytest.mark.parametrize(
    "output, words",
    [
        (lambda y: (y, y), "the network returned a tuple of 2"),
        (lambda y: {"logits": y}, r"a dict with keys \['logits'\]"),
        (lambda y: y[:, 0], r"a torch.float32 tensor \(1,\) for 1 images"),
        (lambda y: y[:, :, None, None], r"tensor \(\d, 7, 1, 1\)"),
        (lambda y: y.argmax(1, keepdim=True), "torch.int64"),
        (lambda y: y.repeat(2, 1), r"tensor \(2, 7\) for 1 images"),
    ],
)
@pytest.mark.parametrize("score", ["probability", "logit"])
def test_outputs_that_are_no_table_of_classes_are_refused(score, output, words):
    class Odd(VGGLike):
        def forward(self, x):
            return output(super().forward(x))

    with pytest.raises(ArgumentError, match=words) as caught:
        occlusion_map(network(Odd), IMAGES, box=5, stride=4, score=score)
    assert f"score: '{score}'" in str(caught.value) and "pass a callable" in str(caught.value)


def test_a_feature_that_does_not_run_or_is_no_map():
    class Unused(VGGLike):
        def __init__(self):
            super().__init__()
            self.register_module("spare", nn.Identity())

        def forward(self, x):
            for module in list(self)[:-1]:
                x = module(x)
            return x

    with pytest.raises(LayerNotFound, match="feature: layer 'spare' did not run"):
        occlusion_map(network(Unused), IMAGES, box=5, stride=4, feature=("spare", 0))

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Wraps(VGGLike):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            x = self.pair(x)[0]
            for module in list(self)[:-1]:
                x = module(x)
            return x

    with pytest.raises(ShapeError, match="feature: layer 'pair' returned a tuple of 2"):
        occlusion_map(network(Wraps), IMAGES, box=5, stride=4, feature=("pair", 0))


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_rounded_products_of_a_float64_network_are_refused(precision):
    with pytest.raises(ArgumentError, match=f"precision: '{precision}' with float64"):
        occlusion_map(network(VGGLike).double(), IMAGES, precision=precision)


def test_probabilities_are_refused_behind_outputs_that_say_nothing():
    answers, each = Answers("probability", None, torch.zeros(4, 1)), torch.arange(4)
    answers.read(torch.empty(0, 3), each[:0], True)
    answers.read(torch.full((1, 3), torch.nan), each[:1], True)
    answers.read(torch.randn(1, 3).softmax(1), each[1:2], False)  # with a box
    with pytest.raises(ArgumentError, match="are probabilities already"):
        answers.read(torch.randn(2, 3).softmax(1), each[2:], True)


def test_tf32_is_exact_on_a_cpu():
    model, images = network(VGGLike), pictures(2, (16, 16))
    want = occlusion_map(model, images, box=5, stride=4)
    with use_backend("reference"):
        by_reference = occlusion_map(model, images, box=5, stride=4, precision="tf32")
    assert torch.equal(occlusion_map(model, images, box=5, stride=4, precision="tf32").scores, want.scores)
    assert close(by_reference.scores, want.scores)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    model, images = network(VGGLike), pictures(2, (29, 37))
    want = occlusion_map(model, images, box=(7, 9), stride=(5, 4), feature=("0", 3))
    model.cuda()
    from_host = occlusion_map(model, images, box=(7, 9), stride=(5, 4))
    o = occlusion_map(model, images.cuda(), box=(7, 9), stride=(5, 4), feature=("0", 3), progress=True)
    assert torch.equal(from_host.scores, o.scores)
    assert o.scores.is_cuda and o.boxes.is_cuda and o.heatmap().is_cuda
    assert close(o.scores.cpu(), want.scores) and close(o.activation.cpu(), want.activation)
    assert torch.equal(o.labels.cpu(), want.labels)
