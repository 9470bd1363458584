"""Arguments of conv_delta that must not end the process, nor be taken."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest

AWAY = tempfile.gettempdir()  # not the source tree, which would hide the install
START = """
import torch
from zfcore.ops.conv_delta import ConvChange, Places, conv_delta, delta_filters

def run(delta, weight, groups=1, kernel=(1, 1), stride=(1, 1), dilation=(1, 1), packed_in=None):
    zero = torch.zeros(len(delta), 2, dtype=torch.int64)
    filters = delta_filters(weight, groups=packed_in or groups)
    step = ConvChange((kernel, stride, (0, 0), dilation), groups, (4, 4), (4, 4))
    return conv_delta(delta, filters, step, Places(zero[:, 0], zero, zero, (4, 4)))

torch.manual_seed(0)
"""


@pytest.mark.parametrize(
    "call",
    [
        "run(torch.zeros(2, 0, 2, 2), torch.zeros(4, 0, 1, 1))",
        "run(torch.zeros(2, 32, 0, 2), torch.zeros(4, 32, 1, 1))",
        "run(torch.zeros(2, 32, 2, 0), torch.zeros(4, 32, 1, 1))",
        "run(torch.zeros(2, 32, 2, 2), torch.zeros(4, 32, 1, 1), stride=(0, 1))",
        "run(torch.zeros(2, 3, 2, 2), torch.zeros(4, 3, 1, 1), stride=(1, 0))",
    ],
    ids=["no channels", "no rows", "no columns", "stride 0", "stride 0 of a picture"],
)
def test_what_is_empty_does_not_end_the_process(call):
    """An answer or a typed error."""
    code = f"{START}\ntry:\n    {call}\nexcept (ValueError, TypeError):\n    pass\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=AWAY)
    assert done.returncode == 0, done.stderr or f"signal {-done.returncode}"


def test_filters_that_are_packed_for_other_groups_are_refused():
    """Their packing is read in another order, and past its end."""
    code = f"""{START}
delta, weight = torch.randn(2, 80, 2, 2), torch.randn(24, 40, 1, 1)
want = run(delta, weight, groups=2)
try:
    ours = run(delta, weight, groups=2, packed_in=1)
except (ValueError, TypeError):
    pass
else:
    assert torch.equal(ours, want), (ours - want).abs().max()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=AWAY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("place", [2**63 - 1, -(2**63)])
@pytest.mark.parametrize("op", ["conv", "relu", "pool"])
def test_places_at_the_ends_of_int64_are_refused(op, place):
    """A sum that wraps around looks as if the patch were inside; to the undefined behaviour sanitizer both are errors."""
    code = f"""{START}
from zfcore.ops.pool_delta import pool_delta
from zfcore.ops.relu_delta import relu_delta
from zfcore.reference._params import Limits
zero = torch.zeros(2, 2, dtype=torch.int64)
delta, maps, window = torch.randn(2, 32, 2, 2), torch.randn(1, 32, 4, 4), ((1, 1), (1, 1), (0, 0), (1, 1))
at = Places(zero[:, 0], zero + {place}, zero, (2, 2))
try:
    if "{op}" == "conv":
        conv_delta(delta, delta_filters(torch.randn(4, 32, 1, 1)), ConvChange(window, 1, (4, 4), (4, 4)), at)
    elif "{op}" == "relu":
        relu_delta(delta, maps, Limits(), at)
    else:
        pool_delta(delta, maps, maps, window, at)
except ValueError:
    raise SystemExit(0)
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=AWAY)
    assert done.returncode == 0, done.stderr or f"exit status {done.returncode}"
