"""``python -m zfcore.train``, in this process and in others that are killed."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from bars import pictures, write_idx

from zfcore.data import FASHION_MNIST_CLASSES, find_fashion_mnist
from zfcore.errors import ImageError
from zfcore.models import ModelMeta, load_weights, zfnet_small
from zfcore.train import main, trainer

FULL = "ZFCORE_FULL_TRAINING"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(folder, out, *more):
    settings = ("--epochs", "3", "--batch-size", "16", "--lr", "0.02", "--seed", "5", "--threads", "1")
    return ["--data", str(folder), "--out", str(out), *settings, "--quiet", *more]


@pytest.fixture(scope="module")
def unbroken(idx_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "net.safetensors"
    assert main(arguments(idx_folder, out)) == 0
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return out


def tensors(path):
    model = zfnet_small()
    metadata = load_weights(model, path)
    return model.state_dict(), metadata


def assert_same(a, b):
    (first, _), (second, _) = tensors(a), tensors(b)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_writes_weights_that_know_what_they_are(unbroken, idx_folder):
    meta = ModelMeta.from_metadata(tensors(unbroken)[1])
    images, _ = pictures(96)
    assert meta.classes == FASHION_MNIST_CLASSES
    assert (meta.input_size, meta.channels) == ((28, 28), 1)
    assert meta.mean == pytest.approx([images.double().mean().item() / 255], rel=1e-12)
    assert meta.std == pytest.approx([images.double().std(correction=0).item() / 255], rel=1e-12)
    assert 0 <= meta.test_accuracy <= 1
    assert meta.command.startswith(f"python -m zfcore.train --data {idx_folder} --out {unbroken} --epochs 3")


def test_prints_each_epoch_and_the_accuracy(idx_folder, tmp_path, capsys):
    assert main(arguments(idx_folder, tmp_path / "net.safetensors", "--epochs", "1")) == 0
    lines = capsys.readouterr().out.splitlines()
    number = r"\d+\.\d{4}"
    assert re.fullmatch(
        rf"epoch 1/1: training loss {number}, accuracy {number}; test accuracy {number}; \d+ s", lines[0]
    )
    assert re.fullmatch(rf".*net\.safetensors: test accuracy {number}", lines[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("batch", [2, 6, 17])  # within an epoch, at its end, just before the last batch
def test_a_signal_stops_after_the_batch_and_resume_finishes(
    idx_folder, tmp_path, unbroken, monkeypatch, capsys, number, code, batch
):
    out, seen, augment = tmp_path / "net.safetensors", [], trainer.augment

    def signalling(*given):
        seen.append(given)
        if len(seen) == batch:
            signal.raise_signal(number)
        return augment(*given)

    monkeypatch.setattr(trainer, "augment", signalling)
    handler = signal.getsignal(number)
    assert main(arguments(idx_folder, out)) == code
    assert signal.getsignal(number) is handler
    assert len(seen) == batch and not out.exists()
    checkpoint = tmp_path / "net.checkpoint.safetensors"
    assert f"interrupted; {checkpoint} holds the run" in capsys.readouterr().err

    assert main(arguments(idx_folder, out)) == 2  # not over the unfinished run
    assert "--resume" in capsys.readouterr().err
    assert main(arguments(idx_folder, out, "--resume")) == 0
    assert_same(out, unbroken)
    assert "--resume" not in tensors(out)[1]["command"]
    assert len(seen) == 18 and not checkpoint.exists()


KILLED = """
import os, sys
from zfcore.models import weights
from zfcore.train import main, trainer

place, count = sys.argv[1], int(sys.argv[2])
module = {"fsync": weights.os, "replace": weights.os, "augment": trainer}[place]
call, seen = getattr(module, place), []

def killer(*arguments):
    seen.append(place)
    if len(seen) == count:
        os.kill(os.getpid(), 9)
    return call(*arguments)

setattr(module, place, killer)
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(("place", "count"), [("augment", 9), ("fsync", 3), ("replace", 4)])
def test_killed_and_resumed_equals_unbroken(idx_folder, tmp_path, unbroken, place, count):
    """In an epoch, while a checkpoint is written, and while the finished weights are."""
    out = tmp_path / "net.safetensors"
    command = [sys.executable, "-c", KILLED, place, str(count), *arguments(idx_folder, out)]
    # Elsewhere than in a source tree, so that the child imports the package that this process did.
    assert subprocess.run(command, check=False, cwd=tmp_path).returncode == -signal.SIGKILL
    assert not out.exists()
    assert main(arguments(idx_folder, out, "--resume")) == 0
    assert_same(out, unbroken)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_second_interrupt_ends_at_once(idx_folder, tmp_path, monkeypatch):
    def impatient(*given):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer, "augment", impatient)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(idx_folder, tmp_path / "net.safetensors"))


def test_a_full_disk_ends_with_an_error_and_resumes(idx_folder, tmp_path, unbroken, monkeypatch, capsys):
    from zfcore.models import weights

    def full(*_):
        raise OSError(28, "No space left on device")

    out = tmp_path / "net.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(weights.os, "fsync", full)
        assert main(arguments(idx_folder, out)) == 1
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main(arguments(idx_folder, out, "--resume")) == 0
    assert_same(out, unbroken)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--lr", "-1"), "lr=-1.0: expected"),
        (("--out", "net.pth"), "out='net.pth': expected a name ending in .safetensors"),
        (("--out", "gone/net.safetensors"), "out='gone/net.safetensors': expected a file in a folder"),
        (("--data", "gone"), "there is no folder 'gone'"),
        (("--data", "/"), "'/' holds neither 'train-images-idx3-ubyte' nor"),
    ],
)
def test_wrong_arguments_are_named(idx_folder, tmp_path, capsys, more, words):
    assert main(arguments(idx_folder, tmp_path / "net.safetensors", *more)) == (1 if more[0] == "--data" else 2)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("more", [("--epochs", "x"), ("--unknown",), ()])
def test_usage_errors_exit_with_2(more):
    with pytest.raises(SystemExit, match="2"):
        main(list(more))


NUMBERS = ("--epochs", "--batch-size", "--threads", "--shift", "--seed", "--lr", "--momentum", "--weight-decay",
           "--warmup", "--filter-rms")  # fmt: skip
WHOLE = NUMBERS[:5]


@pytest.mark.parametrize("argument", NUMBERS)
def test_numbers_that_are_none_or_too_large_exit_with_2_and_are_named(argument, tmp_path, capsys):
    values = ["", "x", "1_0", "\u0663", "nan", "1e400", "0x10"]
    values += ["1e3", "1.5", "-1", "9" * 30, "9" * 5000] if argument in WHOLE else ["9" * 5000]
    for value in values:
        with pytest.raises(SystemExit) as caught:
            main(["--out", str(tmp_path / "net.safetensors"), f"{argument}={value}"])
        last = capsys.readouterr().err.splitlines()[-1]
        assert caught.value.code == 2 and f"error: argument {argument}: '" in last and len(last) < 250


def test_pictures_of_another_size_are_refused(tmp_path, capsys):
    for stem in ("train", "t10k"):
        images, labels = pictures(20, size=16)
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte", images[:, 0], zipped=False)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte", labels, zipped=False)
    assert main(arguments(tmp_path, tmp_path / "net.safetensors")) == 2
    assert "pictures of 16 x 16; expected one size, 28 to 64" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python -m zfcore.train --out" in capsys.readouterr().out


def test_full_training_reaches_the_promised_accuracy(tmp_path):
    """91.5 % of the test pictures in ten minutes on two cores."""
    if os.environ.get(FULL) != "1":
        pytest.skip(f"takes ten minutes; set {FULL}=1 to run it")
    try:
        find_fashion_mnist()
    except ImageError as error:
        pytest.skip(str(error))
    out, started = tmp_path / "net.safetensors", time.monotonic()
    command = [sys.executable, "-m", "zfcore.train", "--out", str(out), "--epochs", "10", "--threads", "2"]
    subprocess.run(command, check=True, cwd=tmp_path)
    seconds = time.monotonic() - started
    assert ModelMeta.from_metadata(tensors(out)[1]).test_accuracy >= 0.915
    assert seconds <= 600
