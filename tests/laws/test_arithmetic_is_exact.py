"""The grid and the product, held against Python's integers and fractions."""

import cmath
import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rational import dot, fractions, gridded, power, same_bits, transposed
from torch import Tensor

from surgery.core.arithmetic import BLOCK, all_finite, exact_product, on_grid
from surgery.errors import ValueRangeError
from surgery.io.header import DTYPES as IN_FILES

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
RANKS = [1, 2, 7, 512]
laws = settings(deadline=None, max_examples=40, database=None)


def bits_of(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Any finite value of a type of 16 or 32 bits, by its bits: subnormals, ends and both zeros too."""
    kind = INTEGERS[dtype]
    top = int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(kind))
    patterns = st.one_of(st.integers(0, top), st.integers(0, 200), st.integers(top - 3, top))
    signs = st.sampled_from([1.0, -1.0])
    return st.builds(lambda bits, sign: sign * float(torch.tensor(bits, dtype=kind).view(dtype)), patterns, signs)


def values_of(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Finite values that the arithmetic takes, alone or in company."""
    powers = st.builds(lambda e, sign: sign * 2.0**e, st.integers(-14, 15), st.sampled_from([1.0, -1.0]))
    special = st.one_of(st.sampled_from([0.0, -0.0]), powers)
    if dtype != torch.float64:
        return st.one_of(bits_of(dtype), special)
    mantissas = st.integers(1 - 2**53, 2**53 - 1)
    return st.one_of(st.builds(math.ldexp, mantissas, st.integers(-440, 390)), special)


@st.composite
def matrices(draw: st.DrawFn, rows: int, columns: int, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> Tensor:
    dtype = draw(st.sampled_from(dtypes))
    values = draw(st.lists(values_of(dtype), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.float64).to(dtype).view(rows, columns)


@st.composite
def factors(draw: st.DrawFn, r: int, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> tuple[Tensor, Tensor]:
    """B [out, r], A [r, in]"""
    return draw(matrices(draw(st.integers(1, 3)), r, dtypes)), draw(matrices(r, draw(st.integers(1, 3)), dtypes))


def normal(*shape: int, seed: int) -> Tensor:
    """Normal numbers of very different sizes, so that a naive sum depends on its order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    return values * 2.0 ** torch.randint(-12, 12, shape, generator=generator)


def gridded_factors(B: Tensor, A: Tensor) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
    """The rows of B and the columns of A."""
    return [gridded(row) for row in fractions(B)], [gridded(column) for column in transposed(fractions(A))]


def reference_product(B: Tensor, A: Tensor) -> Tensor:
    """Exact sums of at most 512 terms, those added in order in float64."""
    rows, columns = gridded_factors(B, A)
    found = torch.empty(len(rows), len(columns), dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            blocks = [
                dot(row[start : start + BLOCK], column[start : start + BLOCK]) for start in range(0, len(row), BLOCK)
            ]
            assert all(Fraction(float(block)) == block for block in blocks)
            total = float(blocks[0])
            for block in blocks[1:]:
                total += float(block)
            found[i, j] = total
    return found


@laws
@given(factor=matrices(3, 2))
def test_the_grid_rounds_each_column_and_row_to_22_bits(factor):
    by_row = [gridded(row) for row in fractions(factor)]
    assert fractions(on_grid(factor, along=1)) == by_row
    by_column = transposed([gridded(column) for column in transposed(fractions(factor))])
    assert fractions(on_grid(factor, along=0)) == by_column


@pytest.mark.parametrize("r", [1, 2, 7])
@laws
@given(data=st.data())
def test_the_product_is_the_sum_of_the_gridded_factors(r, data):
    B, A = data.draw(factors(r))
    rows, columns = gridded_factors(B, A)
    assert fractions(exact_product(B, A)) == [[dot(row, column) for column in columns] for row in rows]


@pytest.mark.parametrize("r", [*RANKS, 513, 1024, 1300])
def test_the_product_is_exact_in_blocks_of_512_that_are_added_in_float64(r):
    B, A = normal(3, r, seed=r), normal(r, 2, seed=r + 1)
    assert torch.equal(exact_product(B, A), reference_product(B, A))


@pytest.mark.parametrize("nearly_one", [1 - 2.0**-22, 1 - 2.0**-30, 1.0], ids=["on grid", "rounds up", "one"])
def test_the_largest_sum_of_512_equal_terms_is_exact(nearly_one):
    B, A = torch.full((1, BLOCK), nearly_one).double(), torch.full((BLOCK, 1), nearly_one).double()
    B[0, 0] = A[0, 0] = 1 - 2.0**-22  # an odd multiple of the grid, so that the last bit of the sum counts
    assert torch.equal(exact_product(B, A), reference_product(B, A))


@pytest.mark.parametrize("r", [2, 7, 300, 512])
def test_the_order_of_the_rank_changes_no_bit(r):
    B, A = normal(20, r, seed=1), normal(r, 30, seed=2)
    order = torch.randperm(r, generator=torch.Generator().manual_seed(3))
    assert same_bits(exact_product(B[:, order], A[order]), exact_product(B, A))
    assert r < 300 or not torch.equal(B[:, order] @ A[order], B @ A)  # plainly computed, it does


def test_the_order_within_a_block_changes_no_bit_beyond_512():
    B, A = normal(5, 700, seed=1), normal(700, 6, seed=2)
    order = torch.cat([torch.arange(511, -1, -1), torch.arange(699, 511, -1)])
    assert same_bits(exact_product(B[:, order], A[order]), exact_product(B, A))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("r", [16, 512, 700])
def test_the_number_of_threads_changes_no_bit(r):
    B, A = normal(130, r, seed=4), normal(r, 140, seed=5)
    outcomes = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcomes.append(exact_product(B, A))
    assert same_bits(outcomes[0], outcomes[1])
    assert same_bits(outcomes[0], outcomes[2])


@pytest.mark.parametrize("step", [1, 7, 64])
@pytest.mark.parametrize("r", [16, 512, 700])
def test_tiles_of_rows_or_columns_change_no_bit(r, step):
    B, A = normal(100, r, seed=6), normal(r, 90, seed=7)
    whole = exact_product(B, A)
    starts = range(0, min(90, 12 * step), step)
    rows = torch.cat([exact_product(B[at : at + step], A) for at in starts])
    columns = torch.cat([exact_product(B, A[:, at : at + step]) for at in starts], 1)
    assert same_bits(rows, whole[: len(rows)])
    assert same_bits(columns, whole[:, : columns.shape[1]])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_dtype_that_holds_the_factors_changes_no_bit(dtype):
    B, A = normal(9, 33, seed=8).to(dtype), normal(33, 8, seed=9).to(dtype)
    assert same_bits(exact_product(B, A), exact_product(B.double(), A.double()))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_factors_of_subnormals_alone_are_multiplied_exactly(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    steps = torch.arange(1, 7, dtype=torch.float64).view(2, 3) / 8
    B, A = (tiny * steps).to(dtype), (-tiny * steps.T).to(dtype)
    assert 0 < float(B.double().abs().min()) < tiny
    wanted = [[dot(row, column) for column in transposed(fractions(A))] for row in fractions(B)]
    assert fractions(exact_product(B, A)) == wanted  # so few bits are on the grid as they are


def test_zero_rows_and_columns_give_zero():
    B, A = normal(3, 4, seed=10), normal(4, 5, seed=11)
    B[1], A[:, 2] = 0, -0.0
    found = exact_product(B, A)
    assert not found[1].any()
    assert not found[:, 2].any()
    assert bool(found[0, [0, 1, 3, 4]].all())


@pytest.mark.parametrize("r", [1, 2, 7])
@laws
@given(data=st.data())
def test_the_distance_to_the_ideal_product_keeps_its_bound(r, data):
    B, A = data.draw(factors(r))
    rows, columns = fractions(B), transposed(fractions(A))
    found = fractions(exact_product(B, A))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            bound = r * power(-21) * max(map(abs, row)) * max(map(abs, column))
            assert abs(found[i][j] - dot(row, column)) <= bound


@pytest.mark.parametrize("r", [1, 2, 7])
@laws
@given(data=st.data())
def test_the_distance_of_a_fine_product_to_the_ideal_one_keeps_its_bound(r, data):
    B, A = data.draw(factors(r))
    rows, columns = fractions(B), transposed(fractions(A))
    found = fractions(exact_product(B, A, fine=True))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            bound = r * power(-42) * max(map(abs, row)) * max(map(abs, column))
            assert abs(found[i][j] - dot(row, column)) <= bound


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("r", [16, 512, 700])
def test_a_fine_product_has_the_same_bits_by_any_threads_tiles_and_order(r):
    B, A = normal(130, r, seed=4), normal(r, 140, seed=5)
    whole = exact_product(B, A, fine=True)
    for count in (1, 3):
        torch.set_num_threads(count)
        assert same_bits(exact_product(B, A, fine=True), whole)
        rows = [exact_product(B[at : at + 7], A, fine=True) for at in range(0, 130, 7)]
        assert same_bits(torch.cat(rows), whole)
    tile = slice(3, 50), slice(60, 140)
    assert same_bits(exact_product(B, A, tile, 0.3, fine=True), 0.3 * whole[tile])
    assert same_bits(exact_product(torch.stack([B, 2 * B]), torch.stack([A, A]), fine=True)[1], 2 * whole)
    order = torch.cat([torch.arange(min(r, 512)).flip(0), torch.arange(512, max(r, 512)).flip(0)])
    assert same_bits(exact_product(B[:, order], A[order], fine=True), whole)
    assert r < 512 or not torch.equal(B[:, order] @ A[order], B @ A)  # plainly computed, it does not


def test_the_distance_to_the_ideal_product_comes_near_its_bound():
    worst = 0.5 - 2.0**-23  # half a step off the grid of a row whose largest is 0.5
    B, A = torch.full((1, 512), worst).double(), torch.full((512, 1), worst).double()
    B[0, 0] = A[0, 0] = 0.5
    ideal = dot(fractions(B)[0], transposed(fractions(A))[0])
    apart = abs(Fraction(float(exact_product(B, A))) - ideal)
    bound = 512 * power(-21) / 4
    assert bound * 99 / 100 < apart <= bound


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 2.0**450, -(2.0**450), 2.0**1000, 2.0**-452, 5e-324])
@pytest.mark.parametrize("side", ["A", "B"])
def test_numbers_that_cannot_be_exact_are_refused(side, wrong):
    good, bad = torch.ones(2, 2).double(), torch.ones(2, 2).double()
    bad[:, 1] = bad[1] = wrong  # a whole row and a whole column, so that it is the largest there
    with pytest.raises(ValueRangeError, match="factor"):
        exact_product(*((bad, good) if side == "B" else (good, bad)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_enough_to_be_refused(dtype, wrong):
    A, B = torch.ones(7, 5, dtype=dtype), torch.ones(4, 7, dtype=dtype)
    A[3, 2] = wrong
    with pytest.raises(ValueRangeError, match="NaN or infinity"):
        exact_product(B, A)


@pytest.mark.parametrize("ends", [(449, 449), (-450, -450), (449, -450), (-450, 449)])
def test_the_largest_and_smallest_allowed_magnitudes_are_multiplied_exactly(ends):
    B, A = normal(2, 512, seed=12), normal(512, 2, seed=13)
    B, A = B / B.abs().amax(), A / A.abs().amax()  # the largest is 1
    B, A = B / B.abs().amax(1, keepdim=True) * 2.0 ** ends[0], A / A.abs().amax(0) * 2.0 ** ends[1]
    assert torch.equal(exact_product(B, A), reference_product(B, A))


@pytest.mark.parametrize("dtype", [one for one in IN_FILES.values() if isinstance(one, torch.dtype)], ids=str)
def test_nan_and_infinity_are_found_in_every_dtype_of_files(dtype: torch.dtype) -> None:
    assert all_finite(torch.ones(5).to(dtype))
    assert all_finite(torch.ones(0).to(dtype))
    for bad in (torch.nan, torch.inf, -torch.inf) if dtype.is_floating_point or dtype.is_complex else ():
        values = torch.tensor([1.0, bad, 2.0]).to(dtype)  # float8 has no infinity in all its kinds
        held = all(cmath.isfinite(one) for one in values.to(torch.complex128).tolist())
        assert all_finite(values) is held


@pytest.mark.parametrize("scaling", [2.0, 1.0, 0.5, 2.0**-64, 2.0**64, 2.0**-65, 2.0**200, -2.0, 0.3, 0.0, -0.0])
@pytest.mark.parametrize("r", RANKS)
def test_a_scaled_product_is_the_product_scaled(scaling, r):
    torch.manual_seed(r)
    B, A = torch.randn(5, r, dtype=torch.float64), torch.randn(r, 7, dtype=torch.float64)
    B[1], B[2], B[3] = 0.0, B[2] * 2.0**-440, B[3] * 2.0**440
    A[:, 2], A[:, 3], A[:, 4] = -0.0, A[:, 3] * 2.0**-440, A[:, 4] * 2.0**440
    found = exact_product(B, A, scaling=scaling)
    assert same_bits(found, exact_product(B, A) * scaling)
    assert same_bits(exact_product(B.expand(2, -1, -1), A.expand(2, -1, -1), scaling=scaling)[1], found)
