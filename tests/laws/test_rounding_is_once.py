"""round_once and ulp, held against fractions and against every value of the half types."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rational import FORMATS, nearest_even, same_bits, spacing
from torch import Tensor

from surgery.core.rounding import round_once, ulp
from surgery.errors import ValueRangeError

HALVES = [torch.bfloat16, torch.float16]
ROUNDED = [torch.float32, *HALVES]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
LAYOUTS = {
    "contiguous": lambda values: values.view(2, -1),
    "transposed": lambda values: values.view(-1, 2).T,
    "strided": lambda values: torch.stack([values, torch.zeros_like(values)], 1)[:, 0],
    "expanded": lambda values: values[:, None].expand(-1, 3),
    "scalar": lambda values: values[len(values) // 3],
}


def magnitudes(dtype: torch.dtype) -> Tensor:
    """Finite values >= 0 of `dtype`, rising: all of a half type, a sample of float32 with both ends."""
    top = int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(INTEGERS[dtype]))
    if dtype == torch.float32:
        chosen = torch.randint(0, top, (40000,), generator=torch.Generator().manual_seed(0))
        patterns = torch.cat([torch.arange(1000), chosen.sort().values, torch.arange(top - 999, top + 1)])
    else:
        patterns = torch.arange(top + 1)
    return patterns.to(INTEGERS[dtype]).view(dtype)


def next_pattern(values: Tensor) -> Tensor:
    """The next magnitude; infinity after the largest."""
    return (values.view(INTEGERS[values.dtype]) + 1).view(values.dtype)


def midpoints(values: Tensor) -> Tensor:
    """Half-way (float64, exact) to the next magnitude, also where that would be infinity."""
    here = values.double()
    above = next_pattern(values).double()
    return torch.where(torch.isinf(above), here + (here - values.view(-1)[-2].double()) / 2, (here + above) / 2)


def even_of(values: Tensor) -> Tensor:
    """Of each value and the next magnitude the one with an even mantissa."""
    odd = (values.view(INTEGERS[values.dtype]) & 1) == 1
    return torch.where(odd, next_pattern(values), values)


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_exact_tie_goes_to_the_even_neighbour(dtype, sign):
    values = magnitudes(dtype)
    assert same_bits(round_once(sign * midpoints(values), dtype), sign * even_of(values))


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("hair", ["one float64 step", "a quarter of a float32 step"])
def test_a_hair_off_a_tie_goes_to_the_nearer_neighbour(dtype, sign, hair):
    values = magnitudes(dtype)
    ties = midpoints(values)
    if hair == "one float64 step":
        below, above = torch.nextafter(ties, torch.tensor(0.0).double()), torch.nextafter(ties, ties * 2)
    else:
        below, above = ties * (1 - 2.0**-27), ties * (1 + 2.0**-27)
    assert same_bits(round_once(sign * below, dtype), sign * values)
    assert same_bits(round_once(sign * above, dtype), sign * next_pattern(values))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_float32_rounds_away_from_a_tie_is_not_brought_back_to_it(dtype, sign):
    values = magnitudes(dtype)[1:]
    ties = midpoints(values)
    above = ties + ulp(ties, torch.float32) * 0.75
    assert same_bits(round_once(sign * above, dtype), sign * next_pattern(values))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_torch_alone_rounds_twice_so_the_traps_are_traps(dtype):
    values = magnitudes(dtype)
    ties = midpoints(values)
    assert not torch.equal(torch.nextafter(ties, ties * 2).to(dtype), next_pattern(values))


@pytest.mark.parametrize("dtype", [torch.float64, *ROUNDED], ids=str)
def test_a_value_of_the_dtype_stays_as_it_is(dtype):
    values = magnitudes(torch.float32 if dtype == torch.float64 else dtype).to(dtype)
    for held in (values, -values):
        assert same_bits(round_once(held.double(), dtype), held)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_layout_in_memory_changes_no_bit(dtype, layout):
    ties = midpoints(magnitudes(dtype)[:4096] if dtype == torch.float16 else magnitudes(dtype)[16000:16512])
    acc = LAYOUTS[layout](torch.nextafter(ties, ties * 2))
    wanted = round_once(acc.contiguous().view(-1), dtype).view(acc.shape)
    assert same_bits(round_once(acc, dtype), wanted)


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_the_input_is_left_alone(dtype):
    acc = torch.nextafter(midpoints(magnitudes(dtype)), torch.tensor(math.inf).double())
    before = acc.clone()
    round_once(acc, dtype)
    assert torch.equal(acc, before)


def near_a_tie(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Any float64 in the range of `dtype` and a little beyond, mostly written with few bits below its last."""
    precision, lowest, highest = FORMATS[dtype]
    exponents = st.integers(lowest - 3, highest - precision + 2)
    mantissas = st.integers(-(2 ** (precision + 1)), 2 ** (precision + 1))
    hairs = st.sampled_from([0.0, 2.0**-20, -(2.0**-20), 2.0**-38, -(2.0**-38), 0.25, -0.25])
    build = st.builds(lambda m, hair, e: math.ldexp(m / 2 + hair, e), mantissas, hairs, exponents)
    return st.one_of(build, st.floats(allow_nan=False))


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@settings(deadline=None, max_examples=60, database=None)
@given(data=st.data())
def test_rounding_agrees_with_fractions(dtype, data):
    values = data.draw(st.lists(near_a_tie(dtype), min_size=1, max_size=20))
    found = round_once(torch.tensor(values, dtype=torch.float64), dtype).double()
    wanted = torch.tensor([nearest_even(value, dtype) for value in values], dtype=torch.float64)
    assert same_bits(found, wanted), values


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_overflow_becomes_infinity_from_the_last_tie_on(dtype):
    largest = torch.tensor(torch.finfo(dtype).max, dtype=torch.float64)
    tie = largest + ulp(largest, dtype) / 2
    ends = torch.stack([torch.nextafter(tie, largest), tie, tie * 2, torch.tensor(1e300).double()])
    infinity = torch.inf
    assert round_once(ends, dtype).tolist() == [float(largest), infinity, infinity, infinity]
    assert round_once(-ends, dtype).tolist() == [-float(largest), -infinity, -infinity, -infinity]


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_zeros_infinities_and_what_underflows_keep_their_sign(dtype):
    values = torch.tensor([0.0, -0.0, 5e-324, -5e-324, 1e-200, -1e-200, torch.inf, -torch.inf], dtype=torch.float64)
    found = round_once(values, dtype).double()
    assert same_bits(found, torch.tensor([0.0, -0.0] * 3 + [torch.inf, -torch.inf], dtype=torch.float64))


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_nan_stays_nan(dtype):
    assert bool(torch.isnan(round_once(torch.tensor([torch.nan], dtype=torch.float64), dtype)).all())


def test_a_dtype_that_cannot_be_merged_is_refused():
    with pytest.raises(ValueRangeError, match="int8"):
        round_once(torch.zeros(1, dtype=torch.float64), torch.int8)


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_ulp_is_the_step_to_the_next_magnitude(dtype):
    values = magnitudes(dtype)[:-1]
    step = next_pattern(values).double() - values.double()
    positive = values > 0
    assert torch.equal(ulp(values.double(), dtype)[positive], step[positive])
    assert torch.equal(ulp(-values.double(), dtype)[positive], step[positive])


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_ulp_at_zero_is_the_smallest_magnitude(dtype):
    zeros = torch.tensor([0.0, -0.0], dtype=torch.float64)
    assert ulp(zeros, dtype).tolist() == [2.0 ** FORMATS[dtype].lowest] * 2


@settings(deadline=None, max_examples=100, database=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False), dtype=st.sampled_from(list(FORMATS)))
def test_ulp_agrees_with_fractions(value, dtype):
    if value == 0 or abs(Fraction(value)) > FORMATS[dtype].largest:
        return
    normal = spacing(Fraction(value), dtype) >= Fraction(2) ** -1022
    wanted = spacing(Fraction(value), dtype) if normal else Fraction(2) ** -1022  # ulp's least answer
    assert Fraction(float(ulp(torch.tensor([value], dtype=torch.float64), dtype))) == wanted
