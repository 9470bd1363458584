"""What products of fp32 may round to within a call, and that the process's switches are as before afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
from zfcore.network import arithmetic, exact_arithmetic

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def switches() -> tuple:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32", cudnn.deterministic


@pytest.fixture(params=["highest", "high", "medium", "newer"])
def before(request):
    """The switches before a call: turned by torch's older or its newer interface."""
    matmul = torch.backends.cuda.matmul
    if request.param == "newer":
        old, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    else:
        old = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(request.param)
    own = torch.backends.mkldnn.matmul.fp32_precision
    yield switches()
    assert torch.backends.mkldnn.matmul.fp32_precision == own
    if request.param == "newer":
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):  # so the call could not ask for it
            torch.get_float32_matmul_precision()
        matmul.fp32_precision = old
    else:
        assert torch.get_float32_matmul_precision() == request.param
        torch.set_float32_matmul_precision(old)


@pytest.mark.parametrize("owner", [torch.backends, torch.backends.cudnn], ids=["of all", "of cudnn"])
def test_a_wider_switch_is_narrowed(owner):
    """What convolutions inherit from it the older switches do not turn."""
    every = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
    olds = [switch.fp32_precision for switch in every]
    old, owner.fp32_precision = owner.fp32_precision, "tf32"
    try:
        start = switches()
        assert start[1]
        with exact_arithmetic(GPU):
            assert switches() == (False, False, True) and not torch.backends.cudnn.allow_tf32
        assert switches() == start and owner.fp32_precision == "tf32"
    finally:
        owner.fp32_precision = old
        for switch, value in zip(every, olds, strict=True):
            switch.fp32_precision = value


def test_exact_products(before):
    with exact_arithmetic(GPU):
        assert switches() == (False, False, True)
    assert switches() == before
    with pytest.raises(ZeroDivisionError), arithmetic(GPU, "exact"):
        assert switches() == (False, False, True)
        raise ZeroDivisionError
    assert switches() == before


def test_tf32_products(before):
    with arithmetic(GPU, "tf32"):
        assert switches() == (True, True, True)
    assert switches() == before
    with arithmetic(CPU, "tf32"):  # which has none
        assert switches() == (False, False, True)
    assert switches() == before


def test_while_any_call_wants_exact_products_all_have_them(before):
    entered, leave = threading.Event(), threading.Event()

    def other():
        with exact_arithmetic(GPU):
            entered.set()
            leave.wait(10)

    with arithmetic(GPU, "tf32"):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10) and switches() == (False, False, True)
        with arithmetic(GPU, "tf32"):
            assert switches() == (False, False, True)
        leave.set()
        thread.join()
        assert switches() == (True, True, True)
    assert switches() == before


def test_bf16_is_autocast():
    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), exact_arithmetic(CPU):
        assert (x @ x).dtype == torch.float32
    with arithmetic(CPU, "bf16"):
        assert (x @ x).dtype == torch.bfloat16
    assert (x @ x).dtype == torch.float32


def test_convolutions_that_are_set_apart_from_rnns():
    """Then the older switch cannot be read."""
    cudnn = torch.backends.cudnn
    old, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "ieee"
    try:
        for precision, tf32 in (("exact", False), ("tf32", True)):
            with arithmetic(GPU, precision):
                assert switches() == (tf32, tf32, True)
            assert cudnn.conv.fp32_precision == "ieee"
    finally:
        cudnn.conv.fp32_precision = old
