"""The CPU kernels of every instruction set agree with the generic ones, on the processors that have it.

They are compiled here, from the source tree, with isa_agreement.cpp, which draws the cases and compares.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
KERNELS = [
    "max_pool2d_with_switches", "unpool_relu2d", "unpool_relu_conv_transpose2d", "deconv_step", "strongest",
    "conv_delta", "pool_delta", "lrn_delta", "relu_delta", "pointwise_delta",
    "conv_strongest", "paste_boxes",
]  # fmt: skip
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
OPTIONS = ["-std=gnu++17", "-O2", "-Wno-psabi", "-Wno-ignored-attributes", "-pthread"]


def instruction_sets():
    """Name -> (bytes in a vector, compiler options), as the build has them."""
    build = (ROOT / "CMakeLists.txt").read_text()
    found = re.findall(r"^\s*zf_add_isa\((\w+) (\d+)([^)]*)\)", build, re.MULTILINE)
    return {name: (size, options.split()) for name, size, options in found}


def options_of_sources():
    """Source -> what it alone is compiled with."""
    build = (ROOT / "CMakeLists.txt").read_text()
    found = re.findall(r"set_source_files_properties\(csrc/(\w+)\.cpp PROPERTIES COMPILE_OPTIONS (-[^)]*)\)", build)
    return {source: options.split() for source, options in found}


ISAS = instruction_sets()
OWN_OPTIONS = options_of_sources()
VECTOR_ISAS = [name for name in ISAS if name != "generic"]


def compile_with(*arguments):
    done = subprocess.run([*COMPILER, *OPTIONS, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(done.args)}\n{done.stderr}"


def compiler_knows(options):
    probe = [*COMPILER, *options, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(probe, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The program, and the instruction sets that are in it."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"there is no C++ compiler {COMPILER[0]} here; CXX names another")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{platform.machine()} has the generic kernels alone")
    folder = tmp_path_factory.mktemp("isa_agreement")
    isas = [name for name, (_, options) in ISAS.items() if compiler_knows(options)]
    jobs, objects = [], []

    def add(name, *arguments):
        objects.append(folder / f"{name}.o")
        jobs.append([*arguments, "-c", "-o", objects[-1]])

    have = [f"-DZF_HAVE_{name.upper()}" for name in isas]
    add("driver", f"-I{SOURCES}", *have, Path(__file__).with_name("isa_agreement.cpp"))
    add("dispatch", *have, SOURCES / "dispatch.cpp")
    add("parallel", SOURCES / "parallel.cpp")
    for isa in isas:
        size, options = ISAS[isa]
        for kernel in KERNELS:
            defines = [f"-DZF_ISA={isa}", f"-DZF_VECTOR_BYTES={size}"]
            add(f"{isa}-{kernel}", *defines, *options, *OWN_OPTIONS.get(kernel, []), SOURCES / f"{kernel}.cpp")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job in [pool.submit(compile_with, *arguments) for arguments in jobs]:
            job.result()
    program = folder / "isa_agreement"
    compile_with(*objects, "-o", program)
    return program, isas


def run(built, isa, *arguments):
    program, isas = built
    if isa not in isas:
        pytest.skip(f"{COMPILER[0]} does not know {' '.join(ISAS[isa][1])}")
    done = subprocess.run([program, isa, *arguments], capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    return done


def counts(output):
    """(comparisons, mismatches) of the pooling ops, of the fused step, and of the ops on changes."""
    return [tuple(map(int, pair)) for pair in re.findall(r"(\d+) comparisons, (\d+) mismatches", output)]


def test_the_build_has_kernels_to_compare():
    assert {"avx2", "avx512"} <= set(VECTOR_ISAS)
    assert "generic" in ISAS
    assert OWN_OPTIONS["lrn_delta"] == ["-fno-math-errno"]
    assert OWN_OPTIONS["pointwise_delta"] == ["-ffp-contract=off"]


@pytest.mark.parametrize("isa", VECTOR_ISAS)
def test_kernels_agree_with_the_generic_ones(built, isa):
    done = run(built, isa)
    assert done.returncode == 0, done.stdout + done.stderr
    (pooling, pooling_wrong), (fused, fused_wrong), (changes, changes_wrong) = counts(done.stdout)
    assert pooling > 3000 and fused > 700 and changes > 1300
    assert pooling_wrong == fused_wrong == changes_wrong == 0


@pytest.mark.parametrize("isa", VECTOR_ISAS)
def test_every_comparison_notices_a_spoilt_result(built, isa):
    done = run(built, isa, "planted")
    assert done.returncode == 1, done.stdout + done.stderr
    for comparisons, mismatches in counts(done.stdout):
        assert comparisons == mismatches > 0
