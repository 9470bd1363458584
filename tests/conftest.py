"""Shared by all tests: what is tested is an install whose native core loads, and each test starts from one seed.

--no-skips is for a machine that has everything, a GPU above all: a test that is skipped there has failed, since a check
that did not run proves nothing.
"""

import random

import numpy
import pytest
import torch

# Reasons of skips that say nothing of the machine.
HELD_ELSEWHERE = (
    "one GPU: nothing to switch between",
    "the CUDA kernels never read back",
    "the CUDA kernels leave bad switches out",
    "the arguments are checked before any kernel",
    "set ZFCORE_LARGE=1",
    "ZFCORE_ATTACK=1",
)


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="a test that this machine skips fails")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.config.option.no_skips and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(call.excinfo.value)
        if not any(known in reason for known in HELD_ELSEWHERE):
            report.outcome, report.longrepr = "failed", f"skipped, which --no-skips forbids: {reason}"
    return report


def pytest_configure(config):
    try:
        import zfcore._C  # noqa: F401
    except ImportError as error:
        import zfcore

        raise pytest.UsageError(
            f"zfcore is imported from {list(zfcore.__path__)[0]} and its native core does not load ({error}). "
            "Install it first (pip install . or pip install -e .) and run pytest, not python -m pytest, so that "
            "the source tree does not hide the install."
        ) from error


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """No test leaves a mode of torch's behind, which would change what the tests after it see."""
    yield
    assert torch._C._is_torch_function_enabled(), "torch functions are left disabled"
    assert not torch._C._len_torch_dispatch_stack() and not torch._C._len_torch_function_stack(), "a mode is left on"
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), "gradients are left off"


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
