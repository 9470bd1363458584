"""The command's arguments."""

import argparse
from collections.abc import Callable

import zfcore
from zfcore import models
from zfcore.console.arguments import Parser, numbers, pair, positive, shown, whole
from zfcore.data.images import MAX_PIXELS
from zfcore.ops.conv_delta import PRECISIONS

__all__ = ["DEFAULT_SIDE", "make_parser"]

DEFAULT_MODEL = "zfnet_small_fashion"
DEFAULT_SIDE = 224  # for networks that do not say what they expect


def make_parser(runs: dict[str, Callable]) -> argparse.ArgumentParser:
    """The parser. runs: what each command calls with its options."""
    parser = Parser(
        prog="zfcore",
        description="Show what a convolutional network saw in pictures: deconvnet projections of its units, "
        "and how a box moved over a picture changes its answer.",
        epilog="example:\n  zfcore demo --out demo\n\nexit codes:\n  0 all went well; 1 some inputs failed; "
        "2 wrong arguments; 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"zfcore {zfcore.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=runs[name], mode=name)
        return sub

    project = command(
        "project",
        "project the strongest units of each layer back to pixels",
        "zfcore project shoes/ hat.jpg --layer conv3 --top 6 --out projections\n  "
        "zfcore project cat.jpg --model torchvision.models:vgg16 --weights vgg16.pth --layer features.28",
    )
    _add_inputs(project)
    _add_model(project)
    _add_projection(project)
    project.set_defaults(score="probability")
    _add_running(project, "zfcore-projections")

    occlude = command(
        "occlude",
        "move a box over each picture and map how the answer changes",
        "zfcore occlude shoe.png --box 6 --stride 2 --out occlusion\n  "
        "zfcore occlude dog.jpg --model torchvision.models:alexnet --weights alexnet.pth --target 207",
    )
    _add_inputs(occlude)
    _add_model(occlude)
    _add_occlusion(occlude)
    _add_running(occlude, "zfcore-occlusion")

    demo = command(
        "demo",
        "project and occlude pictures that ship with the package, by the network that ships with it",
        "zfcore demo --out demo",
    )
    demo.add_argument(
        "--pictures",
        type=positive,
        default=10,
        metavar="N",
        help="how many of the 100 (default: one a class)",
    )
    demo.set_defaults(
        model=DEFAULT_MODEL,
        weights=None,
        input_size=None,
        channels=None,
        mean=None,
        std=None,
        classes=None,
        layer=[],
        unit=[],
        top=9,
        rule="deconvnet",
        box=None,
        stride=None,
        fill="mean",
        target=None,
        score="probability",
        precision="exact",
        max_pixels=None,
    )
    _add_running(demo, "zfcore-demo")

    commands.add_parser("train", help="train the small network on Fashion-MNIST (zfcore train --help)", add_help=False)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, or folders of them")
    parser.add_argument(
        "--max-pixels", type=positive, metavar="N", help="refuse larger pictures unread (default: 2^26)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("network").add_argument
    add(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help=f"{', '.join(models.names())}, or package.module:factory, also of this folder (default: {DEFAULT_MODEL})",
    )
    add("--weights", metavar="FILE", help=".safetensors, or a .pth of plain tensors")
    add("--input-size", type=_size, metavar="HxW", help=f"its pictures (default: its own, or {DEFAULT_SIDE})")
    add("--channels", type=whole(), choices=(1, 3), help="of its pictures (default: its first convolution's)")
    add(
        "--mean",
        type=numbers,
        metavar="R,G,B",
        help="subtracted from pixels in 0..1 (default: its own, or ImageNet's for colour)",
    )
    add("--std", type=numbers, metavar="R,G,B", help="then divided by")
    add("--classes", metavar="FILE", help="the classes' names, one a line, that of class 0 first")


def _add_projection(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("projection").add_argument
    add(
        "--layer",
        type=_layer,
        action="append",
        default=[],
        metavar="NAME",
        help="a layer's dotted name; give it again for more (default: every convolution)",
    )
    add("--unit", type=whole(), action="append", default=[], metavar="I", help="a unit; give it again for more")
    add("--top", type=positive, default=9, metavar="K", help="else the K strongest units (default: 9)")
    add(
        "--rule",
        choices=("deconvnet", "guided", "gradient"),
        default="deconvnet",
        help="how ReLUs are passed",
    )


def _add_occlusion(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("occlusion").add_argument
    add("--box", type=pair, metavar="HxW", help="pixels (default: a quarter of the shorter side)")
    add("--stride", type=pair, metavar="HxW", help="pixels (default: a 28th of the shorter side)")
    add(
        "--fill",
        default="mean",
        metavar="COLOUR",
        help="mean, grey, black, white, or numbers in 0..1: one, or one a channel (default: mean)",
    )
    add("--target", metavar="CLASS", help="a class's index or name (default: each picture's own top class)")
    add("--score", choices=("probability", "logit"), default="probability")
    add(
        "--layer",
        type=_layer,
        action="append",
        default=[],
        metavar="NAME",
        help="also map the total activation of this layer's strongest map (default: the last convolution, rectified)",
    )
    add("--unit", type=whole(), action="append", default=[], metavar="I", help="that unit's map instead")
    add("--precision", choices=PRECISIONS, default="exact")


def _add_running(parser: argparse.ArgumentParser, out: str) -> None:
    add = parser.add_argument_group("running").add_argument
    add("--out", default=out, metavar="DIR", help=f"where figures and index.html go (default: {out})")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--batch-size", type=positive, metavar="N", help="of the forwards (default: by memory)")
    add("--no-progress", action="store_true", help="draw no progress bar")
    add("--json", action="store_true", help="print the results as JSON")
    add("--traceback", action="store_true", help="show where in the program an error arose")


def _layer(text: str) -> str:
    _, at, call = text.rpartition("@")
    if at and call.isdecimal():
        whole()(call)  # "conv1@0", the number of a call
    return text


def _size(text: str) -> tuple[int, int]:
    height, width = pair(text)
    if height * width > MAX_PIXELS:
        raise argparse.ArgumentTypeError(f"{shown(text)}; expected at most {MAX_PIXELS} pixels")
    return height, width
