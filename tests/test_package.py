"""The install: versions agree, importing is cheap and touches no GPU, and the environment report tells the truth."""

import subprocess
import sys
import tempfile
from importlib.metadata import requires, version

import torch

import zfcore
from zfcore import _C


def run(*arguments: str) -> str:
    """A Python of its own, away from the source tree, which would hide the install."""
    command = [sys.executable, *arguments]
    away = tempfile.gettempdir()
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=away).stdout


def test_versions_agree():
    assert zfcore.__version__ == version("zfcore") == _C.build_info()["version"]


def test_every_public_name_resolves():
    for name in zfcore.__all__:
        assert getattr(zfcore, name) is not None
    assert set(zfcore.__all__) <= set(dir(zfcore))


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(zfcore, "deconv_projekt")


def test_import_is_lazy_and_leaves_the_gpu_alone():
    out = run(
        "-c",
        "import sys, zfcore; lazy = 'torch' not in sys.modules;"
        "import zfcore.ops, torch; print(lazy, torch.cuda.is_initialized())",
    )
    assert out.split() == ["True", "False"]


def test_run_time_dependencies_are_the_documented_ones():
    names = {r.split(";")[0].split(">")[0].strip() for r in requires("zfcore") if "extra ==" not in r}
    assert names == {"torch", "triton", "numpy", "pillow", "tqdm", "safetensors"}


def test_the_environment_report():
    out = run("-m", "zfcore.env")
    assert f"zfcore      {zfcore.__version__}" in out
    assert torch.__version__.split("+")[0] in out
    assert f"in use {_C.cpu_isa()}" in out
    for name, status in zfcore.backends().items():
        line = next(line for line in out.splitlines() if line.startswith(f"  {name} "))
        assert "available" in line if status.available else status.reason in line


def test_one_openmp_runtime_is_loaded():
    """Two runtimes would mean two thread pools that fight over the cores, and torch.set_num_threads ignored."""
    if not sys.platform.startswith("linux") or not _C.build_info()["openmp"]:
        import pytest

        pytest.skip("reads /proc/self/maps of an OpenMP build, so Linux only")
    for first, second in (("torch", "zfcore._C"), ("zfcore._C", "torch")):
        out = run(
            "-c",
            f"import {first}, {second};"
            "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l}))",
        )
        assert out.strip() == "1"
