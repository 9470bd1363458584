"""Shared by all tests: what is tested is an install whose native core loads, and each test starts from one seed."""

import random

import numpy
import pytest
import torch


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
def seeded():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
