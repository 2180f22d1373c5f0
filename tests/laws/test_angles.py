"""Sine and cosine by a fixed order of operations: near the true ones, and alike however they are asked for."""

import math

import pytest
import torch

from surgery.core.angles import OFF, cos_sin
from surgery.errors import ValueRangeError


def some() -> torch.Tensor:
    """Near every multiple of pi / 4 up to 64, of all sizes, and exact edges."""
    torch.manual_seed(0)
    near = torch.arange(-64, 65, dtype=torch.float64) * (math.pi / 4)
    close = torch.cat([near + step for step in (0, 2.0**-53, -(2.0**-30), 2.0**-10)])
    sizes = torch.randn(4000, dtype=torch.float64) * 2.0 ** torch.randint(-40, 18, (4000,)).double()
    edges = torch.tensor([0.0, 1.0, -1.0, 2.0**20, -(2.0**20), 5e-324], dtype=torch.float64)
    return torch.cat([close, sizes, sizes.float().double(), edges]).clamp(-(2.0**20), 2.0**20)


def test_they_lie_within_their_bound_of_the_true_ones() -> None:
    angles = some()
    cos, sin = cos_sin(angles)
    for found, true in ((cos, math.cos), (sin, math.sin)):
        wanted = torch.tensor([true(one) for one in angles.tolist()], dtype=torch.float64)
        # The C library's own lie within an ulp, which is 2^-53 of what is below 1.
        assert float((found - wanted).abs().max()) <= OFF + 2.0**-53
        assert OFF < 1e-15
    assert cos_sin(torch.zeros(1)) == (torch.ones(1), torch.zeros(1))


@pytest.mark.parametrize("count", [1, 3, 7, 64, 1001])
def test_each_is_the_same_to_the_bit_whatever_stands_beside_it(count: int) -> None:
    angles = some()
    whole = cos_sin(angles)
    parts = [cos_sin(one) for one in angles.split(count)]
    for index in (0, 1):
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])
    strided = cos_sin(angles.repeat_interleave(2)[::2])
    assert all(torch.equal(a, b) for a, b in zip(strided, whole, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -(2.0**20) - 1])
def test_an_angle_that_is_too_large_is_refused(bad: float) -> None:
    with pytest.raises(ValueRangeError, match=r"beyond 2\^20 radians"):
        cos_sin(torch.tensor([0.5, bad]))
