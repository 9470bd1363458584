"""The networks of `zoo.py`: image classifiers, segmentation and pose networks that people use, by library and family.

None of the libraries is needed to read this file: a network's is imported when the network is made. Weights are random,
nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

Shape = tuple[int, int, int]


class Network(NamedTuple):
    """library: a row of the table of `zoo.py`. shape: (C, H, W) of its images. make: a new one, of random weights."""

    library: str
    family: str
    name: str
    shape: Shape
    make: Callable[[], nn.Module]

    @property
    def key(self) -> str:
        return f"{self.library}/{self.family}/{self.name}"


_declared: list[torch.library.Library] = []  # kept, since what a library defines goes with it


def library(module: str) -> object:
    """A module by its name, also one that imports a torchvision whose compiled part is of another build of torch.

    Such an import names two operators of that part, which only detectors run; they are declared in its place.
    """
    torchvision = importlib.util.find_spec("torchvision")
    if torchvision is not None and "torchvision" not in sys.modules and not _declared:
        try:
            for compiled in Path(torchvision.submodule_search_locations[0]).glob("_C*.so"):
                torch.ops.load_library(str(compiled))
        except OSError:
            declared = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(declared)
    return importlib.import_module(module)


def listed(table: str, size: int) -> Iterator[tuple[str, str, int]]:
    """Families, names and sides in pixels of a table: "family: name name@side", a line that is indented goes on."""
    family = ""
    for line in filter(None, table.splitlines()):
        if not line[0].isspace():
            family, _, line = line.partition(":")
        for entry in line.split():
            name, _, side = entry.partition("@")
            yield family, name, int(side or size)


# ---- torchvision

TORCHVISION = """
alexnet: alexnet
vgg: vgg11 vgg16_bn
resnet: resnet18 resnet50
resnext: resnext50_32x4d
wide_resnet: wide_resnet50_2
densenet: densenet121
inception: inception_v3@299 inception_v3_noaux@299 inception_v3_transform@299
googlenet: googlenet googlenet_noaux
squeezenet: squeezenet1_0 squeezenet1_1
mobilenet_v2: mobilenet_v2
mobilenet_v3: mobilenet_v3_small mobilenet_v3_large
shufflenet: shufflenet_v2_x0_5 shufflenet_v2_x1_0
mnasnet: mnasnet0_5 mnasnet1_0
efficientnet: efficientnet_b0
efficientnet_v2: efficientnet_v2_s
regnet: regnet_x_400mf regnet_y_400mf
convnext: convnext_tiny
maxvit: maxvit_t
swin: swin_t swin_v2_t
vit: vit_b_32
"""
TORCHVISION_SEGMENTATION = """
fcn: fcn_resnet50
deeplabv3: deeplabv3_resnet50 deeplabv3_mobilenet_v3_large
lraspp: lraspp_mobilenet_v3_large
"""
# What follows a name of torchvision's, and what it asks for: "_transform" is how its pretrained weights come.
VARIANTS = {"_noaux": {"aux_logits": False}, "_transform": {"aux_logits": False, "transform_input": True}}

def torchvision_classifier(name: str) -> nn.Module:
    options = {}
    for suffix, own in VARIANTS.items():
        if name.endswith(suffix):
            name, options = name.removesuffix(suffix), dict(own)
    if name in ("inception_v3", "googlenet"):  # whose own initial weights take long to draw
        options["init_weights"] = False
    return getattr(library("torchvision.models"), name)(weights=None, **options)


def torchvision_segmentation(name: str) -> nn.Module:
    models = library("torchvision.models.segmentation")
    return getattr(models, name)(weights=None, weights_backbone=None, num_classes=21)


# ---- timm

TIMM = """
byoanet: botnet26t_256@256 lambda_resnet26t@256 halonet26t@256
byobnet: repvgg_a0 gernet_s mobileone_s0 resnext26ts@256 gcresnext26ts@256 seresnext26ts@256 eca_resnext26ts@256
    regnetz_b16
convmixer: convmixer_1024_20_ks9_p14
convnext: convnext_atto convnextv2_atto convnext_zepto_rms
cspnet: cspresnet50@256 cspdarknet53@256 darknet53@256
cspnext: cspnext_tiny
densenet: densenet121 densenetblur121d
dla: dla34 dla46_c
dpn: dpn48b
edgenext: edgenext_xx_small@256
efficientformer: efficientformer_l1
efficientformer_v2: efficientformerv2_s0
efficientnet: efficientnet_b0 tf_efficientnet_b0 efficientnet_es efficientnet_lite0 tf_efficientnetv2_b0@192
    mixnet_s mnasnet_small semnasnet_050 mobilenetv2_050 fbnetc_100 spnasnet_100 tinynet_e@106 mobilenetv1_100
    efficientnet_b0_gn efficientnet_b0_g16_evos efficientnet_cc_b0_4e
efficientvit_mit: efficientvit_b0
efficientvit_msra: efficientvit_m0
fasternet: fasternet_t0
fastvit: fastvit_t8@256
focalnet: focalnet_tiny_srf
ghostnet: ghostnet_050 ghostnetv2_100 ghostnetv3_050
hardcorenas: hardcorenas_a
hgnet: hgnet_tiny hgnetv2_b0
hrnet: hrnet_w18_small
iformer: iformer_t
inception_next: inception_next_atto
inception_resnet_v2: inception_resnet_v2@299
inception_v3: inception_v3@299
inception_v4: inception_v4@299
lcnetv2: lcnetv2_base
lowformer: lowformer_b0
mambaout: mambaout_femto
maxxvit: coatnet_pico_rw_224 maxvit_rmlp_pico_rw_256@256 coatnext_nano_rw_224
metaformer: poolformer_s12 convformer_s18 caformer_s18 poolformerv2_s12
mobilenetv3: mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium@256 lcnet_050 fbnetv3_b
mobilenetv5: mobilenetv5_base@256
mobilevit: mobilevit_xxs@256 mobilevitv2_050@256
nextvit: nextvit_small
nfnet: nf_resnet26 nf_regnet_b0@192 eca_nfnet_l0 nf_ecaresnet26 dm_nfnet_f0@192
rdnet: rdnet_tiny
regnet: regnetx_002 regnety_002 regnetz_005 regnetv_040
repghost: repghostnet_050
repvit: repvit_m0_9
res2net: res2net50_14w_8s res2next50
resnest: resnest14d
resnet: resnet18 resnet26t@256 resnet50 seresnet18 ecaresnet26t@256 resnet50_gn resnetblur18 resnetaa34d
    resnet14t@176 resnetrs50@160 ecaresnetlight resnext50_32x4d wide_resnet50_2
resnetv2: resnetv2_18 resnetv2_50x1_bit resnetv2_50d_gn resnetv2_50d_evos resnetv2_50d_frn
rexnet: rexnet_100 rexnetr_100
selecsls: selecsls42
senet: legacy_seresnet18 legacy_seresnext26_32x4d
sknet: skresnet18
shvit: shvit_s1
starnet: starnet_s1
swiftformer: swiftformer_xs
tresnet: tresnet_m
vgg: vgg11 vgg11_bn
vovnet: vovnet39a ese_vovnet19b_dw
xception_aligned: xception41@299 xception41p@299
csatv2: csatv2@512
efficientvim: efficientvim_m1
tiny_vit: tiny_vit_5m_224
visformer: visformer_tiny
levit: levit_128s
pvt_v2: pvt_v2_b0
swin_transformer: swin_tiny_patch4_window7_224
vision_transformer: vit_tiny_patch16_224
deit: deit_tiny_patch16_224
mlp_mixer: mixer_s32_224 resmlp_12_224 gmlp_ti16_224
coat: coat_tiny
xcit: xcit_nano_12_p16_224
pit: pit_ti_224
twins: twins_svt_small
convit: convit_tiny
crossvit: crossvit_tiny_240@240
nest: nest_tiny
mvitv2: mvitv2_tiny
davit: davit_tiny
gcvit: gcvit_xxtiny
volo: volo_d1_224
nasnet: nasnetalarge@331
pnasnet: pnasnet5large@331
"""


def timm(name: str) -> nn.Module:
    return library("timm").create_model(name, pretrained=False)


# ---- pytorchcv

PYTORCHCV = """
resnet: resnet10
preresnet: preresnet10
resnext: resnext14_16x4d
seresnet: seresnet10
sepreresnet: sepreresnet10
seresnext: seresnext50_32x4d
senet: senet16
resnesta: resnestabc14
ibnresnet: ibn_resnet50
ibnbresnet: ibnb_resnet50
ibnresnext: ibn_resnext50_32x4d
ibndensenet: ibn_densenet121
airnet: airnet50_1x64d_r16
airnext: airnext50_32x4d_r2
bamresnet: bam_resnet18
cbamresnet: cbam_resnet18
resattnet: resattnet56
sknet: sknet50
scnet: scnet50
regnet: regnetx002 regnety002
diaresnet: diaresnet10
diapreresnet: diapreresnet10
diracnetv2: diracnet18v2
sharesnet: sharesnet18
densenet: densenet121
condensenet: condensenet74_c8_g8
sparsenet: sparsenet121
peleenet: peleenet
wrn: wrn50_2
drn: drnc26 drnd22
dpn: dpn68
darknet: darknet_ref darknet_tiny darknet19
darknet53: darknet53
channelnet: channelnet
revnet: revnet38
irevnet: irevnet301
bagnet: bagnet9
dla: dla46c dla34
msdnet: msdnet22
fishnet: fishnet99
espnetv2: espnetv2_wd2
dicenet: dicenet_wd5
hrnet: hrnet_w18_small_v1
vovnet: vovnet27s
selecsls: selecsls42
hardnet: hardnet39ds hardnet68
xdensenet: xdensenet121_2
squeezenet: squeezenet_v1_1 squeezeresnet_v1_1
squeezenext: sqnxt23_w1
shufflenet: shufflenet_g3_wd4
shufflenetv2: shufflenetv2_wd2
shufflenetv2b: shufflenetv2b_wd2
menet: menet108_8x1_g3
mobilenet: mobilenet_wd4
mobilenetb: mobilenetb_wd4
fdmobilenet: fdmobilenet_wd4
mobilenetv2: mobilenetv2_wd4
mobilenetv3: mobilenetv3_small_w7d20
igcv3: igcv3_wd4
ghostnet: ghostnet
mnasnet: mnasnet_b1 mnasnet_a1
darts: darts
proxylessnas: proxylessnas_cpu
fbnet: fbnet_cb
xception: xception@299
inceptionv3: inceptionv3@299
inceptionv4: inceptionv4@299
inceptionresnetv1: inceptionresnetv1@299
inceptionresnetv2: inceptionresnetv2@299
spnasnet: spnasnet
efficientnet: efficientnet_b0 efficientnet_b0b
efficientnetedge: efficientnet_edge_small_b
mixnet: mixnet_s
alexnet: alexnet
vgg: vgg11 bn_vgg11
zfnet: zfnet
isqrtcovresnet: isqrtcovresnet18
resneta: resneta10
resnetd: resnetd50b
octresnet: octresnet10_ad2
tresnet: tresnet_m
polynet: polynet@299
nin_cifar: nin_cifar10@32
resnet_cifar: resnet20_cifar10@32
preresnet_cifar: preresnet20_cifar10@32
resnext_cifar: resnext20_16x4d_cifar10@32
seresnet_cifar: seresnet20_cifar10@32
sepreresnet_cifar: sepreresnet20_cifar10@32
pyramidnet_cifar: pyramidnet110_a48_cifar10@32
densenet_cifar: densenet40_k12_cifar10@32
xdensenet_cifar: xdensenet40_2_k24_bc_cifar10@32
wrn_cifar: wrn16_10_cifar10@32
wrn1bit_cifar: wrn20_10_1bit_cifar10@32
ror_cifar: ror3_56_cifar10@32
rir_cifar: rir_cifar10@32
msdnet_cifar10: msdnet22_cifar10@32
resdropresnet_cifar: resdropresnet20_cifar10@32
shakeshakeresnet_cifar: shakeshakeresnet20_2x16d_cifar10@32
shakedropresnet_cifar: shakedropresnet20_cifar10@32
fractalnet_cifar: fractalnet_cifar10@32
diaresnet_cifar: diaresnet20_cifar10@32
diapreresnet_cifar: diapreresnet20_cifar10@32
ntsnet_cub: ntsnet_cub
"""
PYTORCHCV_SEGMENTATION = """
fcn8sd: fcn8sd_resnetd50b_voc
pspnet: pspnet_resnetd50b_voc
deeplabv3: deeplabv3_resnetd50b_voc
fastscnn: fastscnn_cityscapes
cgnet: cgnet_cityscapes
dabnet: dabnet_cityscapes
sinet: sinet_cityscapes
bisenet: bisenet_resnet18_celebamaskhq
fpenet: fpenet_cityscapes
contextnet: ctxnet_cityscapes
lednet: lednet_cityscapes
esnet: esnet_cityscapes
edanet: edanet_cityscapes
enet: enet_cityscapes
erfnet: erfnet_cityscapes
linknet: linknet_cityscapes
segnet: segnet_cityscapes
unet: unet_cityscapes
sqnet: sqnet_cityscapes
simplepose_coco: simplepose_resnet18_coco
simpleposemobile_coco: simplepose_mobile_resnet18_coco
centernet: centernet_resnet18_voc
"""


def pytorchcv(name: str, **options: object) -> nn.Module:
    return library("pytorchcv.model_provider").get_model(name, pretrained=False, **options)


# ---- libraries of few networks

SMP_DECODERS = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer".split()


def smp(decoder: str, encoder: str) -> nn.Module:
    models = library("segmentation_models_pytorch")
    return getattr(models, decoder)(encoder, encoder_weights=None, classes=5)


IN_OUT = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
LEVELS = {"channels": (16, 32, 64), "strides": (2, 2)}
MONAI: dict[str, tuple[str, dict[str, object]]] = {
    "DenseNet121": ("DenseNet121", {"spatial_dims": 2, "in_channels": 1, "out_channels": 4}),
    "SEResNet50": ("SEResNet50", {"spatial_dims": 2, "in_channels": 1, "num_classes": 4}),
    "resnet18": ("resnet18", {"spatial_dims": 2, "n_input_channels": 1, "num_classes": 4}),
    "EfficientNetBN": (
        "EfficientNetBN",
        {"model_name": "efficientnet-b0", "spatial_dims": 2, "in_channels": 1, "num_classes": 4, "pretrained": False},
    ),
    "UNet": ("UNet", {**IN_OUT, **LEVELS, "num_res_units": 2}),
    "UNet_batchnorm_relu": ("UNet", {**IN_OUT, **LEVELS, "num_res_units": 2, "norm": "batch", "act": "relu"}),
    "BasicUNet": ("BasicUNet", {**IN_OUT, "features": (16, 16, 32, 64, 64, 16)}),
    "SegResNet": ("SegResNet", {**IN_OUT, "init_filters": 8}),
    "AttentionUnet": ("AttentionUnet", {**IN_OUT, **LEVELS}),
    "HighResNet": ("HighResNet", IN_OUT),
    "DynUNet": (
        "DynUNet", {**IN_OUT, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    ),
    "Classifier": ("Classifier", {"in_shape": (1, 64, 64), "classes": 4, "channels": (8, 16), "strides": (2, 2)}),
    "Discriminator": ("Discriminator", {"in_shape": (1, 64, 64), "channels": (8, 16), "strides": (2, 2)}),
    "VNet": ("VNet", IN_OUT),
}  # fmt: skip


def monai(name: str) -> nn.Module:
    kind, options = MONAI[name]
    return getattr(library("monai.networks.nets"), kind)(**options)


VIT = {"hidden_size": 192, "num_attention_heads": 3}
CONVNEXT = {"depths": [1, 1, 2, 1], "hidden_sizes": [40, 80, 160, 320]}
FOUR = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
REGNET = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 2, 1], "groups_width": 16}
TRANSFORMERS: dict[str, dict[str, object]] = {
    "ResNet": {"embedding_size": 32, "layer_type": "basic", **FOUR},
    "ConvNext": CONVNEXT,
    "ConvNextV2": CONVNEXT,
    "MobileNetV1": {},
    "MobileNetV2": {},
    "RegNet": REGNET,
    "EfficientNet": {"width_coefficient": 1.0, "depth_coefficient": 1.0},
    "Bit": FOUR,
    "PoolFormer": {},
    "Swin": {},
    "ViT": {**VIT, "intermediate_size": 384, "num_hidden_layers": 4},
    "Levit": {},
    "MobileViT": {},
    "PvtV2": {},
    "Dinov2": {**VIT, "num_hidden_layers": 4},
}


def transformers(name: str) -> nn.Module:
    models = library("transformers")
    return getattr(models, f"{name}ForImageClassification")(getattr(models, f"{name}Config")(**TRANSFORMERS[name]))


def efficientnet_pytorch(name: str) -> nn.Module:
    return library("efficientnet_pytorch").EfficientNet.from_name(name)


FACENET = """
inception_resnet_v1: InceptionResnetV1@160
mtcnn: PNet@48 RNet@24 ONet@48
"""


def facenet(name: str) -> nn.Module:
    models = library("facenet_pytorch")
    if name == "InceptionResnetV1":
        return models.InceptionResnetV1(pretrained=None, classify=True, num_classes=100)
    return getattr(library("facenet_pytorch.models.mtcnn"), name)(pretrained=False)


# ---- what people write by hand: LeNet, and small networks with one operation each that is not in every network


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        functional = nn.functional
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = torch.flatten(functional.max_pool2d(functional.relu(self.conv2(x)), 2), 1)
        return self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(x)))))


ONE_OPERATION: dict[str, Callable[[], nn.Module]] = {
    "groupnorm": lambda: nn.GroupNorm(4, 16),
    "instancenorm": lambda: nn.InstanceNorm2d(16, affine=True),
    "prelu": lambda: nn.PReLU(16),
    "rrelu": nn.RReLU,
    "pixelshuffle": lambda: nn.Sequential(nn.Conv2d(16, 64, 1), nn.PixelShuffle(2)),
    "upsample": lambda: nn.Upsample(scale_factor=2),
    "convtranspose": lambda: nn.ConvTranspose2d(16, 16, 2, 2),
    "reflectpad": lambda: nn.ReflectionPad2d(1),
    "convreflect": lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
    "lppool": lambda: nn.LPPool2d(2, 2),
    "channelshuffle": lambda: nn.ChannelShuffle(4),
    "relu": nn.ReLU,
    "glu": lambda: nn.Sequential(nn.Conv2d(16, 32, 1), nn.GLU(1)),
    "maxpool_bigwin": lambda: nn.MaxPool2d(16, 1),
    "unfold": lambda: nn.Sequential(nn.Unfold(2, stride=2), nn.Unflatten(2, (16, 16)), nn.Conv2d(64, 16, 1)),
    "fractional": lambda: nn.FractionalMaxPool2d(2, output_ratio=0.5),
    "bilinear_upsample": lambda: nn.UpsamplingBilinear2d(scale_factor=2),
    "constantpad": lambda: nn.ConstantPad2d(1, 0.0),
    "hardshrink": nn.Hardshrink,
    "tanhshrink": nn.Tanhshrink,
    "softmin": lambda: nn.Softmin(1),
}


def with_one(operation: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), ONE_OPERATION[operation](), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


# ---- all of them


def _from_table(
    library: str, table: str, make: Callable[[str], nn.Module], size: int = 224
) -> Iterator[Network]:
    for family, name, side in listed(table, size):
        yield Network(library, family, name, (3, side, side), partial(make, name))


def _all() -> Iterator[Network]:
    yield from _from_table("torchvision", TORCHVISION, torchvision_classifier)
    yield from _from_table("torchvision segmentation", TORCHVISION_SEGMENTATION, torchvision_segmentation, 128)
    yield from _from_table("timm", TIMM, timm)
    yield from _from_table("pytorchcv", PYTORCHCV, pytorchcv)
    small = partial(pytorchcv, in_size=(128, 128))
    yield from _from_table("pytorchcv segmentation", PYTORCHCV_SEGMENTATION, small, 128)
    yield Network(
        "pytorchcv segmentation", "superpointnet", "superpointnet", (1, 128, 128), partial(pytorchcv, "superpointnet")
    )
    for decoder in SMP_DECODERS:
        yield Network("smp", decoder, f"{decoder}-resnet18", (3, 128, 128), partial(smp, decoder, "resnet18"))
    yield Network("smp", "Unet", "Unet-mobilenet_v2", (3, 128, 128), partial(smp, "Unet", "mobilenet_v2"))
    for name in MONAI:
        yield Network("monai", name, name, (1, 64, 64), partial(monai, name))
    for name in TRANSFORMERS:
        yield Network("transformers", name, name, (3, 224, 224), partial(transformers, name))
    name = "efficientnet-b0"
    yield Network("efficientnet_pytorch", "efficientnet", name, (3, 224, 224), partial(efficientnet_pytorch, name))
    yield from _from_table("facenet_pytorch", FACENET, facenet)
    yield Network("hand-written", "lenet", "LeNet", (1, 28, 28), LeNet)
    for operation in ONE_OPERATION:
        yield Network("hand-written", operation, f"cnn+{operation}", (3, 32, 32), partial(with_one, operation))


NETWORKS = tuple(_all())
