"""What is read off the bits of half types, held against the plain way."""

import numpy as np
import pytest
import torch
from torch import Tensor

from surgery.core.arithmetic import largest_change
from surgery.core.halves import farthest_apart, magnitude, places, with_low_half

HALVES = [torch.bfloat16, torch.float16]
FAR = torch.tensor([3.0e4, -6.5e4, 6.5e4, -6.5e4, 0.0, -0.0])  # in float16 some lie farther apart than its largest


def drawn(dtype: torch.dtype, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    a = torch.randn(37, 29) * scale
    return a.to(dtype), (a + torch.randn(37, 29) * scale * 2.0**-8).to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scale", [2.0**-18, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("seed", range(8))
def test_the_largest_change_is_that_of_the_elements_farthest_apart(dtype, scale, seed):
    a, b = drawn(dtype, scale, seed)
    wanted = float((a.double() - b.double()).abs().max())
    assert largest_change(a, b) == wanted
    assert largest_change(a.T, b.T) == wanted
    assert largest_change(b, a) == wanted


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_few_elements_are_taken_for_the_farthest(dtype):
    assert len(farthest_apart(*drawn(dtype, 1.0, 0))[0]) < 37 * 29 / 20


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_differences_beyond_the_type_s_range_are_told_apart(dtype):
    a, b = FAR.to(dtype), FAR.flip(0).to(dtype)
    assert largest_change(a, b) == float((a.double() - b.double()).abs().max())
    assert largest_change(a, a) == 0.0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_magnitudes_order_every_value(dtype):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = values[torch.isfinite(values)]
    order = torch.from_numpy(magnitude(finite)).to(torch.int64).argsort(stable=True)
    assert bool((finite[order].double().abs().diff() >= 0).all())
    top = magnitude(torch.tensor([torch.finfo(dtype).max, torch.inf, torch.nan], dtype=dtype)).tolist()
    assert top == sorted(set(top))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 4096])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_places_are_those_that_are_set(length, share):
    mask = np.random.default_rng(length).random(length) < share
    assert np.array_equal(places(mask), np.flatnonzero(mask))


def test_low_halves_are_told_from_high_ones():
    bits = torch.tensor([0x8000, 0x18000, -0x80000000, 0x00008001, -0x7FFF8000, 0], dtype=torch.int32)
    assert with_low_half(bits, 0x8000).tolist() == [
        at for at, one in enumerate(bits.tolist()) if one & 0xFFFF == 0x8000
    ]
