"""On a machine without a GPU the CUDA kernels are there, and calling one says clearly what is missing."""

from __future__ import annotations

import pytest
import torch

from zfcore import _C

POOL = ((2, 2), (2, 2), (0, 0), (1, 1))
IDENTITY = ((1, 1), (1, 1), (0, 0), (1, 1))
INDICES = [torch.zeros(1, n, dtype=torch.int64) for n in (1, 2, 4)]  # of one patch: image, origin, box


@pytest.fixture
def views():
    if not _C.build_info()["with_cuda"]:
        pytest.skip("zfcore._C was built without CUDA")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    x, y = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)
    tensors = ((x, 0), (y, 0), (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 4))
    return [(t.data_ptr(), code, tuple(t.shape), t.stride()) for t, code in tensors]


OPS = ["max_pool2d_with_switches", "unpool_relu2d", "pool_gather2d", "paste_boxes", "deconv_step"]


@pytest.mark.parametrize("op", OPS)
def test_the_error_names_the_op_and_what_is_missing(views, op):
    x, y, switches = views
    arguments = {
        "max_pool2d_with_switches": (x, y, switches, POOL),
        "unpool_relu2d": (y, switches, x, POOL, True, False, 0),
        "pool_gather2d": (x, switches, y, POOL, False, 0),
        "paste_boxes": ((x, x, y, *(t.data_ptr() for t in INDICES)),),
        "deconv_step": (y, switches, None, 0, 0, x, 0, 0, 0, (4, 4), (4, 4), POOL, IDENTITY, True, False, False),
    }[op]
    missing = "has no NVIDIA driver|NVIDIA driver finds no GPU|older than the CUDA"
    with pytest.raises(RuntimeError, match=rf"^zfcore: {op} on cuda:0: .*({missing})"):
        getattr(_C, f"{op}_cuda")(*arguments, 0, 0)
