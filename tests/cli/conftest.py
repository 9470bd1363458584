"""Fixtures of the command's tests."""

import sys

import pytest
import torch
from commands import NET, NETWORKS


@pytest.fixture(scope="module")
def one_thread():
    """Maps of a few kilobytes: with more threads, most of the time goes in threads waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def networks(one_thread, tmp_path, monkeypatch):
    """The module of factories on the path, and the folder of the test as the working folder."""
    (tmp_path / f"{NET}.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, NET, raising=False)
    monkeypatch.chdir(tmp_path)
