"""The folder of the results: never an input, swept of what killed runs left, and what it lacks is said."""

import errno
import fcntl
import json
import os
import shutil
import signal

import pytest
from commands import NET, TINY, document, failures, picture, run
from PIL import Image

from zfcore.errors import ArgumentError
from zfcore.report import analysis
from zfcore.report.files import OutputError, OutputFolder, is_figure, is_output_folder

pytestmark = pytest.mark.usefixtures("networks")

QUICK = (*TINY, "--layer", "0", "--top", "1")


def paths(out):
    return [result["path"] for result in document(out)["results"]]


# ---- results are no inputs -------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder with two pictures, one of them deeper, as the working folder."""
    (tmp_path / "d" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "d")
    return [picture("a.png"), picture("deep/b.png", 1)]


@pytest.mark.parametrize(
    "out", ["zfcore-projections", ".", "deep", "deep/results/x", "{here}/out", "../d/out", "../out"]
)
@pytest.mark.parametrize("root", [".", "{here}", "../d/"])
def test_a_run_that_is_repeated_gives_the_same(pictures, capsys, root, out):
    root, out = (text.format(here=os.getcwd()) for text in (root, out))
    open("notes.txt", "w").close()
    pages = []
    for _ in range(2):
        assert run("project", root, *QUICK, "--out", out) == 0
        found = [os.path.relpath(path) for path in paths(out)]
        # The pictures of a folder that results go to are none of the run's, in the first run as in the next.
        assert found == (pictures[:1] if out == "deep" else pictures)
        pages.append(open(os.path.join(out, "index.html")).read())
        assert "<b>1</b> other files passed over" in pages[-1]
    error = capsys.readouterr().err
    assert error.count("note: 1 picture in folders of results left out") == (2 if out == "deep" else 0)


def test_results_of_other_runs_are_no_inputs_either(pictures, capsys):
    assert run("project", ".", *QUICK, "--out", "one") == 0
    assert run("occlude", ".", *TINY, "--box", 6, "--stride", 3, "--out", "deep/two") == 0
    os.makedirs("moved/away")
    shutil.copy("one/0001-a-project.png", "moved/away/renamed.PNG")  # a figure is known by whatever name
    os.symlink("one", "link")
    os.symlink("../one/0002-b-project.png", "deep/link.png")
    shutil.copytree("one", "older")
    Image.open("older/0001-a-project.png").convert("RGB").save("older/unmarked.png")
    assert run("project", ".", *QUICK, "--out", "three") == 0
    assert paths("three") == ["./a.png", "./deep/b.png"]
    assert "left out ('./older/unmarked.png')" in capsys.readouterr().err


def test_a_run_that_was_killed_leaves_no_inputs(pictures):
    assert run("project", ".", *QUICK, "--out", "one") == 0
    for name in ("index.html", "results.json", "errors.jsonl"):
        os.remove(f"one/{name}")
    assert run("project", ".", *QUICK, "--out", "two") == 0 and len(paths("two")) == 2


def test_what_is_named_is_taken(pictures, capsys):
    assert run("project", ".", *QUICK, "--out", "one") == 0
    figure = "one/0001-a-project.png"
    assert run("project", figure, ".", *QUICK, "--out", "two") == 0
    assert paths("two") == [figure, "./a.png", "./deep/b.png"]
    assert capsys.readouterr().err == f"zfcore: note: 1 picture of those named drawn by zfcore ({figure!r})\n"
    picture("one/own.png")
    assert run("project", "one", *QUICK, "--out", "three") == 0 and paths("three") == ["one/own.png"]
    os.remove("one/own.png")
    assert run("project", "one", *QUICK, "--out", "three") == 2
    assert "IMAGE: one; expected picture files, or folders with some, other than figures" in capsys.readouterr().err


def test_pictures_beside_the_results_of_others_are_read(pictures):
    """A folder of the name, and a results.json that is not ours."""
    os.mkdir("zfcore-projections")
    picture("zfcore-projections/c.png", 2)
    with open("zfcore-projections/results.json", "w") as file:
        json.dump({"settings": {"command": "mytool"}}, file)
    assert run("project", ".", *QUICK, "--out", "out") == 0 and len(paths("out")) == 3


def test_marks_are_read_of_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / "results.json")
    assert not is_output_folder(str(tmp_path)) and not is_figure(str(tmp_path / "results.json"))
    assert not is_figure("a\0b") and not is_figure("missing") and not is_output_folder("missing")
    assert not is_figure(str(tmp_path)) and not is_figure("/dev/zero")


# ---- temporary files -------------------------------------------------------------------------------------


def forked(work):
    """Do it in a child process, which ends without leaving this function; returns its process id."""
    process = os.fork()
    if not process:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return process


def test_orphans_are_swept_and_nothing_else_is(tmp_path):
    def killed():
        os.replace = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        OutputFolder(tmp_path).write("index.html", b"x")

    assert os.waitpid(forked(killed), 0)[1] == signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2  # the orphan, and the module of factories
    kept = [".0123456789abcdeF.tmp", "0123456789abcdef.tmp", ".0123456789abcde.tmp", ".a.tmp", ".0123456789abcdef.tmp~"]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / ".aaaaaaaaaaaaaaaa.tmp").mkdir()
    (tmp_path / ".bbbbbbbbbbbbbbbb.tmp").symlink_to("kept")
    os.mkfifo(tmp_path / ".cccccccccccccccc.tmp")
    (tmp_path / ".dddddddddddddddd.tmp").touch()
    (tmp_path / ".eeeeeeeeeeeeeeee.tmp").touch()
    with open(tmp_path / ".eeeeeeeeeeeeeeee.tmp") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        OutputFolder(tmp_path).close()
    left = [".aaaaaaaaaaaaaaaa.tmp", ".bbbbbbbbbbbbbbbb.tmp", ".cccccccccccccccc.tmp", ".eeeeeeeeeeeeeeee.tmp"]
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, *left, f"{NET}.py"])


def test_a_writer_and_a_sweeper_do_not_meet(tmp_path, monkeypatch):
    """Another run takes the file for an orphan between its making and its locking: it is made again."""
    flock, sweeps = fcntl.flock, []

    def sweeping(file, how):
        if how == fcntl.LOCK_EX and not sweeps:
            sweeps.append(1)
            OutputFolder(tmp_path).close()
        return flock(file, how)

    with OutputFolder(tmp_path) as folder:
        monkeypatch.setattr(fcntl, "flock", sweeping)
        folder.write("a.png", b"whole")
    assert sweeps and (tmp_path / "a.png").read_bytes() == b"whole"
    assert sorted(os.listdir(tmp_path)) == ["a.png", f"{NET}.py"]


def test_many_runs_write_to_one_folder(tmp_path):
    def work():
        for _ in range(60):
            with OutputFolder(tmp_path / "out") as folder:
                folder.write("index.html", b"x" * 1000)

    assert [os.waitpid(process, 0)[1] for process in [forked(work) for _ in range(4)]] == [0] * 4
    assert os.listdir(tmp_path / "out") == ["index.html"]


# ---- a folder that fails ---------------------------------------------------------------------------------


def at_turn(monkeypatch, turn, happening):
    """Let something happen when the analysis of that picture begins."""
    calls, original = [], analysis.project

    def project(*arguments, **options):
        calls.append(1)
        if len(calls) == turn:
            happening()
        return original(*arguments, **options)

    monkeypatch.setattr(analysis, "project", project)


@pytest.fixture
def three():
    return [picture(f"{name}.png", ord(name)) for name in "abc"]


@pytest.mark.parametrize("happening", [
    lambda: shutil.rmtree("out"),
    lambda: (shutil.rmtree("out"), os.mkdir("out")),
    lambda: (shutil.rmtree("out"), open("out", "w").close()),
], ids=["removed", "made anew", "a file in its place"])  # fmt: skip
def test_a_folder_that_disappears(three, capsys, monkeypatch, happening):
    at_turn(monkeypatch, 2, happening)
    assert run("project", *three, *TINY, "--json", "--out", "out") == 1
    printed = capsys.readouterr()
    assert printed.err == (
        "zfcore: error: out: 'out' was removed while it was written to, with all that was in it; run again, with a "
        "folder that stays\n"
        "zfcore: written: none; not written: 'b.png', 'c.png', errors.jsonl, results.json, index.html\n"
    )
    made = json.loads(printed.out)
    assert [result["path"] for result in made["results"]] == three[:1]
    assert [(failure["path"], failure["error"]) for failure in made["failures"]] == [
        ("b.png", "NotWritten"), ("c.png", "NotWritten"),
    ]  # fmt: skip
    assert not os.path.isdir("out") or os.listdir("out") == []


def test_a_working_folder_that_disappears(three, capsys, monkeypatch, tmp_path):
    os.mkdir("here")
    inputs = [os.path.abspath(path) for path in three]
    monkeypatch.chdir("here")
    at_turn(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "here"))
    assert run("project", *inputs, *TINY, "--out", "out") == 1
    assert f"not written: {inputs[1]!r}, {inputs[2]!r}, errors.jsonl" in capsys.readouterr().err


def test_a_disk_that_is_full_for_a_while(three, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    fsync = os.fsync
    at_turn(monkeypatch, 2, lambda: monkeypatch.setattr(os, "fsync", full))
    finish = OutputFolder.write

    def write(self, name, data):
        if name == "errors.jsonl":
            monkeypatch.setattr(os, "fsync", fsync)
        return finish(self, name, data)

    monkeypatch.setattr(OutputFolder, "write", write)
    assert run("project", *three, *TINY, "--out", "out") == 1
    assert capsys.readouterr().err == (
        "zfcore: error: out: 'out': 0002-b-project.png could not be written (No space left on device); make room "
        "there, or choose another folder\n"
        "zfcore: written: 'a.png'; not written: 'b.png', 'c.png'\n"
    )
    assert [failure["path"] for failure in failures("out")] == ["b.png", "c.png"] and paths("out") == ["a.png"]
    assert "2 inputs failed" in open("out/index.html").read()
    assert sorted(os.listdir("out")) == ["0001-a-project.png", "errors.jsonl", "index.html", "results.json"]


def test_each_of_many_that_are_not_written_is_named_somewhere(capsys, monkeypatch):
    many = [picture(f"{index}.png", index) for index in range(12)]
    at_turn(monkeypatch, 2, lambda: shutil.rmtree("out"))
    assert run("project", *many, *QUICK, "--out", "out") == 1
    lines = capsys.readouterr().err.splitlines()
    assert "not written: '1.png', '2.png', '3.png'" in lines[1] and "'8.png' and 3 more, errors.jsonl" in lines[1]
    assert lines[2:] == [f"zfcore: {path!r}: not written" for path in many[1:]]


@pytest.mark.parametrize("name, lost", [("index.html", []), ("results.json", []), ("errors.jsonl", []),
                                        ("0002-b-project.png", ["b.png"])])  # fmt: skip
def test_a_folder_in_the_place_of_a_file_stops_nothing_else(three, capsys, name, lost):
    os.makedirs(f"out/{name}")
    assert run("project", *three, *TINY, "--out", "out") == 1
    error = capsys.readouterr().err
    assert (
        f"out: 'out/{name}' is a folder, where a file of that name is written; remove or rename it, or choose" in error
    )
    assert "tmp" not in error
    files = {f"000{i}-{n}-project.png" for i, n in ((1, "a"), (2, "b"), (3, "c"))}
    files |= {"index.html", "results.json", "errors.jsonl"}
    assert {entry for entry in os.listdir("out") if os.path.isfile(f"out/{entry}")} == files - {name}
    if lost:
        assert [failure["path"] for failure in failures("out")] == lost and paths("out") == ["a.png", "c.png"]
    else:
        assert f"zfcore: written: 'a.png', 'b.png', 'c.png'; not written: {name}\n" in error


def test_a_folder_that_is_moved_keeps_its_results_and_that_is_said(three, capsys, monkeypatch):
    at_turn(monkeypatch, 2, lambda: os.rename("out", "elsewhere"))
    assert run("project", *three, *TINY, "--out", "out") == 0
    assert "note: out: 'out' was moved during the run; the results are where it is now" in capsys.readouterr().err
    assert paths("elsewhere") == three and not os.path.exists("out")


@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "make room there"), (errno.EDQUOT, "make room there"),
                                         (errno.EROFS, "make it writable"), (errno.EACCES, "make it writable"),
                                         (errno.EIO, "see whether its disk works")])  # fmt: skip
def test_errors_say_what_to_do(tmp_path, monkeypatch, code, words):
    with OutputFolder(tmp_path / "out") as folder:

        def fail(*_args, **_options):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OutputError) as caught:
            folder.write("index.html", b"x")
    assert str(caught.value) == (
        f"out: {str(tmp_path / 'out')!r}: index.html could not be written ({os.strerror(code)}); {words}, or choose "
        "another folder"
    )
    assert (caught.value.errno, caught.value.name, caught.value.only_this) == (code, "index.html", False)


def test_names_of_the_folder_are_printed_escaped(three, capsys):
    out = "a\x1b[2J\nb\u202e\u2028ü"
    assert run("project", *three, *QUICK, "--out", out) == 0
    printed = capsys.readouterr()
    assert printed.out == "3 pictures, 3 figures: a\\x1b[2J\\nb\\u202e\\u2028ü/index.html\n" and printed.err == ""
    page = open(os.path.join(out, "index.html")).read()
    assert not set(page) & set("\x1b\u202e")
    with pytest.raises(ArgumentError):
        OutputFolder("a\0b")
