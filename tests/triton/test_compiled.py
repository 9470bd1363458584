"""Every configuration of the Triton kernels compiles for every GPU that we ship for, and spills nothing.

Ahead of time, from the kernels as they are: needs no GPU.
"""

from __future__ import annotations

import json

import pytest

# What a block may use: the architectures' shared memory in bytes.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # 80's serve 86 and 89, too
SCRIPTS = ("compiled.py", "compiled_steps.py", "compiled_pool.py")
PRODUCTS = ("conv_delta", "conv_delta thin", "conv_boxes", "deconv_step")
APART = "deconv_step apart"  # one unit at a time, as zeros are left out
ELEMENTWISE = (
    "conv_delta_depthwise", "pool_delta", "lrn_delta", "relu_delta", "pointwise_delta gelu", "pointwise_delta softplus",
    "pointwise_delta tanh", "pointwise_delta sqrt",
)  # fmt: skip
POOLING = ("max_pool2d_with_switches", "max_pool2d_with_switches apart")  # where outputs share a place, and elsewhere
ELEMENTWISE_REGISTERS = 128  # four blocks of four warps still fit: enough to hide memory


@pytest.fixture(scope="module")
def compiled(start):
    """What the compilers say of each kernel, by architecture."""
    running = {(n, script): start(script, str(n), interpreted=False) for n in SHARED for script in SCRIPTS}
    found = {capability: [] for capability in SHARED}
    try:
        for (capability, _), process in running.items():
            output, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            found[capability] += json.loads(output)
    finally:
        for process in running.values():
            process.kill()
    return found


def label(kernel: dict) -> str:
    return f"{kernel['kernel']} {kernel['precision']} {kernel['config']} for sm_{kernel['capability']}: {kernel}"


@pytest.mark.parametrize("capability", SHARED)
def test_nothing_spills_and_all_fits(compiled, capability):
    assert {k["kernel"] for k in compiled[capability]} == {*PRODUCTS, APART, *ELEMENTWISE, *POOLING}
    for kernel in compiled[capability]:
        assert kernel["instructions"] > 50 and not kernel["spills"], label(kernel)
        assert kernel["shared"] <= SHARED[capability], label(kernel)
        warps = 2 if kernel["kernel"] in ELEMENTWISE else 1 if kernel["kernel"] in POOLING else 3
        assert kernel["registers"] * 32 * kernel["config"][warps] <= 65536, label(kernel)
        if kernel["kernel"] in (*ELEMENTWISE, *POOLING):
            assert kernel["registers"] <= ELEMENTWISE_REGISTERS, label(kernel)


@pytest.mark.parametrize("capability", SHARED)
def test_the_product_runs_on_the_tensor_cores_where_it_may(compiled, capability):
    """By Hopper's and Blackwell's own instructions, which read their factors where the copies put them."""
    unit = {80: "mma_sync", 90: "wgmma", 100: "tcgen05", 120: "mma_sync"}[capability]
    for kernel in compiled[capability]:
        if kernel["kernel"] in PRODUCTS:
            assert (kernel[unit] > 0) == (kernel["precision"] != "ieee"), label(kernel)


@pytest.mark.parametrize("capability", SHARED)
def test_memory_moves_16_bytes_at_a_time(compiled, capability):
    """Where channels are multiples of 16: patches and filters into shared memory, and values of other kernels."""
    for kernel in compiled[capability]:
        if kernel["kernel"] == "conv_delta":
            assert kernel["copies"] == ["0x10"], label(kernel)
        elif kernel["kernel"] in ELEMENTWISE:
            assert kernel["wide"] >= 3, label(kernel)
        elif kernel["kernel"] == POOLING[0]:  # each tap and the result; taps in a loop are read in one place
            assert kernel["wide"] >= (1 + kernel["taps"] if kernel["unrolled"] else 2), label(kernel)
        elif kernel["kernel"] == "deconv_step" and not kernel["thin"]:  # a signal and filters, or each window's, too
            assert kernel["wide"] >= 2, label(kernel)


def test_tiles_are_looked_up_for_every_gpu(start):
    """Of a GPU that the table does not name, the nearest below it; the largest tile that still leaves enough programs."""
    from zfcore.kernels.conv_delta import CONFIGS, THIN, config_of, configs

    assert set(CONFIGS) == set(SHARED)
    for capability, named in {75: 80, 80: 80, 86: 80, 89: 80, 90: 90, 100: 100, 103: 100, 110: 100, 120: 120, 121: 120}.items():
        for precision in ("ieee", "tf32", "bf16"):
            assert configs(precision, capability) == CONFIGS[named][precision]
            assert configs(precision, capability, thin=True) == THIN[precision]
    small, middle, large = configs("bf16", 90)
    assert [config_of("bf16", 256, rows, 90) for rows in (1, 4096, 10**6)] == [small, middle, large]
    assert config_of("bf16", 40, 10**6, 90) == small and config_of("bf16", 256, 10**6, 120) == middle


def test_numbers_that_are_one_are_constants(start):
    """So a launch has it; then what is a tensor of numbers elsewhere is a number of Python's in a kernel."""
    for script, count in zip(SCRIPTS, (21, 3, 3), strict=True):
        process = start(script, "90", "ones", interpreted=False)
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        assert json.loads(output) == count
