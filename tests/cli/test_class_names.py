"""Names of classes: each stays with its class or the file is refused, and a terminal obeys none of them."""

import json
import os
import re
import unicodedata

import pytest
import torch
from commands import COARSE, NET, TINY, document, picture, run

from zfcore import models
from zfcore.data.class_names import MAX_BYTES, class_label, classes_named, read_class_names
from zfcore.errors import ArgumentError, DtypeError
from zfcore.models import ModelMeta
from zfcore.occlusion import occlusion_map
from zfcore.report import figures

pytestmark = pytest.mark.usefixtures("networks")

FIVE = ("cat", "dog", "fox", "owl", "bee")


def write(data, name="names.txt"):
    with open(name, "wb") as file:
        file.write(data)
    return name


# ---- the file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, names",
    [
        (b"cat\ndog\n", ("cat", "dog")),
        (b"cat\ndog", ("cat", "dog")),
        (b"cat\ndog\n\n \n\t\n", ("cat", "dog")),  # at the end, lines without a name are no lines
        (b"cat\r\ndog\r\n", ("cat", "dog")),
        (b"cat\rdog\r", ("cat", "dog")),
        (b"\xef\xbb\xbfcat\n\xef\xbb\xbfdog", ("cat", "dog")),  # marks, as of files that were joined
        (b"  cat \n\tdog", ("cat", "dog")),
        ("größer\n日本語\n".encode(), ("größer", "日本語")),
        (b"a\x0bb\nc\x0cd\ne\x1cf\n", ("a\x0bb", "c\x0cd", "e\x1cf")),  # no line ends there, nor at U+2028, U+0085
        ("a\u2028b\nc\x85d".encode(), ("a\u2028b", "c\x85d")),
        (b"0\n1\n2", ("0", "1", "2")),
        (b"2\n0\n1", ("2", "0", "1")),  # digits are names
        (b"0: tench\n1: goldfish", ("0: tench", "1: goldfish")),  # the whole line is the name
        (b"1 star\n2 stars\n3 stars", ("1 star", "2 stars", "3 stars")),
        (b"n01440764 tench\nn01443537 goldfish", ("n01440764 tench", "n01443537 goldfish")),
        (b"7 up\n2 CV", ("7 up", "2 CV")),
        (b"cat\ncat", ("cat", "cat")),
        (b"x" * 1000, ("x" * 1000,)),
    ],
)
def test_line_i_is_the_name_of_class_i(data, names):
    assert read_class_names(write(data)) == names


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "it is empty"),
        (b"\n \n", "it is empty"),
        (b"\xef\xbb\xbf", "it is empty"),
        (b"cat\n\ndog\n", "line 2 of 3 is empty, and every class needs a name"),
        (b"\ncat\n", "line 1 of 2 is empty"),
        (b"cat\r\r\ndog", "line 2 of 3 is empty"),
        (b"cat\r\n \t\r\ndog", "line 2 of 3 is empty"),
        ("cat\n\u200b\ndog".encode(), "line 2 of 3 is empty"),  # nothing that anybody sees
        ("cat\n\u3000\ndog".encode(), "line 2 of 3 is empty"),
        ("cat\ndog".encode("utf-16"), "it is UTF-16; expected UTF-8"),
        ("cat\ndog".encode("utf-32"), "it is UTF-32; expected UTF-8"),
        ("cat\ndog".encode("utf-16-le"), "it holds NUL characters"),
        ("cat\ngröße\n".encode("latin-1"), "line 2 is not UTF-8"),
        (b"cat\n" + b"\xed\xb2\x80", "line 2 is not UTF-8"),  # a surrogate
        (b"x" * 1001, "line 1 has 1001 characters; expected at most 1000"),
        (b"x\n" * (MAX_BYTES // 2 + 1), f"it has more than {MAX_BYTES} bytes"),
        (b"1: goldfish\n0: tench", "its lines are numbered, and not in order: line 1 is '1: goldfish'"),
        (b"0\tcat\n10\tk\n1\td\n" + b"".join(b"%d\tx\n" % i for i in range(2, 10)), "numbered, and not in order"),
        (b"{0: 'a',\n 2: 'c',\n 1: 'b'}", "numbered, and not in order"),
    ],
)
def test_files_that_may_mean_other_classes_are_refused(data, words):
    with pytest.raises(ArgumentError, match=re.escape(words)) as caught:
        read_class_names(write(data))
    assert str(caught.value).startswith("classes: 'names.txt'; expected a text file, one name a line (")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path),
                                  lambda path: os.symlink(path, path)])  # fmt: skip
def test_what_is_no_file_is_refused_without_waiting(make):
    make("names.txt")
    with pytest.raises(ArgumentError, match="classes: 'names.txt'; expected a text file"):
        read_class_names("names.txt")


def test_a_sparse_file_is_not_read_whole():
    with open("names.txt", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ArgumentError, match="more than"):
        read_class_names("names.txt")


# ---- in the command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, words",
    [
        (FIVE[:2], "classes: 'names.txt' has 2 names for the network's 5 outputs; expected 5, one a line\n"),
        (("synset,name", *FIVE), "has 6 names for the network's 5 outputs; expected 5, one a line; is the first, "
                                 "'synset,name', a header?\n"),
        (("\x1b[2J", *FIVE), "is the first, '\\x1b[2J', a header?\n"),
        (FIVE * 2000, "has 10000 names for the network's 5 outputs"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["project", "occlude"])
def test_another_number_of_names_than_outputs_is_refused(capsys, command, names, words):
    path = picture("a.png")
    write("\n".join(names).encode())
    assert run(command, path, *TINY, "--classes", "names.txt", "--out", "out") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "\x1b" not in error
    assert not os.path.exists("out")


def test_names_reach_the_results_and_the_page(capsys):
    path = picture("a.png")
    write(b"\xef\xbb\xbf" + "\r\n".join(FIVE).encode())
    options = ("--classes", "names.txt", "--out", "out")
    assert run("occlude", path, *TINY, *COARSE, *options, "--target", "CAT") == 0
    made = document("out")["results"][0]
    assert made["occlusion"]["target"] == 0
    assert sorted((c["index"], c["name"]) for c in made["classes"]) == list(enumerate(FIVE))
    assert "<td>cat</td>" in open("out/index.html").read()


@pytest.mark.parametrize(
    "names, target, found, words",
    [
        (FIVE, "fox", 2, ""),
        (FIVE, "FOX", 2, ""),
        (("Cat", "cat", "c", "d", "e"), "cat", 1, ""),  # letter for letter comes first
        (("Cat", "CAT", "c", "d", "e"), "cat", None, "is the name of the classes 0, 1; expected the index of one"),
        (("crane", "dog", "crane", "d", "e"), "crane", None, "is the name of the classes 0, 2; expected the index"),
        (("crane", "dog", "crane", "d", "e"), "2", 2, ""),
        (("1", "2", "3", "4", "5"), "1", 1, "note: target: 1 is taken as the index of '2'; it is also the name"),
        (("1", "2", "3", "4", "5"), "5", 4, ""),  # there is no class 5
        (("0", "1", "2", "3", "4"), "3", 3, ""),
        (FIVE, "7", None, "target: class 7; expected 0 to 4"),
        (FIVE, "007", None, "target: class 007; expected 0 to 4"),
        (FIVE, "9" * 5000, None, "expected 0 to 4"),
        (FIVE, "-1", None, "target: '-1'; expected a class's index or name"),
        (FIVE, "\u0663", None, "target: '\u0663'; expected a class's index or name"),
        (FIVE, "1_0", None, "target: '1_0'; expected a class's index or name"),
        (FIVE, "", None, "target: ''; expected a class's index or name"),
        (("caf\u00e9", "b", "c", "d", "e"), "cafe\u0301", 0, ""),
        (("\x1b[31mred", "b", "c", "d", "e"), "\x1b[32mred", None, "nearest: \\x1b[31mred"),
        (("\u202eder", "b", "c", "d", "e"), "der", None, "nearest: \\u202eder"),
    ],
)  # fmt: skip
def test_the_class_that_target_names(capsys, names, target, found, words):
    path = picture("a.png")
    write("\n".join(names).encode())
    options = ("--classes", "names.txt", f"--target={target}", "--out", "out", "--layer", "0")
    assert run("occlude", path, *TINY, *COARSE, *options) == (2 if found is None else 0)
    printed = capsys.readouterr()
    assert words in printed.err and bool(printed.err) == bool(words) and len(printed.err) < 300
    assert not set(printed.out + printed.err) & set("\x1b\u202e")
    if found is not None:
        assert document("out")["results"][0]["occlusion"]["target"] == found


def test_two_classes_of_one_name_are_told_apart(capsys):
    path = picture("a.png")
    write(b"crane\ncrane\ncrane\ncrane\ncrane")
    assert run("occlude", path, *TINY, *COARSE, "--classes", "names.txt", "--out", "out", "--target", 3) == 0
    assert "<td>crane (3)</td>" in open("out/index.html").read()
    assert {c["name"] for c in document("out")["results"][0]["classes"]} == {f"crane ({i})" for i in range(5)}


def test_names_are_only_text(capsys):
    path = picture("a.png")
    names = ("<b>&amp;", "\x1b]0;owned\x07", "\u202egnp", "a\x0bb\x85c\u2028d", "x" * 1000)
    write("\n".join(names).encode())
    assert run("occlude", path, *TINY, *COARSE, "--classes", "names.txt", "--json", "--out", "out") == 0
    printed = capsys.readouterr()
    assert printed.out.isascii() and not set(printed.out + printed.err) & set("\x1b\x07\u202e\x0b\x85\u2028")
    assert {c["name"] for c in json.loads(printed.out)["results"][0]["classes"]} == set(names)
    page = open("out/index.html").read()
    assert "<b>&amp;" not in page and not set(page) & set("\x1b\x07\u202e\x0b\x85")


def test_names_in_a_weights_file_are_checked_too(capsys):
    path = picture("a.png")

    def weights(classes, **changed):
        meta = ModelMeta(classes, (12, 12), 1, (0.5,), (0.5,), 0.5, "a test").to_metadata()
        models.save_weights(models.create(f"{NET}:tiny"), "net.safetensors", {**meta, **changed})
        options = ("--model", f"{NET}:tiny", "--weights", "net.safetensors", "--no-progress", "--out", "out")
        return run("occlude", path, *COARSE, *options)

    assert weights(("cat", "", "fox", "\u202ewo", "bee")) == 0
    assert {c["index"]: c["name"] for c in document("out")["results"][0]["classes"]}[1] == "class 1"
    assert weights(FIVE[:4]) == 2
    assert "weights: 'net.safetensors' has 4 names for the network's 5 outputs" in capsys.readouterr().err
    assert weights(FIVE, channels="4", mean="[0.5, 0.5, 0.5, 0.5]", std="[0.5, 0.5, 0.5, 0.5]") == 2
    assert "weights: 'net.safetensors' is of a network for 4 channels; expected 1 or 3" in capsys.readouterr().err


# ---- in Python -------------------------------------------------------------------------------------------


def test_labels():
    names = ("cat", "", "crane", "crane", " \u200b")
    assert [class_label(names, i) for i in range(6)] == [
        "cat", "class 1", "crane (2)", "crane (3)", "class 4", "class 5",
    ]  # fmt: skip
    assert classes_named(names, "crane") == [2, 3] and classes_named(names, "CRANE") == [2, 3]
    assert classes_named(names, "dog") == []
    assert classes_named([unicodedata.normalize("NFD", "É")], "é") == [0]


def test_figures_take_texts_only_and_tell_equal_names_apart(monkeypatch):
    model, image = models.create(f"{NET}:tiny"), torch.rand(1, 1, 12, 12)
    occlusion = occlusion_map(model, image, 3, box=6, stride=3)
    for names in ("cat", b"cat", ("cat", 1), 3, {"cat": 0}):
        with pytest.raises(DtypeError, match="class_names"):
            figures.occlusion_figure(image[0], occlusion, title="t", class_names=names)
    drawn = []
    original = figures.Sheet.text
    monkeypatch.setattr(figures.Sheet, "text", lambda *a, **k: (drawn.append(a[3]), original(*a, **k)))
    figures.occlusion_figure(image[0], occlusion, title="t", class_names=["crane"] * 5)
    assert "Probability of crane (3)" in drawn
    figures.occlusion_figure(image[0], occlusion, title="t", class_names=["x" * 10**6] * 3)
    assert "Probability of class 3" in drawn
