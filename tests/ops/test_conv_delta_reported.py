"""What conv_delta gets wrong so far: arguments that end the process, or are taken and should not be."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
