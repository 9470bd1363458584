"""Fixtures of the CUDA tests. The samples and the oracle are those of the op tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

import driver as host_driver  # noqa: E402


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """The kernels' bodies, run on the CPU."""
    if host_driver.compiler() is None:
        pytest.skip("no C++ compiler: neither CXX nor g++ is there to build the host driver with")
    return host_driver.Driver(host_driver.build(tmp_path_factory.mktemp("host_driver")))
