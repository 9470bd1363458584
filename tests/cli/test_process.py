"""The command as a process of its own: streams that are closed, full or broken, models that do to it what they like."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from commands import picture, run

import zfcore

pytestmark = pytest.mark.usefixtures("networks")

SOURCE = os.path.dirname(os.path.dirname(zfcore.__file__))
# As the console script that an install makes: the current folder is not on the path.
SCRIPT = "import sys; sys.path[:] = [p for p in sys.path if p]; from zfcore.cli import main; sys.exit(main())"
QUICK = "project a.png b.png --model here:make --input-size 12 --layer 0 --top 1 --device cpu --out out"

HERE = """
    import atexit, ctypes, logging, os, subprocess, sys, threading, time
    import torch
    from torch import nn
    import helper

    print("printed at import")

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    def noisy():
        libc = ctypes.CDLL(None)
        print("from Python")
        sys.stdout.buffer.write(b"from a buffer")
        sys.__stdout__.write("from the first stdout")
        os.write(1, b"from a descriptor")
        libc.printf(b"from C")
        os.system("echo from a child")
        logging.basicConfig(stream=sys.stdout, level=0)
        logging.info("from a log")
        atexit.register(print, "at exit")
        atexit.register(os.write, 1, b"at exit, a descriptor")
        atexit.register(libc.printf, b"at exit, C")
        return make()

    def replaces():
        sys.stdout = open("log.txt", "w")
        sys.stderr = None
        print("to the log")
        return make()

    def closes():
        sys.stdout.close(), sys.stderr.close()
        return make()

    def ticks():
        def tick():
            for _ in range(300):
                print("tick")
                time.sleep(0.005)
        threading.Thread(target=tick, daemon=True).start()
        return make()

    def asks():
        return make() if input("which? ") else None

    def reads():
        return make() if os.read(0, 1) == b"" and sys.stdin.read() == "" else None
"""


@pytest.fixture
def shell(tmp_path):
    """Run a line of bash in the folder of the test, in which `zfcore` is the command: (code, stdout, stderr)."""
    (tmp_path / "here.py").write_text(textwrap.dedent(HERE))
    (tmp_path / "helper.py").touch()
    for seed, name in enumerate("ab"):
        picture(tmp_path / f"{name}.png", seed, (12, 12, 3))

    def line(text, **environment):
        function = f"zfcore() {{ '{sys.executable}' -c '{SCRIPT}' \"$@\"; }}; set -o pipefail; "
        environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", **environment}
        made = subprocess.run(
            ["bash", "-c", function + text], capture_output=True, stdin=reader, env=environment, timeout=120
        )
        return made.returncode, made.stdout, made.stderr

    reader, writer = os.pipe()  # stdin stays open, and nothing comes
    yield line
    os.close(reader), os.close(writer)


# A command without a network, which takes seconds to import: a bar, messages, what others print, and results.
SMALL = """
import os, sys
from tqdm.auto import tqdm
from zfcore.console import Console
with Console("small: ", own=True) as console, console.results_only():
    for turn in tqdm(range(3)):
        console.complain(f"turn {turn}")
        print("printed"), os.system("echo child 2>&-")
        sys.stderr.write("to stderr"), sys.stderr.flush()
    console.say('"' + "x" * 200_000 + '"')
    console.say("")
    with console.lent():
        assert sys.stdin.read() == "" and os.read(0, 1) == b""
    open("done", "x").write(str(console.lost is None))
print("after it")
"""


@pytest.mark.parametrize(
    "streams, printed, lost",
    [
        ("", True, False),
        ("2>&-", True, False),
        ("2>/dev/full", True, False),
        ("2> >(true)", True, False),
        ("<&-", True, False),
        (">&-", False, False),
        ("<&- >&- 2>&-", False, False),
        (">/dev/full", False, True),
        (">/dev/full 2>&1", False, True),
        ("2>&1 | true", False, False),
        ("| true", False, False),
        ("| head -c 1 >/dev/null", False, False),
        ("2>/dev/null | (sleep 0.3; cat)", True, False),  # more than a pipe holds
    ],
)
def test_streams_that_fail_end_nothing(shell, streams, printed, lost):
    made, out, err = shell(
        f"'{sys.executable}' -c '{SMALL.replace(chr(39), chr(39) + chr(92) + chr(39) * 2)}' {streams}"
    )
    assert made == 0 and b"Traceback" not in err and b"Exception" not in err
    assert open("done").read() == str(not lost)
    assert out == (b'"%s"\n\n' % (b"x" * 200_000) if printed else b"")
    assert (b"small: error: stdout could not be written to (No space left on device)\n" in err) == (
        lost and "2>" not in streams
    )


@pytest.mark.parametrize("streams, code", [("2>&-", 0), ("2>&1 | true", 0), (">/dev/full", 1)])
def test_a_run_on_such_streams_writes_all_its_files(shell, streams, code):
    made, out, err = shell(f"zfcore {QUICK} --json {streams}")
    assert made == code and b"Traceback" not in err and b"Exception" not in err
    assert sorted(os.listdir("out")) == [
        "0001-a-project.png", "0002-b-project.png", "errors.jsonl", "index.html", "results.json",
    ]  # fmt: skip
    assert len(json.load(open("out/results.json"))["results"]) == 2
    assert streams != "2>&-" or len(json.loads(out)["results"]) == 2


def test_help_on_streams_that_fail(shell):
    assert shell("zfcore --help >/dev/full; a=$?; zfcore paint 2>&-; echo $a $?") == (0, b"0 2\n", b"")


@pytest.mark.parametrize("factory", ["noisy", "replaces", "closes", "ticks", "reads"])
def test_stdout_is_json_whatever_a_model_prints(shell, factory):
    made, out, err = shell(f"zfcore {QUICK.replace('make', factory)} --json --no-progress")
    assert made == 0 and len(json.loads(out)["results"]) == 2 and b"printed at import\n" in err
    if factory == "noisy":
        for words in ("Python", "a buffer", "the first stdout", "a descriptor", "C", "a child", "a log"):
            assert f"from {words}".encode() in err
        for words in ("at exit\n", "at exit, a descriptor", "at exit, C"):
            assert words.encode() in err


def test_nobody_waits_for_an_answer(shell):
    made, out, err = shell(f"zfcore {QUICK.replace('make', 'asks')} --no-progress")
    assert made == 2 and out == b"" and b"which? " in err and b"the factory failed: EOFError" in err


def test_ascii_terminals_and_names_of_no_encoding(shell):
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = QUICK.replace("b.png --model", "$'\\xff\\xe9.png' ü.png --model").replace("out out", "out $'o\\xff-ü'")
    os.link("b.png", b"\xff\xe9.png")
    made, out, err = shell(f"zfcore {command} --no-progress", **plain)
    assert made == 1 and err == b"printed at import\nzfcore: '\\udcc3\\udcbc.png': no such file\n"
    assert out == b"2 pictures, 2 figures, 1 failed (errors.jsonl lists them): o\\udcff-\\udcc3\\udcbc/index.html\n"
    made, out, err = shell(f"zfcore {command} --json", **plain)
    assert made == 1 and out.isascii()
    # No half of a surrogate pair, which other readers of JSON refuse.
    assert [result["path"] for result in json.loads(out)["results"]] == ["a.png", "\\udcff\\udce9.png"]
    assert open(os.path.join("o\udcff-ü", "index.html"), encoding="utf-8").read().count("<figure>") == 2


def test_models_of_this_folder_and_files_that_hide_others(shell):
    """Both ways to run it find the folder's own module; a file named like the library's modules is not imported."""
    for name in ("torch", "numpy", "PIL", "tqdm", "nothing"):
        with open(f"{name}.py", "w") as file:
            file.write("raise SystemError('the wrong file')")
    made, _, err = shell(f"zfcore {QUICK} --no-progress && '{sys.executable}' -m zfcore {QUICK} --no-progress")
    assert made == 0 and err == b"printed at import\n" * 2
    made, _, err = shell(f"zfcore {QUICK.replace('here:make', 'torch.nn:Flatten')}")
    assert made == 2 and b"note: model: 'torch' is " in err and b"of the current folder has the same name" in err
    made, _, err = shell(f"zfcore {QUICK.replace('here', 'nothing')}")
    assert made == 2 and b"importing nothing failed: SystemError: the wrong file" in err


def test_the_current_folder_leaves_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    picture("a.png")
    options = ("--model", "zfcore_test_networks:tiny", "--input-size", 12, "--no-progress", "--out", "out")
    assert run("project", "a.png", *options) == 0
    assert str(tmp_path) not in sys.path
