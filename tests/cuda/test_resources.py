"""The CUDA sources compile for every architecture that we ship, and the compiler's own report has no spills.

Needs nvcc, and no GPU. What the machine code contains is read where cuobjdump is at hand; the triton
package has one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from driver import ROOT

# And their least number of kernels.
SOURCES = {"max_pool2d_with_switches": 28, "unpool_relu2d": 28, "paste_boxes": 8, "deconv_step": 22}
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# Three blocks of 256 threads still fit on a multiprocessor (64 Ki registers): enough to hide memory.
MAX_REGISTERS = 80
# Two blocks, where sums in registers bound the work.
MAX_REGISTERS_OF = {"deconv_step": 128}


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def cuobjdump() -> str | None:
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)


def readable(symbols: list[str]) -> list[str]:
    names = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout
    return names.splitlines()


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    text: str


ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers[^\n]*",
    re.DOTALL,
)


def parse(log: str) -> list[Kernel]:
    entries = list(ENTRY.finditer(log))
    assert len(entries) == log.count("Compiling entry function"), "the compiler's report was not understood"
    names = readable([entry["symbol"] for entry in entries])
    return [
        Kernel(
            name,
            entry["architecture"],
            *(int(entry[field]) for field in ("registers", "stack", "stores", "loads")),
            entry[0],
        )
        for name, entry in zip(names, entries, strict=True)
    ]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Every source's kernels on every architecture, and its fat binary. PTX for later GPUs is made too."""
    if nvcc() is None:
        pytest.skip("no CUDA compiler: nvcc is not on PATH, and CUDACXX and CUDA_HOME name none")
    folder = tmp_path_factory.mktemp("fatbin")
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHITECTURES]
    targets.append("-gencode=arch=compute_90,code=compute_90")
    options = ["-std=c++17", "-O3", "-DNDEBUG", "-Xptxas=-v", *targets, "-fatbin"]
    running = {
        name: subprocess.Popen(
            [nvcc(), *options, "-o", folder / f"{name}.fatbin", ROOT / f"csrc/{name}.cu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in SOURCES
    }
    kernels = {}
    for name, process in running.items():
        log, _ = process.communicate()
        assert process.returncode == 0, log
        assert "warning" not in log, log
        kernels[name] = parse(log)
    return kernels, folder


def test_every_kernel_is_there_for_every_architecture(compiled):
    kernels, _ = compiled
    for name in SOURCES:
        by_architecture = {
            arch: {k.name for k in kernels[name] if k.architecture == arch} for arch in ARCHITECTURES
        }
        assert len(by_architecture["sm_90a"]) >= SOURCES[name], by_architecture
        assert by_architecture["sm_80"] == by_architecture["sm_90a"] == by_architecture["sm_100"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_or_takes_a_stack(compiled, architecture):
    kernels, _ = compiled
    for name, kernel in ((name, k) for name in SOURCES for k in kernels[name] if k.architecture == architecture):
        assert kernel.stack == kernel.spill_stores == kernel.spill_loads == 0, kernel.text
        assert kernel.registers <= MAX_REGISTERS_OF.get(name, MAX_REGISTERS), kernel.text


def test_a_kernel_that_spills_is_found(tmp_path):
    """The report has to be able to fail: a kernel with a stack and more values than registers."""
    if nvcc() is None:
        pytest.skip("no CUDA compiler: nvcc is not on PATH, and CUDACXX and CUDA_HOME name none")
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) greedy(float* p, int n) {\n"
        "  float v[96];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) v[i] = p[i * n];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) p[i * n] = v[95 - i] * v[(i * 7) % 96];\n"
        "}\n"
    )
    command = [nvcc(), "-arch=sm_90a", "-O3", "-Xptxas=-v", "-cubin", "-o", tmp_path / "spills.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (kernel,) = parse(done.stdout + done.stderr)
    assert kernel.spill_stores > 0 and kernel.stack > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(compiled, architecture):
    """Packed kernels move 16 bytes an access, and no kernel uses an atomic or memory of its own threads."""
    if cuobjdump() is None:
        pytest.skip("no cuobjdump: it is neither on PATH nor in a triton package")
    _, folder = compiled
    for name in SOURCES:
        command = [cuobjdump(), "-sass", "-arch", architecture, folder / f"{name}.fatbin"]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        functions = re.split(r"^\s*Function : ", listing, flags=re.MULTILINE)[1:]
        assert len(functions) >= SOURCES[name]
        titles = readable([function.splitlines()[0].strip() for function in functions])
        for title, function in zip(titles, functions, strict=True):
            operations = set(re.findall(r"\b(LDG|STG|LDL|STL|ATOM|ATOMG|RED|REDG)\b([.\w]*)", function))
            kinds = {kind for kind, _ in operations}
            assert not kinds & {"LDL", "STL", "ATOM", "ATOMG", "RED", "REDG"}, title
            if "Packed" in title:
                wide = {kind for kind, suffix in operations if ".128" in suffix}
                assert "STG" in wide, title  # what it writes
                # what it reads, but a gather's far values and pictures of any layout
                assert "LDG" in wide or "pool_gather2d" in title or name == "paste_boxes", title


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_known_deconv_steps_multiply(compiled, architecture):
    """Their innermost loops are multiply-adds, nine of ten instructions, fed by vectors from shared memory."""
    if cuobjdump() is None:
        pytest.skip("no cuobjdump: it is neither on PATH nor in a triton package")
    _, folder = compiled
    command = [cuobjdump(), "-sass", "-arch", architecture, folder / "deconv_step.fatbin"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"^\s*Function : ", listing, flags=re.MULTILINE)[1:]
    titles = readable([function.splitlines()[0].strip() for function in functions])
    for kernel, taps in (("FixedConv<7, 2>", {16, 12, 9}), ("FixedConv<3, 1>", {9})):
        known = [function for title, function in zip(titles, functions, strict=True) if kernel in title]
        assert len(known) == 3  # fp32, bf16, fp16
        for function in known:
            reached = set()
            for loop in loops(function):
                multiply_adds = sum(operation == "FFMA" for operation in loop)
                if multiply_adds < 0.9 * len(loop):
                    continue
                assert multiply_adds % 48 == 0 and "LDS.128" in loop and not any("LDG" in o for o in loop)
                reached.add(multiply_adds // 48)  # taps, of 2 x 8 outputs of 3 channels
            assert reached == taps, kernel


def loops(function: str) -> list[list[str]]:
    """The operations from the target of each branch backwards to the branch."""
    at, operations, found = {}, [], []
    for line in function.splitlines():
        instruction = re.search(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", line)
        if instruction is None:
            continue
        at[int(instruction[1], 16)] = len(operations)
        operations.append(instruction[2])
        target = re.search(r"0x([0-9a-f]+)", instruction[3]) if instruction[2].startswith("BRA") else None
        if target and int(target[1], 16) in at:
            found.append(operations[at[int(target[1], 16)] :])
    return found
