"""Switches that another thread writes to while ops read them: nothing leaves an op's memory, and the kernels' own threads
do not race. race_switches.cpp is compiled here with the kernels, once for each sanitizer, and must also fail where a race
is planted.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "csrc" / f"{name}.cpp" for name in ("unpool_relu2d", "unpool_relu_conv_transpose2d", "deconv_step", "parallel")]
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
OPTIONS = ["-std=gnu++17", "-O1", "-g1", "-Wno-psabi", "-Wno-ignored-attributes", "-pthread"]
OPTIONS += ["-DZF_ISA=generic", "-DZF_VECTOR_BYTES=16", f"-I{ROOT / 'csrc'}"]
SECONDS = os.environ.get("ZFCORE_RACE_SECONDS", "1")

# Only the writer itself may be seen racing with an op: by its name.
SUPPRESSED = "race:write_switches\nrace:restore_switches_write\n"


@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def program(request, tmp_path_factory):
    """How to run it under that sanitizer: its name, the command and the environment."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler {COMPILER[0]!r}")
    folder = tmp_path_factory.mktemp("race")
    binary, suppressed = folder / "race", folder / "suppressed"
    suppressed.write_text(SUPPRESSED)
    sources = [Path(__file__).with_name("race_switches.cpp"), *SOURCES]
    sanitize = [f"-fsanitize={request.param}", "-fno-sanitize-recover=undefined"]
    done = subprocess.run([*COMPILER, *OPTIONS, *sanitize, *map(str, sources), "-o", str(binary)], capture_output=True, text=True)
    if re.search(r"cannot find .*lib(tsan|asan|ubsan)", done.stderr):
        pytest.skip(f"the compiler has no -fsanitize={request.param}")
    assert done.returncode == 0, done.stderr[-3000:]
    command = [str(binary)]
    if request.param == "thread" and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # the thread sanitizer needs addresses that are not too random
    environment = {**os.environ, "TSAN_OPTIONS": f"suppressions={suppressed}:halt_on_error=1:exitcode=66:history_size=7"}
    return request.param, command, environment


def run(command, environment, argument):
    for _ in range(3):
        done = subprocess.run([*command, argument], env=environment, capture_output=True, text=True, timeout=300)
        if "failed to restore the stack" not in done.stderr:
            break  # else it is not known who wrote, which may well be the writer
    if "unexpected memory mapping" in done.stderr or "failed to set personality" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel")
    return done


def test_switches_that_change_during_a_call(program):
    _, command, environment = program
    done = run(command, environment, SECONDS)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"


def test_a_race_between_the_kernels_threads_would_be_seen(program):
    sanitizer, command, environment = program
    if sanitizer != "thread":
        pytest.skip("races are the thread sanitizer's business")
    done = run(command, environment, "planted")
    assert done.returncode == 66 and "data race" in done.stderr
