"""The command: exit codes, one-line errors with the nearest names, bad files listed, results on disk."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import COARSE, NET, TINY, document, failures, picture, run
from PIL import Image

import zfcore
from zfcore import cli, models
from zfcore.cli import records
from zfcore.data import sample_images
from zfcore.errors import ArgumentError
from zfcore.report import analysis
from zfcore.report.files import OutputFolder

pytestmark = pytest.mark.usefixtures("networks")


# ---- what it makes ---------------------------------------------------------------------------------------


def test_project(capsys):
    paths = [picture(f"{name}.png", seed) for seed, name in enumerate("ab")]
    assert run("project", *paths, *TINY, "--top", 3, "--out", "out") == 0
    printed = capsys.readouterr()
    assert printed.out == "2 pictures, 2 figures: out/index.html\n" and printed.err == ""
    assert sorted(os.listdir("out")) == [
        "0001-a-project.png", "0002-b-project.png", "errors.jsonl", "index.html", "results.json",
    ]  # fmt: skip
    made = document("out")
    assert [result["path"] for result in made["results"]] == paths and made["failures"] == failures(
        "out"
    ) == []
    layers = made["results"][0]["layers"]
    assert [layer["layer"] for layer in layers] == ["0", "3"]  # every convolution, in the forward's order
    for layer in layers:
        activations = [unit["activation"] for unit in layer["units"]]
        assert (
            len(activations) <= 3 and activations == sorted(activations, reverse=True) and activations[-1] > 0
        )
    page = open("out/index.html").read()
    assert page.count("data:image/png;base64,") == 2
    for words in (
        made["settings"]["weights SHA-256"],
        torch.__version__,
        "project a.png b.png",
        "rule deconvnet",
    ):
        assert words in page


def test_project_says_what_deconv_project_says(capsys):
    path = picture("a.png")
    assert run("project", path, *TINY, "--layer", "3", "--unit", 4, "--unit", 1, "--out", "out") == 0
    units = document("out")["results"][0]["layers"][0]["units"]
    assert [unit["unit"] for unit in units] == [4, 1]
    model = models.create(f"{NET}:tiny")
    image = torch.from_numpy(np.asarray(Image.open(path), dtype=np.float32) / 255)[None, None]
    with torch.no_grad():
        maps = model[:4](image)[0]
    assert [unit["activation"] for unit in units] == pytest.approx(
        [maps[4].max().item(), maps[1].max().item()]
    )


def test_occlude(capsys):
    path = picture("a.png")
    assert run("occlude", path, *TINY, *COARSE, "--target", 2, "--fill", "0.5", "--out", "out") == 0
    made = document("out")["results"][0]["occlusion"]
    assert made["grid"] == [3, 3] and made["target"] == 2 and made["feature"]["layer"] == "4"
    image = torch.from_numpy(np.asarray(Image.open(path), dtype=np.float32) / 255)[None, None]
    model = models.create(f"{NET}:tiny")
    with torch.no_grad():
        assert made["clean"] == pytest.approx(model(image).softmax(1)[0, 2].item())
        image[:, :, 6:12, 3:9] = 0.5
        assert made["scores"][2][1] == pytest.approx(model(image).softmax(1)[0, 2].item(), rel=1e-5)
    assert sorted(os.listdir("out"))[0] == "0001-a-occlude.png"


def test_occlude_of_classes_with_names(capsys):
    with open("names.txt", "w") as file:
        file.write("cat\ndog\nShoe <b>\nhat\nbag\n\n")
    path = picture("a.png")
    options = (*TINY, *COARSE, "--classes", "names.txt", "--out", "out")
    assert run("occlude", path, *options, "--target", "SHOE <b>") == 0
    assert document("out")["results"][0]["occlusion"]["target"] == 2
    page = open("out/index.html").read()
    assert "Shoe &lt;b&gt;" in page and "Shoe <b>" not in page
    assert run("occlude", path, *options, "--target", "doq") == 2
    assert "target: 'doq'; expected a class's index or name; nearest: dog" in capsys.readouterr().err


def test_colour_networks_get_colour_pictures_and_imagenets_mean(capsys):
    path = picture("a.png", size=(20, 30, 3))
    options = ("--model", f"{NET}:colour", "--input-size", "12x16", "--no-progress", "--device", "cpu")
    assert run("project", path, *options, "--top", 2, "--out", "out") == 0
    settings = document("out")["settings"]
    assert settings["pictures"].startswith("3 × 12 × 16, (pixels - (0.485, 0.456, 0.406))")
    assert (
        run("occlude", path, *options, *COARSE, "--mean", "0.5", "--std", "0.2,0.2,0.3", "--out", "out") == 0
    )
    assert "(0.5, 0.5, 0.5)) / (0.2, 0.2, 0.3)" in document("out")["settings"]["pictures"]
    for precision in ("bf16", "tf32"):
        narrow = ("--fill", "1,0,0.25", "--precision", precision, "--out", precision)
        assert run("occlude", path, *options, *COARSE, *narrow) == 0
        assert document(precision)["settings"]["occlusion"].endswith(f"precision {precision}")


def test_weights_are_loaded_and_hashed(capsys):
    path = picture("a.png")
    assert run("project", path, *TINY, "--out", "one") == 0
    model = models.create(f"{NET}:tiny")
    with torch.no_grad():
        model[0].weight.mul_(2)
    models.save_weights(model, "weights.safetensors")
    assert run("project", path, *TINY, "--weights", "weights.safetensors", "--out", "two") == 0
    one, two = (document(out)["settings"]["weights SHA-256"] for out in ("one", "two"))
    assert len(one) == 64 and one != two


def test_networks_of_other_dtypes(capsys):
    path = picture("a.png")
    options = ("--model", f"{NET}:narrow", "--input-size", 12, "--no-progress", "--out", "out")
    assert run("occlude", path, *options, *COARSE) == 0 and run("project", path, *options) == 0


def test_networks_without_convolutions_can_be_occluded(capsys):
    path = picture("a.png")
    options = (
        "--model",
        f"{NET}:dense",
        "--channels",
        1,
        "--input-size",
        12,
        "--no-progress",
        "--out",
        "out",
    )
    assert run("occlude", path, *options, *COARSE) == 0
    assert "feature" not in document("out")["results"][0]["occlusion"]
    assert run("project", path, *options) == 2
    assert "runs no nn.Conv2d; name the layers with --layer" in capsys.readouterr().err


@pytest.mark.parametrize("factory", ["probabilities", "sigmoid"])
def test_probabilities_that_a_network_gives_itself_are_shown_as_they_are(capsys, factory):
    path = picture("a.png")
    options = ("--model", f"{NET}:{factory}", "--input-size", 12, "--no-progress", "--out", "out")
    assert run("project", path, *options) == 0
    image = torch.from_numpy(np.asarray(Image.open(path), dtype=np.float32) / 255)[None, None]
    with torch.no_grad():
        given = models.create(f"{NET}:{factory}")(image)[0]
    shown = {c["index"]: c["probability"] for c in document("out")["results"][0]["classes"]}
    assert [shown[i] for i in range(5)] == pytest.approx(given.tolist(), rel=1e-5)


def test_what_falls_back_is_noted_in_one_line(capsys):
    path = picture("a.png")
    options = ("--model", f"{NET}:Branches", "--input-size", 12, "--no-progress", "--out", "out")
    assert run("project", path, *options) == 0
    error = capsys.readouterr().err
    assert error.startswith("zfcore: note: ") and "Branches" in error and error.count("\n") == 1


def test_json_is_the_results_file(capsys):
    picture("a.png")
    assert run("project", "a.png", "missing.png", *TINY, "--json", "--out", "out") == 1
    printed = capsys.readouterr()
    made = json.loads(printed.out)
    assert [result["path"] for result in made["results"]] == ["a.png"]
    assert made["failures"][0]["path"] == "missing.png" and made["failures"][0]["error"] == "ImageError"
    on_disk = document("out")
    assert on_disk["results"] == made["results"] and on_disk["failures"] == made["failures"]


def test_numbers_that_are_not_finite_are_null_in_json():
    text = records.as_json({"a": [float("nan"), 1.5, (float("inf"),)], "b": {"c": -float("inf")}})
    assert json.loads(text) == {"a": [None, 1.5, [None]], "b": {"c": None}}


def test_progress_is_drawn_on_stderr_and_can_be_left_out(capsys):
    picture("a.png")
    picture("b.png")
    shown = [option for option in TINY if option != "--no-progress"]
    assert run("project", "a.png", "b.png", *shown, "--out", "out") == 0
    printed = capsys.readouterr()
    assert "2/2" in printed.err and printed.out.startswith("2 pictures")
    assert run("occlude", "a.png", *shown, *COARSE, "--out", "out") == 0
    assert "9/9" in capsys.readouterr().err  # positions, where there is one picture


def test_figures_past_the_budget_are_linked_from_the_page(capsys, monkeypatch):
    monkeypatch.setattr(cli.run, "EMBEDDED_BYTES", 0)
    picture("a.png")
    assert run("project", "a.png", *TINY, "--out", "out") == 0
    page = open("out/index.html").read()
    assert "<img" not in page and 'href="0001-a-project.png"' in page


needs_shipped = pytest.mark.skipif(
    not (models.registry.ASSETS / "zfnet_small_fashion.safetensors").exists(),
    reason="needs the shipped weights, which this source tree lacks",
)


@needs_shipped
def test_demo(capsys):
    assert run("demo", "--pictures", 2, "--no-progress", "--device", "cpu", "--out", "out") == 0
    assert "2 pictures, 4 figures: out/index.html" in capsys.readouterr().out
    made = document("out")["results"]
    assert [os.path.basename(result["path"])[0] for result in made] == ["0", "1"]  # two classes
    for result in made:
        assert result["classes"][0]["probability"] > 0.2 and len(result["layers"]) >= 4
        assert len(result["figures"]) == 2 and all(
            os.path.getsize(f"out/{name}") > 5000 for name in result["figures"]
        )


@needs_shipped
def test_the_shipped_network_is_the_default(capsys):
    sample = next(sample for sample in sample_images() if sample.class_name == "Sneaker")
    shutil.copy(sample.path, "shoe.png")
    options = ("--box", 8, "--stride", 5, "--target", "sneaker", "--no-progress", "--out", "out")
    assert run("occlude", "shoe.png", *options) == 0
    assert document("out")["results"][0]["occlusion"]["target"] == sample.label


# ---- inputs that fail ------------------------------------------------------------------------------------


def bad_inputs():
    picture("good.png")
    data = open("good.png", "rb").read()
    with open("cut.png", "wb") as file:
        file.write(data[: len(data) // 2])
    with open("text.png", "w") as file:
        file.write("not a picture")
    open("empty.png", "w").close()
    os.mkfifo("pipe.png")
    os.mkdir("folder.png")
    Image.new("L", (400, 400)).save("huge.png")
    return ["cut.png", "text.png", "empty.png", "pipe.png", "missing.png", "huge.png"]


def test_bad_files_are_listed_and_never_stop_the_others(capsys):
    bad = bad_inputs()
    last = picture("last.png", 3)
    assert run("project", "good.png", *bad, last, *TINY, "--max-pixels", 10000, "--out", "out") == 1
    printed = capsys.readouterr()
    assert "2 pictures, 2 figures, 6 failed (errors.jsonl lists them): out/index.html" in printed.out
    assert [failure["path"] for failure in failures("out")] == bad
    assert [result["path"] for result in document("out")["results"]] == ["good.png", last]
    lines = printed.err.splitlines()
    assert len(lines) == 6 and all(line.startswith("zfcore: ") for line in lines)
    reasons = ("truncated", "not a picture", "empty", "FIFO", "no such", "400 x 400")
    assert all(reason in line for reason, line in zip(reasons, lines, strict=True))
    page = open("out/index.html").read()
    assert "6 inputs failed" in page and all(name in page for name in bad)


def test_a_folder_is_searched_and_what_is_skipped_is_a_failure(capsys):
    os.makedirs("in/deep")
    picture("in/a.png")
    picture("in/deep/b.png", 1)
    os.mkfifo("in/pipe.png")
    os.symlink("../in", "in/deep/loop")
    open("in/notes.txt", "w").close()
    assert run("project", "in", *TINY, "--out", "out") == 1
    assert [result["path"] for result in document("out")["results"]] == ["in/a.png", "in/deep/b.png"]
    assert [failure["path"] for failure in failures("out")] == ["in/pipe.png"]
    assert "other files passed over" in open("out/index.html").read()


def test_the_list_of_failures_is_emptied_by_a_run_without(capsys):
    picture("a.png")
    assert run("project", "a.png", "missing.png", *TINY, "--out", "out") == 1 and failures("out")
    assert run("project", "a.png", *TINY, "--out", "out") == 0 and not failures("out")


def test_mutated_files_are_read_or_listed(capsys):
    generator = random.Random(3)
    os.mkdir("in")
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp"):
        picture(f"original.{suffix}", size=(16, 16))
        data = open(f"original.{suffix}", "rb").read()
        for case in range(8):
            mutated = bytearray(data)
            for _ in range(1 + 3 * case):
                mutated[generator.randrange(min(len(data), 400))] = generator.randrange(256)
            with open(f"in/{suffix}-{case}.{suffix}", "wb") as file:
                file.write(mutated)
    assert run("project", "in", *TINY, "--layer", "0", "--top", 1, "--out", "out") == 1
    read = {result["path"] for result in document("out")["results"]}
    failed = {failure["path"] for failure in failures("out")}
    assert not read & failed and len(read | failed) == 48 and len(failed) > 5 and len(read) > 5
    assert capsys.readouterr().err.count("\n") == len(failed)


def test_a_damaged_file_is_reported_once(capfd):
    """libtiff would add a line of its own, from C."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 48), dtype=np.uint8)
    Image.fromarray(noise).save("a.tif", compression="tiff_lzw")
    data = bytearray(open("a.tif", "rb").read())
    data[200:260] = (byte ^ 0x5A for byte in data[200:260])
    with open("a.tif", "wb") as file:
        file.write(data)
    assert run("project", "a.tif", *TINY, "--out", "out") == 1
    error = capfd.readouterr().err
    assert error.startswith("zfcore: 'a.tif': ") and error.count("\n") == 1


def test_a_failure_of_the_analysis_is_the_inputs(capsys, monkeypatch):
    """An error that no argument caused and that no one expected."""
    for name in "abc":
        picture(f"{name}.png", ord(name))
    calls = []

    def project(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of\nluck")
        return original(*arguments, **options)

    original = analysis.project
    monkeypatch.setattr(analysis, "project", project)
    assert run("project", "a.png", "b.png", "c.png", *TINY, "--out", "out") == 1
    assert failures("out") == [{"path": "b.png", "error": "RuntimeError", "message": "out of luck"}]
    assert capsys.readouterr().err == "zfcore: 'b.png': out of luck\n"
    calls.clear()
    assert run("project", "a.png", "b.png", *TINY, "--out", "out", "--traceback") == 1
    assert "Traceback" in capsys.readouterr().err


HOSTILE = [
    "<img src=x onerror=alert(1)>.png",
    "a\nb.png",
    "\x1b[2J.png",
    "\u202egnp.png",
    "é" * 120 + ".png",
    "-rf.png",
    "$(id).png",
    "'; DROP.png",
    "&amp;.png",
    "..x.png",
    " .png",
    "日本語.png",
]


def test_hostile_names_stay_inert_and_inside(capsys):
    os.mkdir("in")
    for seed, name in enumerate(HOSTILE):
        picture(os.path.join("in", name), seed)
    with open(os.path.join(b"in", b"\xff\xfe.png"), "wb") as file, open("in/é.png", "wb") as other:
        file.write(b"bad"), other.write(b"bad")
    before = {entry for entry in os.listdir(".") if entry != "out"}
    assert run("project", "in", *TINY, "--layer", "0", "--top", 1, "--out", "out") == 1
    assert {entry for entry in os.listdir(".") if entry != "out"} == before
    assert len(os.listdir("in")) == len(HOSTILE) + 2
    names = os.listdir("out")
    assert len(names) == len(HOSTILE) + 3
    assert all(
        re.fullmatch(r"[0-9]{4}(-[a-z0-9]+)*-project\.png|[a-z]+\.(html|json|jsonl)", name) for name in names
    )
    page = open("out/index.html").read()
    assert "<img src=x" not in page and not set(page) & set("\x1b\u202e")
    printed = capsys.readouterr()
    assert "\x1b" not in printed.err + printed.out
    assert len(failures("out")) == 2


# ---- arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, arguments, words",
    [
        ("project", ("--layer", "30"), r"the nearest names are .*3"),
        ("project", ("--layer", "features.1"), r"layer='features.1': the model has no such module"),
        ("project", ("--layer", "0@4"), r"'0@4' does not run"),
        ("project", ("--layer", "3", "--unit", "6"), "unit: 6 of layer '3'; expected 0 to 5"),
        ("occlude", ("--layer", "3", "--unit", "6"), "unit: 6 of layer '3'; expected 0 to 5"),
        ("occlude", ("--unit", "6"), "unit: 6 of layer '4'; expected 0 to 5"),
        ("occlude", ("--layer", "0", "--layer", "3"), "given more than once"),
        ("occlude", ("--target", "5"), "target: class 5; expected 0 to 4"),
        ("occlude", ("--target", "cat"), "target: 'cat'; expected a class's index or name"),
        ("occlude", ("--fill", "gray"), "fill: 'gray'; expected mean, grey"),
        ("occlude", ("--fill", "0.5,0.5"), "fill: .*expected one number or 1"),
        ("occlude", ("--fill", "2"), "fill: '2'; expected numbers in 0..1"),
        ("occlude", ("--model", f"{NET}:probabilities"), "score='logit'"),
        ("project", ("--model", "zfnet_smal"), "there is no network of that name; expected zfnet_small"),
        ("project", ("--model", f"{NET}:tinny"), "did you mean tiny"),
        ("project", ("--model", f"{NET}:no_module"), "expected an nn.Module"),
        ("project", ("--model", "no_such_module:f"), "importing no_such_module failed"),
        (
            "project",
            ("--model", f"{NET}:fixed", "--input-size", "20"),
            "fails on a picture .*see --input-size",
        ),
        ("project", ("--channels", "3"), "fails on a picture"),
        ("project", ("--weights", "missing.safetensors"), "there is no such file"),
        ("project", ("--mean", "1,2"), "mean: .*expected one number or 1"),
        ("project", ("--std", "0"), "std: .*expected numbers above 0"),
        ("project", ("--std=-0.5",), "std: .*expected numbers above 0"),
        ("project", ("--std", "58.395"), "std: .*expected numbers in 0..1, of pixels in 0..1"),
        ("project", ("--std", "1e-300"), "std: .*expected larger numbers: in torch.float32, pixels divided by them"),
        ("project", ("--std", "1e-39"), "std: .*expected larger numbers"),
        ("project", ("--mean", "123.675"), "mean: .*expected numbers in 0..1, of pixels in 0..1 .divide"),
        ("occlude", ("--mean", "1.01"), "mean: .*expected numbers in 0..1"),
        ("occlude", ("--mean=-0.1",), "mean: .*expected numbers in 0..1"),
        ("occlude", ("--std", "0.5,0.5,0.5"), "std: .*expected one number or 1"),
        ("occlude", ("--fill", "nan"), "fill: 'nan'; expected mean, grey"),
        ("occlude", ("--fill", "1e400"), "fill: '1e400'; expected mean, grey"),
        ("project", ("--model", f"{NET}:leaves"), "its code ended with SystemExit: 3; expected a factory"),
        ("project", ("--model", f"{NET}:leaves_later"), "fails on a picture .*SystemExit"),
        ("project", ("--classes", "missing.txt"), "classes: 'missing.txt'; expected a text file"),
        ("project", ("--device", "gpu"), "device: 'gpu'; expected cpu, cuda or cuda:N"),
        ("project", ("--device", "meta"), "device: 'meta'; expected cpu"),
        ("project", ("--device", "cpu:1"), "device: 'cpu:1'; expected cpu"),
        ("project", ("--device", "cuda:" + "9" * 30), "device: 'cuda:9"),
        ("project", ("--out", "a.png"), "out: 'a.png'; expected a folder"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(capsys, command, arguments, words):
    picture("a.png")
    assert run(command, "a.png", *TINY, "--out", "out", *arguments) == 2
    printed = capsys.readouterr()
    assert re.search(words, printed.err), printed.err
    assert printed.err.count("\n") == 1 and printed.err.startswith("zfcore: error: ") and printed.out == ""
    assert not os.path.exists("out")


def test_what_no_one_expected_is_one_line_and_exit_1(capsys):
    picture("a.png")
    options = ("--model", f"{NET}:Breaks", "--input-size", 12, "--no-progress", "--out", "out")
    assert run("project", "a.png", *options) == 1
    assert capsys.readouterr().err == "zfcore: error: KeyError: 'surprise' (--traceback shows where)\n"


def test_weights_that_do_not_fit(capsys):
    models.save_weights(models.create(f"{NET}:colour"), "other.safetensors")
    picture("a.png")
    assert run("project", "a.png", *TINY, "--weights", "other.safetensors") == 2
    assert "0.weight has shape [4, 3, 3, 3], expected [4, 1, 3, 3]" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(capsys):
    picture("a.png")
    assert run("project", "a.png", *TINY, "--device", "cuda") == 2
    assert "sees no CUDA device; expected cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "required: COMMAND"),
        (("project", "a.png", "--layer", "conv1@" + "9" * 5000), "argument --layer: '99999"),
        (("paint",), "invalid choice: 'paint'"),
        (("project",), "required: IMAGE"),
        (("occlude", "a.png", "--batch-size", "1" + "0" * 20), "--batch-size: '100000000000000000000'; expected a whole"),
        (("occlude", "a.png", "--batch-size", "9" * 5000), "expected a whole number of at most 9223372036854775807"),
        (("occlude", "a.png", "--input-size", "100000x100000"), "--input-size: '100000x100000'; expected at most 67108864"),
        (("project", "a.png", "--top", "0"), "expected a whole number of at least 1"),
        (("project", "a.png", "--unit", "-1"), "--unit"),
        (("occlude", "a.png", "--box", "3x4x5"), "expected one number, or height x width"),
        (("occlude", "a.png", "--box", "0"), "expected a whole number of at least 1"),
        (("occlude", "a.png", "--stride", "1.5"), "expected a whole number"),
        (("occlude", "a.png", "--mean", "a,b"), "expected numbers with commas between"),
        (("occlude", "a.png", "--score", "loss"), "invalid choice: 'loss'"),
        (("demo", "--pictures", "many"), "expected a whole number"),
    ],
)
def test_wrong_usage_exits_2(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2 and words in capsys.readouterr().err


WHOLE = {
    "project": ("--input-size", "--channels", "--unit", "--top", "--batch-size", "--max-pixels"),
    "occlude": ("--input-size", "--channels", "--unit", "--box", "--stride", "--batch-size", "--max-pixels"),
    "demo": ("--pictures", "--batch-size"),
}
DECIMAL = {"project": ("--mean", "--std"), "occlude": ("--mean", "--std"), "demo": ()}
NO_WHOLE = ["", " ", "x", "-1", "1.5", "1e3", "1_0", "+1", "0x10", "\u0663", "nan", "inf", str(2**63), "9" * 5000]
NO_DECIMAL = ["", "x", "nan", "inf", "-inf", "1e400", "1_0", "0x1p3", "\u0663", "0.5,nan", "0.5,", "0.5;0.5"]
NO_DECIMAL += ["9" * 5000]


@pytest.mark.parametrize("command", WHOLE)
def test_numbers_that_are_none_or_too_large_exit_2_and_are_named(capsys, command):
    cases = [(argument, value) for argument in WHOLE[command] for value in NO_WHOLE]
    cases += [(argument, "0") for argument in WHOLE[command] if argument != "--unit"]
    cases += [(argument, value) for argument in DECIMAL[command] for value in NO_DECIMAL]
    for argument, value in cases:
        with pytest.raises(SystemExit) as caught:
            run(command, *([] if command == "demo" else ["a.png"]), f"{argument}={value}")
        last = capsys.readouterr().err.splitlines()[-1]
        assert caught.value.code == 2 and f"error: argument {argument}: " in last, (argument, value)
        assert len(last) < 250 and not set(last) & set("\x1b")


def test_the_largest_numbers_that_are_taken(capsys):
    path, huge = picture("a.png"), 2**63 - 1
    wide = ("--batch-size", huge, "--max-pixels", huge, "--out", "out")
    assert run("project", path, *TINY, *wide, "--top", huge) == 0
    assert run("occlude", path, *TINY, *wide, "--box", huge, "--stride", huge) == 0
    assert run("occlude", path, *TINY, *wide, "--box", f"1x{huge}", "--stride", f"{huge}x1") == 0
    assert run("project", path, *TINY, *wide, "--unit", huge) == 2
    assert capsys.readouterr().err == f"zfcore: error: unit: {huge} of layer '0'; expected 0 to 3\n"


def test_a_memory_that_is_too_small_is_one_line_without_a_stack(capsys, monkeypatch):
    path, order = picture("a.png"), analysis.forward_order

    def fail(*_, **__):
        raise RuntimeError("no memory\nException raised from alloc at x.cpp:1 (most recent call first):\nframe #0: f")

    monkeypatch.setattr(analysis, "forward_order", fail)
    assert run("project", path, *TINY, "--out", "out") == 2
    assert "fails on a picture (1, 1, 12, 12) (no memory); see --input-size" in capsys.readouterr().err
    monkeypatch.setattr(analysis, "forward_order", order)
    monkeypatch.setattr(analysis, "project", fail)
    assert run("project", path, *TINY, "--out", "out") == 1
    assert failures("out")[0]["message"] == "no memory"


def test_nothing_to_read(capsys):
    os.mkdir("in")
    assert run("project", "in", *TINY) == 2
    assert "IMAGE: in; expected picture files, or folders with some" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["project", "occlude", "demo", "train"])
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as caught:
        run(command, "--help")
    assert caught.value.code == 0
    assert re.search(r"example:\n  (zfcore|python)", capsys.readouterr().out)


def test_version_and_module(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--version")
    assert caught.value.code == 0 and capsys.readouterr().out.startswith("zfcore ")
    source = os.path.dirname(os.path.dirname(zfcore.__file__))
    made = subprocess.run(
        [sys.executable, "-m", "zfcore", "paint"],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": source},
    )
    assert made.returncode == 2 and "invalid choice: 'paint'" in made.stderr


# ---- interruptions and broken disks ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, code, words", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interrupted_run_keeps_what_it_did(capsys, monkeypatch, number, code, words):
    for name in "abc":
        picture(f"{name}.png", ord(name))
    calls = []

    def project(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    original = analysis.project
    monkeypatch.setattr(analysis, "project", project)
    before = signal.getsignal(number)
    assert run("project", "a.png", "b.png", "c.png", *TINY, "--out", "out") == code
    assert signal.getsignal(number) is before
    line = f"zfcore: {words}; what was finished is in out; not analysed: 'b.png', 'c.png'\n"
    assert capsys.readouterr().err == line
    assert failures("out") == document("out")["failures"] == [
        {"path": path, "error": "Interrupted", "message": f"not analysed: {words}"} for path in ("b.png", "c.png")
    ]
    assert [result["path"] for result in document("out")["results"]] == ["a.png"]
    assert "a.png" in open("out/index.html").read()
    assert not [name for name in os.listdir("out") if name.endswith(".tmp")]


def test_a_full_disk_says_what_to_do_and_exits_1(capsys, monkeypatch):
    picture("a.png")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert run("project", "a.png", *TINY, "--out", "out") == 1
    error = capsys.readouterr().err
    assert error == (
        "zfcore: error: out: 'out': 0001-a-project.png could not be written (No space left on device); make room "
        "there, or choose another folder\n"
        "zfcore: written: none; not written: 'a.png', errors.jsonl, results.json, index.html\n"
    )
    assert os.listdir("out") == []


def test_an_interrupted_run_prints_its_results_as_json(capsys, monkeypatch):
    for name in "abc":
        picture(f"{name}.png", ord(name))
    original, calls = analysis.project, []

    def project(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(analysis, "project", project)
    assert run("project", "a.png", "b.png", "c.png", *TINY, "--json", "--out", "out") == 130
    made = json.loads(capsys.readouterr().out)
    assert [result["path"] for result in made["results"]] == ["a.png", "b.png"]
    assert [failure["path"] for failure in made["failures"]] == ["c.png"]


@pytest.mark.parametrize("turns", [1, 2])
def test_a_signal_while_the_page_is_written(capsys, monkeypatch, turns):
    """The first waits till it is; a second does not."""
    picture("a.png")
    write = OutputFolder.write

    def signalled(self, name, data):
        if name == "results.json":
            for _ in range(turns):
                signal.raise_signal(signal.SIGTERM)
        return write(self, name, data)

    monkeypatch.setattr(OutputFolder, "write", signalled)
    assert run("project", "a.png", *TINY, "--out", "out") == 143
    assert capsys.readouterr().err == "zfcore: terminated; what was finished is in out\n"
    assert os.path.exists("out/index.html") == (turns == 1) and os.path.exists("out/0001-a-project.png")


def test_a_signal_that_is_ignored_stays_ignored(capsys, monkeypatch):
    """As SIGINT is in what a shell runs in the background."""
    picture("a.png")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        original = analysis.project

        def project(*arguments, **options):
            signal.raise_signal(signal.SIGINT)
            return original(*arguments, **options)

        monkeypatch.setattr(analysis, "project", project)
        assert run("project", "a.png", *TINY, "--out", "out") == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_planted_links_in_the_out_folder_are_not_followed(capsys):
    picture("a.png")
    os.makedirs("out")
    os.makedirs("outside")
    for name in ("index.html", "0001-a-project.png", "errors.jsonl", "results.json"):
        with open(f"outside/{name}", "w") as file:
            file.write("kept")
        os.symlink(os.path.abspath(f"outside/{name}"), f"out/{name}")
    assert run("project", "a.png", *TINY, "--out", "out") == 0
    assert all(open(f"outside/{name}").read() == "kept" for name in os.listdir("outside"))
    assert not any(os.path.islink(f"out/{name}") for name in os.listdir("out"))


def test_the_feature_map_of_an_occlusion_is_rectified():
    conv, norm, relu = torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU()
    image = torch.rand(1, 1, 12, 12)
    for layers, found in (
        ([conv, relu], "1"),
        ([conv, norm, relu], "2"),
        ([conv, torch.nn.MaxPool2d(2), relu], "0"),
        ([relu, conv], "1"),
        ([conv, relu, torch.nn.Conv2d(2, 2, 3), norm, relu], "1"),  # the same module, called again
    ):
        model = torch.nn.Sequential(*layers)
        order = analysis.forward_order(model, image)
        assert len(order) == len(layers)
        assert analysis.rectified(model, order, analysis.conv_layers(model, order)[-1]) == found


def test_looking_leaves_no_hooks():
    model = models.create(f"{NET}:tiny").train()
    image = torch.rand(1, 1, 12, 12)
    seen = analysis.look(model, image, ["3", "1@0"])
    assert list(seen.maxima) == ["1@0", "3"] and model.training
    flat = torch.nn.Sequential(torch.nn.Flatten(0))
    with pytest.raises(ArgumentError, match="layer: '0' returns no maps"):
        analysis.look(flat, image, ["0"])
    assert not flat[0]._forward_hooks
    assert not any(module._forward_hooks for module in model.modules())
