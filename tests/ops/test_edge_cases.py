"""The cases where pooling, unpooling and transposed convolution go wrong elsewhere, one test each."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from samples import LAYOUTS, lay_out

import zfcore.ops as ops
from zfcore.errors import ArgumentError, DtypeError, ShapeError, SwitchError

NAN, INF = math.nan, math.inf


def on(backend, values, dtype=torch.float32):
    """A map [1, 1, H, W] with these rows."""
    return torch.tensor([[values]], dtype=dtype, device=backend.device)


def pooled(backend, values, *args, **kwargs):
    y, switches = ops.max_pool2d_with_switches(on(backend, values), *args, **kwargs)
    return y.cpu(), switches.cpu()


def bytes_on(backend, rows):
    return on(backend, rows, torch.uint8)


def is_minus_zero(x):
    return bool(((x == 0) & torch.signbit(x)).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 8, 19])
def test_01_all_equal_gives_the_first_tap(backend, layout, channels):
    x = lay_out(torch.full((2, channels, 7, 7), 0.5), layout).to(backend.device)
    _, switches = ops.max_pool2d_with_switches(x, 3, 2)
    assert not switches.any()


def test_02_minus_zero_before_zero_stays(backend):
    y, switches = pooled(backend, [[-0.0, 0.0], [0.0, -0.0]], 2)
    assert is_minus_zero(y) and switches.item() == 0
    y, switches = pooled(backend, [[0.0, -0.0], [-0.0, -0.0]], 2)
    assert not is_minus_zero(y) and switches.item() == 0


@pytest.mark.parametrize("place", range(9))
def test_03_one_nan_wins(backend, place):
    values = torch.arange(9.0)
    values[place] = NAN
    y, switches = pooled(backend, values.view(3, 3).tolist(), 3)
    assert y.isnan().all() and switches.item() == place


@pytest.mark.parametrize("channels", [1, 8, 19])
def test_04_the_last_of_several_nans_wins(backend, channels):
    x = torch.zeros(1, channels, 3, 3)
    x[:, :, 0, 1] = x[:, :, 1, 2] = x[:, :, 1, 0] = NAN
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y, switches = ops.max_pool2d_with_switches(x.to(backend.device, memory_format=memory_format), 3)
        assert y.isnan().all() and (switches == 5).all()


def test_05_nan_wins_over_inf(backend):
    y, switches = pooled(backend, [[INF, NAN], [INF, INF]], 2)
    assert y.isnan().all() and switches.item() == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_06_all_minus_inf_gives_the_first_tap(backend, layout, dtype):
    x = lay_out(torch.full((1, 9, 6, 6), -INF, dtype=dtype), layout).to(backend.device)
    y, switches = ops.max_pool2d_with_switches(x, 3, 3)
    assert (y == -INF).all() and not switches.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_07_all_minus_inf_with_padding_gives_the_first_tap_in_the_map(backend, layout):
    x = lay_out(torch.full((1, 9, 5, 5), -INF), layout).to(backend.device)
    y, switches = ops.max_pool2d_with_switches(x, 3, 2, 1)
    assert (y == -INF).all()
    expected = torch.tensor([[4, 3, 3], [1, 0, 0], [1, 0, 0]], dtype=torch.uint8)
    assert torch.equal(switches.cpu(), expected.expand(1, 9, 3, 3))
    # Every switch names a place in the map.
    ops.unpool2d(y, switches, 3, 2, 1, output_size=(5, 5))


def test_08_padding_is_checked_without_dilation(backend):
    x = torch.randn(1, 1, 9, 9, device=backend.device)
    with pytest.raises(ArgumentError, match=r"padding=2: expected at most half of kernel_size=3"):
        ops.max_pool2d_with_switches(x, 3, 1, 2, dilation=2)
    ops.max_pool2d_with_switches(x, 3, 1, 1, dilation=2)


@pytest.mark.parametrize("kernel", range(1, 5))
@pytest.mark.parametrize("dilation", range(1, 5))
def test_09_dilated_windows_count_taps_from_the_unclipped_corner(backend, kernel, dilation):
    for padding in range(kernel // 2 + 1):
        for stride in (1, 2, 3):
            pool = (kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2, False
            for x in (torch.randn(2, 9, 14, 15), torch.full((1, 3, 14, 15), -INF)):
                expected_y, expected, _ = oracle.pool(x, *pool)
                y, switches = ops.max_pool2d_with_switches(x.to(backend.device), *pool)
                assert torch.equal(y.cpu(), expected_y) and torch.equal(switches.cpu(), expected)


def test_09_a_window_without_a_tap_in_the_map_is_refused(backend):
    with pytest.raises(ShapeError, match="with a tap inside it"):
        ops.max_pool2d_with_switches(torch.randn(1, 1, 4, 4, device=backend.device), 2, 1, 1, dilation=5)


def test_10_ceil_mode_drops_a_window_that_starts_in_the_padding(backend):
    y, _ = pooled(backend, [[1.0, 2.0], [3.0, 4.0]], 1, 2, ceil_mode=True)
    assert y.shape == (1, 1, 1, 1) and y.item() == 1
    x = torch.randn(1, 2, 110, 110, device=backend.device)
    assert ops.max_pool2d_with_switches(x, 3, 2, ceil_mode=True)[0].shape == (1, 2, 55, 55)
    assert ops.max_pool2d_with_switches(x, 3, 2)[0].shape == (1, 2, 54, 54)


def test_11_pixels_between_windows_stay_zero(backend):
    x = torch.randn(2, 9, 11, 11, device=backend.device) + 5
    y, switches = ops.max_pool2d_with_switches(x, 2, 3)
    for overlap in ("sum", "last"):
        out = ops.unpool2d(y, switches, 2, 3, output_size=(11, 11), overlap=overlap)
        between = torch.ones(11, 11, dtype=torch.bool)
        for start in (0, 3, 6, 9):
            for column in (0, 3, 6, 9):
                between[start : start + 2, column : column + 2] = False
        gaps = out[:, :, between.to(backend.device)]
        assert gaps.numel() and not gaps.any() and not torch.signbit(gaps).any()


def test_12_overlapping_windows_add_or_the_last_one_stays(backend):
    # All four windows of a 3x3 map hold its centre: taps 3, 2, 1, 0.
    y = on(backend, [[1.0, 2.0], [4.0, 8.0]])
    switches = bytes_on(backend, [[3, 2], [1, 0]])
    for overlap, centre in (("sum", 15.0), ("last", 8.0)):
        out = ops.unpool2d(y, switches, 2, 1, overlap=overlap)
        expected = torch.zeros(1, 1, 3, 3)
        expected[0, 0, 1, 1] = centre
        assert torch.equal(out.cpu(), expected)
    x = on(backend, [[0.0, 0.0, 0.0], [0.0, 7.0, 0.0], [0.0, 0.0, 0.0]])
    assert (ops.pool_gather2d(x, switches, 2, 1) == 7).all()
    last = ops.pool_gather2d(x, switches, 2, 1, overlap="last")
    assert last.flatten().tolist() == [0, 0, 0, 7]


def test_12_overlapping_values_add_before_the_relu(backend):
    y = on(backend, [[-1.0, 3.0], [-4.0, 1.0]])
    switches = bytes_on(backend, [[3, 2], [1, 0]])
    assert ops.unpool2d(y, switches, 2, 1)[0, 0, 1, 1] == -1
    assert ops.unpool_relu2d(y, switches, 2, 1)[0, 0, 1, 1] == 0
    assert ops.unpool_relu2d(y, switches, 2, 1, overlap="last")[0, 0, 1, 1] == 1
    weight = torch.ones(1, 1, 1, 1, device=backend.device)
    assert not ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=(2, 1)).any()


def test_13_a_kernel_larger_than_the_map_is_refused(backend):
    x = torch.randn(1, 1, 4, 5, device=backend.device)
    with pytest.raises(ShapeError, match=r"kernel_size=\(5, 5\).* does not fit in a map of \(4, 5\)"):
        ops.max_pool2d_with_switches(x, 5)


def test_14_an_empty_batch_is_empty_and_has_gradients(backend):
    x = torch.randn(0, 3, 9, 9, device=backend.device, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, device=backend.device, requires_grad=True)
    y, switches = ops.max_pool2d_with_switches(x, 3, 2)
    assert y.shape == switches.shape == (0, 3, 4, 4)
    u = ops.unpool_relu2d(y, switches, 3, 2, output_size=(9, 9))
    z = ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=(3, 2), output_size=(11, 11))
    g = ops.pool_gather2d(u, switches, 3, 2)
    assert u.shape == (0, 3, 9, 9) and z.shape == (0, 2, 11, 11) and g.shape == (0, 3, 4, 4)
    (u.sum() + z.sum() + g.sum()).backward()
    assert x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape and not weight.grad.any()


@pytest.mark.parametrize("shape", [(2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_15_no_channels_or_no_pixels_are_refused(backend, shape):
    x = torch.randn(shape, device=backend.device)
    switches = torch.zeros(shape, dtype=torch.uint8, device=backend.device)
    weight = torch.randn(shape[1], 2, 3, 3, device=backend.device)
    for call in (
        lambda: ops.max_pool2d_with_switches(x, 1),
        lambda: ops.unpool2d(x, switches, 1),
        lambda: ops.unpool_relu2d(x, switches, 1),
        lambda: ops.pool_gather2d(x, switches, 1),
        lambda: ops.unpool_relu_conv_transpose2d(x, switches, weight, pool=1),
    ):
        with pytest.raises(
            ShapeError, match="expected at least (1|one)|expected a size|at least one channel"
        ):
            call()


def test_16_one_image_without_a_batch_axis(backend):
    x = torch.randn(3, 9, 8, device=backend.device, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, device=backend.device)
    y, switches = ops.max_pool2d_with_switches(x, 3, 2)
    batch_y, batch_switches = ops.max_pool2d_with_switches(x[None], 3, 2)
    assert y.shape == switches.shape == (3, 4, 3)
    assert torch.equal(y, batch_y[0]) and torch.equal(switches, batch_switches[0])
    for op in (ops.unpool2d, ops.unpool_relu2d):
        out = op(y, switches, 3, 2, output_size=(9, 8))
        assert torch.equal(out, op(batch_y, batch_switches, 3, 2, output_size=(9, 8))[0])
    assert torch.equal(ops.pool_gather2d(x, switches, 3, 2), y)
    z = ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=(3, 2))
    assert torch.equal(z, ops.unpool_relu_conv_transpose2d(batch_y, batch_switches, weight, pool=(3, 2))[0])
    z.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("shape", [(), (4,), (4, 4), (1, 2, 3, 4, 4)])
def test_16_other_ranks_are_refused(backend, shape):
    x = torch.zeros(shape, device=backend.device)
    switches = torch.zeros(shape, dtype=torch.uint8, device=backend.device)
    weight = torch.randn(3, 2, 3, 3, device=backend.device)
    for call in (
        lambda: ops.max_pool2d_with_switches(x, 1),
        lambda: ops.unpool2d(x, switches, 1),
        lambda: ops.unpool_relu2d(x, switches, 1),
        lambda: ops.pool_gather2d(x, switches, 1),
        lambda: ops.unpool_relu_conv_transpose2d(x, switches, weight, pool=1),
    ):
        with pytest.raises(ShapeError, match=r"expected \[N, C, H, W\] or \[C, H, W\]"):
            call()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64])
def test_17_only_floats_are_taken(backend, dtype):
    x = torch.zeros(1, 1, 4, 4, device=backend.device).to(dtype)
    switches = torch.zeros(1, 1, 4, 4, dtype=torch.uint8, device=backend.device)
    weight = torch.zeros(1, 1, 3, 3, device=backend.device).to(dtype)
    for call in (
        lambda: ops.max_pool2d_with_switches(x, 1),
        lambda: ops.unpool2d(x, switches, 1),
        lambda: ops.unpool_relu2d(x, switches, 1),
        lambda: ops.pool_gather2d(x, switches, 1),
        lambda: ops.unpool_relu_conv_transpose2d(x, switches, weight, pool=1),
    ):
        with pytest.raises(DtypeError, match=f"has dtype {dtype}: expected float32, float64"):
            call()


def test_18_as_many_taps_as_a_byte_counts(backend):
    x = torch.arange(255.0, device=backend.device).view(1, 1, 15, 17)
    y, switches = ops.max_pool2d_with_switches(x, (15, 17))
    assert y.item() == 254 and switches.item() == 254
    assert torch.equal(ops.unpool2d(y, switches, (15, 17)).nonzero().cpu(), torch.tensor([[0, 0, 14, 16]]))
    wide = torch.arange(300.0, device=backend.device).view(1, 1, 1, 300)
    _, switches = ops.max_pool2d_with_switches(wide, (1, 255), (1, 1))
    assert (switches == 254).all()
    with pytest.raises(ArgumentError, match="kernel_size=16: expected at most 255 taps"):
        ops.max_pool2d_with_switches(torch.zeros(1, 1, 16, 16, device=backend.device), 16)


@pytest.mark.parametrize("value", [2**31, 2**62, 2**63 - 1, 2**63, 2**64 + 3, 10**400])
def test_19_huge_arguments_are_quoted(backend, value):
    x = torch.randn(1, 1, 4, 4, device=backend.device)
    y, switches = ops.max_pool2d_with_switches(x, 2)
    quoted = str(value) if value < 2**70 else "int of"
    for name in ("kernel_size", "padding", "dilation", "stride"):
        if name == "stride" and value < 2**63:
            continue  # one window never steps
        arguments = {"kernel_size": 2, name: value}
        with pytest.raises((ArgumentError, ShapeError)) as error:
            ops.max_pool2d_with_switches(x, **arguments)
        assert quoted in str(error.value)
        with pytest.raises((ArgumentError, ShapeError)) as error:
            ops.unpool2d(y, switches, output_size=(4, 4), **arguments)
        assert quoted in str(error.value)
    weight = torch.randn(1, 1, 3, 3, device=backend.device)
    for name in ("stride", "dilation", "padding", "output_padding", "groups"):
        with pytest.raises((ArgumentError, ShapeError)) as error:
            ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=2, conv={name: value})
        assert quoted in str(error.value)


@pytest.mark.parametrize("stride", [2**31, 2**40, 2**63 - 1])
def test_19_a_huge_stride_leaves_one_window(backend, stride):
    x = torch.randn(1, 2, 5, 5, device=backend.device)
    y, switches = ops.max_pool2d_with_switches(x, 2, stride)
    expected_y, expected = ops.max_pool2d_with_switches(x[:, :, :2, :2], 2)
    assert torch.equal(y, expected_y) and torch.equal(switches, expected)
    assert torch.equal(
        ops.unpool2d(y, switches, 2, stride, output_size=(5, 5)),
        F.pad(ops.unpool2d(y, switches, 2), [0, 3, 0, 3]),
    )


def test_19_a_huge_dilation_leaves_one_tap(backend):
    x = torch.randn(1, 2, 5, 5, device=backend.device)
    y, switches = ops.max_pool2d_with_switches(x, 3, 2**63 - 1, 0, 2**62, ceil_mode=True)
    assert torch.equal(y, x[:, :, :1, :1]) and not switches.any()


@pytest.mark.parametrize("size", [(3, 3), (6, 6), (4, 7), (1, 4), (3, 4)])
def test_20_output_size_must_pool_to_the_pooled_size(backend, size):
    y = torch.ones(1, 1, 2, 2, device=backend.device)
    switches = torch.zeros(1, 1, 2, 2, dtype=torch.uint8, device=backend.device)
    pools_to_two = all(length // 2 == 2 or -(-length // 2) == 2 for length in size)
    for op in (ops.unpool2d, ops.unpool_relu2d):
        if pools_to_two:  # 3 does so with ceil_mode
            assert op(y, switches, 2, output_size=size).shape[2:] == size
        else:
            with pytest.raises(ShapeError, match=r"output_size=.*expected a size that pools to y's \(2, 2\)"):
                op(y, switches, 2, output_size=size)


def test_20_output_size_is_two_numbers(backend):
    y = torch.ones(1, 1, 2, 2, device=backend.device)
    switches = torch.zeros(1, 1, 2, 2, dtype=torch.uint8, device=backend.device)
    for size in ((1, 1, 4, 4), (7, 1, 4, 4), (4,), ()):
        with pytest.raises(ArgumentError, match=r"output_size=.*expected two sizes \(H, W\)"):
            ops.unpool2d(y, switches, 2, output_size=size)


def test_21_a_switch_outside_the_cropped_map_is_refused(backend):
    if backend.name == "cuda":
        pytest.skip("the CUDA kernels never read back: they leave a bad switch out")
    y = torch.ones(1, 2, 2, 2, device=backend.device)
    switches = torch.zeros(1, 2, 2, 2, dtype=torch.uint8, device=backend.device)
    switches[0, 1, 1, 0] = 2
    with pytest.raises(SwitchError, match=r"switches\[0, 1, 1, 0\] = 2 names row 3, column 0: .* 3x3 map"):
        ops.unpool2d(y, switches, 2, output_size=(3, 3))
    switches[0, 1, 1, 0] = 4
    with pytest.raises(
        SwitchError, match=r"switches\[0, 1, 1, 0\] = 4: expected a tap of the 2x2 window, 0 to 3"
    ):
        ops.unpool_relu2d(y, switches, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_22_special_values_pass_through(backend, layout):
    values = torch.tensor([NAN, INF, -INF, -0.0, 0.0, -3.0, 2.0, 5e-45]).view(1, 2, 2, 2)
    y = lay_out(values, layout)
    switches = torch.zeros(1, 2, 2, 2, dtype=torch.uint8, device=backend.device)
    out = ops.unpool2d(y.to(backend.device), switches, 2)[:, :, ::2, ::2].cpu()
    assert oracle.same(out.contiguous(), y.contiguous())
    rectified = ops.unpool_relu2d(y.to(backend.device), switches, 2)[:, :, ::2, ::2].cpu()
    assert oracle.same(rectified.contiguous(), oracle.relu(y).contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_22_the_fused_op_keeps_nan_and_inf(backend, dtype):
    y = torch.ones(1, 9, 3, 3, dtype=dtype)
    y[0, 4, 0, 0], y[0, 5, 2, 2] = NAN, INF
    switches = torch.zeros(1, 9, 3, 3, dtype=torch.uint8)
    weight = torch.rand(9, 10, 3, 3).to(dtype) + 0.5
    z = ops.unpool_relu_conv_transpose2d(
        y.to(backend.device), switches.to(backend.device), weight.to(backend.device), pool=2
    ).cpu()
    u = oracle.unpool(y, switches, (6, 6), ((2, 2), (2, 2), (0, 0), (1, 1)), "sum")
    expected = F.conv_transpose2d(u, weight.double())
    assert torch.equal(z.isnan(), expected.isnan()) and z.isnan().sum() == 90
    assert torch.equal(z.isinf(), expected.isinf()) and z.isinf().sum() == 90


@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_23_zeros_skip_the_weights_unless_strict(backend, special):
    y = torch.zeros(1, 2, 2, 2, device=backend.device)
    y[0, 0, 0, 0], y[0, 1, 1, 1] = 2.0, -1.0  # the ReLU makes the second a zero too
    switches = torch.zeros(1, 2, 2, 2, dtype=torch.uint8, device=backend.device)
    weight = torch.ones(2, 3, 2, 2, device=backend.device)
    weight[0, 1, 0, 1] = weight[1, 0, 0, 0] = special
    z = ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=2).cpu()
    expected = torch.zeros(1, 3, 5, 5)
    expected[0, :, :2, :2] = 2
    expected[0, 1, 0, 1] = 2 * special
    assert oracle.same(z, expected)
    strict = ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=2, strict_nan=True)
    u = ops.unpool_relu2d(y, switches, 2)
    dense = F.conv_transpose2d(u, weight)
    assert dense.isnan().sum() > expected.isnan().sum()
    assert torch.equal(strict.isnan(), dense.isnan())
    assert torch.equal(strict.nan_to_num(), dense.nan_to_num())


def test_24_float16_accumulates_in_float32(backend):
    y = torch.ones(1, 4096, 1, 1, dtype=torch.float16, device=backend.device)
    switches = torch.zeros(1, 4096, 1, 1, dtype=torch.uint8, device=backend.device)
    weight = torch.ones(4096, 2, 1, 1, dtype=torch.float16, device=backend.device)
    assert (ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=1) == 4096).all()
    weight *= 70_000 / 4096
    assert (ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=1) == INF).all()


def test_24_output_padding_is_less_than_stride_or_dilation(backend):
    y = torch.rand(1, 2, 3, 3, device=backend.device)
    switches = torch.zeros(1, 2, 3, 3, dtype=torch.uint8, device=backend.device)
    weight = torch.randn(2, 3, 3, 3, device=backend.device)
    # With a dilation above the stride it may reach past the stride, and torch agrees.
    for stride, dilation, extra in ((2, 1, 1), (3, 1, 2), (1, 2, 1), (1, 3, 2)):
        conv = dict(stride=stride, dilation=dilation, output_padding=extra)
        z = ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=2, conv=conv)
        expected = F.conv_transpose2d(ops.unpool_relu2d(y, switches, 2), weight, **conv)
        torch.testing.assert_close(z, expected)
        given = ops.unpool_relu_conv_transpose2d(
            y, switches, weight, pool=2, conv=conv, output_size=z.shape[2:]
        )
        assert torch.equal(given, z)
    with pytest.raises(ArgumentError, match="output_padding=2: expected less than the larger of stride=2"):
        ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=2, conv=dict(stride=2, output_padding=2))


def test_24_a_result_without_pixels_is_refused(backend):
    y = torch.rand(1, 2, 1, 1, device=backend.device)
    switches = torch.zeros(1, 2, 1, 1, dtype=torch.uint8, device=backend.device)
    weight = torch.randn(2, 3, 3, 3, device=backend.device)
    with pytest.raises(ShapeError, match=r"output_size=\(0, 0\).*expected at least one pixel"):
        ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=2, conv=dict(padding=2))


def test_24_more_maps_than_a_grid_has_rows(backend):
    x = torch.randn(3, 22_000, 2, 2, device=backend.device)  # N * C > 65,535
    y, switches = ops.max_pool2d_with_switches(x, 2)
    assert torch.equal(y, x.amax((2, 3), keepdim=True))
    out = ops.unpool2d(y, switches, 2)
    assert torch.equal(out.sum((2, 3)), y[:, :, 0, 0])
    assert torch.equal(ops.pool_gather2d(x, switches, 2), y)


def test_25_autocast_keeps_pooling_and_casts_the_fused_op_once(backend):
    x = torch.randn(1, 2, 6, 6, device=backend.device)
    weight = torch.randn(2, 3, 3, 3, device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        y, switches = ops.max_pool2d_with_switches(x, 2)
        u = ops.unpool_relu2d(y, switches, 2)
        g = ops.pool_gather2d(x, switches, 2)
        z = ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=2)
        wide = ops.unpool_relu_conv_transpose2d(y.double(), switches, weight.double(), pool=2)
    assert y.dtype == u.dtype == g.dtype == torch.float32
    assert z.dtype == torch.bfloat16 and wide.dtype == torch.float64
    by_hand = ops.unpool_relu_conv_transpose2d(y.bfloat16(), switches, weight.bfloat16(), pool=2)
    assert torch.equal(z, by_hand)


def test_25_inference_mode_and_inputs_that_stay_as_they_are(backend):
    x = torch.randn(2, 9, 6, 6, device=backend.device)
    weight = torch.randn(9, 3, 3, 3, device=backend.device)
    before = x.clone(), weight.clone()

    def run():
        y, switches = ops.max_pool2d_with_switches(x, 3, 1)
        u = ops.unpool_relu2d(y, switches, 3, 1)
        return y, switches, u, ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=(3, 1))

    plain = run()
    with torch.inference_mode():
        inside = run()
        again = ops.unpool2d(inside[0], inside[1], 3, 1)  # inference tensors as arguments
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert all(t.is_inference() and not t.requires_grad for t in (*inside, again))
    assert torch.equal(before[0], x) and torch.equal(before[1], weight)


def test_25_requires_grad_follows_the_input(backend):
    x = torch.randn(1, 2, 6, 6, device=backend.device, requires_grad=True)
    y, switches = ops.max_pool2d_with_switches(x, 2)
    assert y.requires_grad and not switches.requires_grad
    with torch.no_grad():
        assert not ops.max_pool2d_with_switches(x, 2)[0].requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_25_results_have_the_layout_of_the_input(backend, layout):
    x = lay_out(torch.randn(2, 9, 8, 8), layout).to(backend.device)
    weight = torch.randn(9, 4, 3, 3, device=backend.device)
    y, switches = ops.max_pool2d_with_switches(x, 3, 2)
    results = [
        y,
        switches,
        ops.unpool2d(y, switches, 3, 2, output_size=(8, 8)),
        ops.pool_gather2d(x, switches, 3, 2),
        ops.unpool_relu_conv_transpose2d(y, switches, weight, pool=(3, 2)),
    ]
    kept = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    assert all(r.is_contiguous(memory_format=kept) for r in results)
