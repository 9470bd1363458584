"""strongest: the first of the largest values of each chosen map, NaN passed over."""

from __future__ import annotations

import pytest
import torch

from zfcore import ops, reference
from zfcore.errors import DtypeError, ShapeError, UnitNotFound
from zfcore.ops.strongest import strongest

NAN, INF = torch.nan, torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (13, 13), (40, 37)])
def test_equals_the_definition_in_every_layout(dtype, size):
    torch.manual_seed(0)
    maps = (torch.randn(3, 9, *size) * 4).round().to(dtype)  # many equals
    maps[0, 1] = NAN
    maps[1, 2, 0, 0] = NAN
    maps[2, 3] = -INF
    maps[1, 4, -1, -1] = INF
    maps[0, 5] = -INF
    maps[0, 5, 0, 0] = NAN
    units = torch.tensor([8, 0, 1, 2, 3, 4, 5, 5])
    wanted = reference.strongest(maps, units)
    large = torch.zeros(3, 9, size[0] * 2, size[1] * 2, dtype=dtype)
    large[:, :, ::2, ::2] = maps
    layouts = [
        maps,
        maps.contiguous(memory_format=torch.channels_last),
        maps.transpose(2, 3).contiguous().transpose(2, 3),
        large[:, :, ::2, ::2],
    ]
    for layout in layouts:
        assert torch.equal(strongest(layout, units), wanted)


@pytest.mark.parametrize(
    ("values", "place"),
    [([1, 3, 3, 2], 1), ([NAN, 1, NAN, 2], 3), ([NAN] * 4, 0), ([NAN, -INF, -INF, NAN], 1), ([-0.0, 0.0, 0, 0], 0)],
)  # fmt: skip
def test_ties_and_what_is_not_a_number(values, place):
    maps = torch.tensor(values, dtype=torch.float32).view(1, 1, 2, 2)
    assert strongest(maps, torch.tensor([0])).item() == place
    with ops.use_backend("reference"):
        assert strongest(maps, torch.tensor([0])).item() == place


@pytest.mark.parametrize(
    ("maps", "units", "error"),
    [
        (torch.zeros(2, 3, 4), torch.tensor([0]), ShapeError),
        (torch.zeros(2, 3, 0, 4), torch.tensor([0]), ShapeError),
        (torch.zeros(2, 3, 4, 4).int(), torch.tensor([0]), DtypeError),
        (torch.zeros(2, 3, 4, 4), torch.tensor([0.0]), DtypeError),
        (torch.zeros(2, 3, 4, 4), torch.tensor([3]), UnitNotFound),
        (torch.zeros(2, 3, 4, 4), torch.tensor([-1]), UnitNotFound),
    ],
)
def test_refusals(maps, units, error):
    with pytest.raises(error):
        strongest(maps, units)
