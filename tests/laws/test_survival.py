"""What is left of a change: the same bits for any tiles and threads, and whichever weight was measured first."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache, reduce
from itertools import permutations

import pytest
import torch
from torch import Tensor

from surgery.core import survival
from surgery.core.feedback import Feedback
from surgery.core.sums import exact_sum, row_sums
from surgery.core.survival import Survival, total

EPS = torch.finfo(torch.float64).eps


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@cache
def weights(rows: int = 20, columns: int = 1337) -> tuple[Tensor, ...]:
    """A weight as it was, as it is wanted, and as it became: rows of many sizes."""
    drawn = torch.Generator().manual_seed(0)
    sizes = 10 ** (3 * torch.randn(rows, 1, dtype=torch.float64, generator=drawn))
    before, change, probes = (
        torch.randn(shape, dtype=torch.float64, generator=drawn)
        for shape in ((rows, columns), (rows, columns), (columns, 70))
    )
    before, wanted = before * sizes, (before + 0.1 * change) * sizes
    return before, wanted, (wanted / sizes * 32).round() / 32 * sizes, probes


def by_tiles(tile: int, order: Sequence[int] = ()) -> Survival:
    """The sums over tiles of so many rows, taken in another order of the rows, and of the tiles."""
    *whole, probes = weights()
    held = [one[list(order)] if order else one for one in whole]
    told = [Survival.of(*part, probes) for part in zip(*(torch.split(one, tile) for one in held), strict=True)]
    return reduce(Survival.plus, reversed(told) if order else told, Survival())


def test_the_figures_do_not_depend_on_tiles_threads_or_the_order_of_rows(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
    found = {by_tiles(20)}
    for together, tile in ((1, 20), (1 << 12, 1), (1 << 12, 7), (1 << 20, 20)):
        monkeypatch.setattr(survival, "_TOGETHER", together)
        found |= {by_tiles(tile), by_tiles(tile, order)}
    assert len(found) == 1
    assert found.pop().words() == Survival.of(*weights()).words()
    assert threads == torch.get_num_threads()


def test_they_are_those_of_their_definitions() -> None:
    before, wanted, after, probes = weights()
    d, moved, told = wanted - before, after - before, Survival.of(before, wanted, after, probes)
    ratio, n = float((moved * d).sum() / d.square().sum()), d.numel()
    assert told.retained == pytest.approx(ratio, rel=2 * n * EPS)
    assert told.noise == pytest.approx(float((moved - ratio * d).norm() / d.norm()), rel=4 * n * EPS)
    wrong = ((after - wanted) @ probes).norm() / (d @ probes).norm()
    # Of each output of the rows that count the grid's part is at most 2^-21 * columns * max|row| * max|probe|.
    grid = (
        2.0**-21
        * 1337
        * sum(
            float((one.abs().amax(1, keepdim=True) * probes.abs().amax(0)).norm() / (one @ probes).norm())
            for one in (after - wanted, d)
        )
    )
    assert told.output_error == pytest.approx(float(wrong), rel=grid + n * EPS)
    assert told.output_error == pytest.approx(float(wrong), rel=1e-6)  # what is printed


@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5), (0, 4), (4, 0)], ids=str)
def test_weights_of_any_shape_are_measured(shape: tuple[int, ...]) -> None:
    before, wanted = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    assert Survival.of(before, wanted, wanted / 2) == Survival(*(math.prod(shape) * Fraction(1, k) for k in (1, 2, 4)))


@pytest.mark.parametrize("columns", [1, 2, 3, 5632, 10_001])
def test_a_sum_of_a_row_is_free_of_the_other_rows_and_near_the_exact_one(columns: int) -> None:
    terms = torch.randn(30, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))
    sums = row_sums(terms)
    assert torch.equal(sums, torch.cat([row_sums(one) for one in terms.split(1)]))
    depth = columns.bit_length() + 1  # of additions that a term takes part in, at most twice the halvings
    for row, found in zip(terms, sums.tolist(), strict=True):
        assert abs(found - math.fsum(row.tolist())) <= 2 * depth * EPS * math.fsum(row.abs().tolist())


def by_halves(row: list[float]) -> float:
    while len(row) > 1:
        half, last = len(row) // 2, row[-1]
        odd = len(row) % 2
        row = [a + b for a, b in zip(row[:half], row[half : 2 * half], strict=True)]
        row[0] += last if odd else 0.0
    return row[0]


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 64, 1337])
def test_a_sum_of_a_row_is_that_of_its_halves_on_any_machine(columns: int) -> None:
    """A library's own sum takes as many terms side by side as the vectors of the machine are long."""
    terms = torch.randn(9, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))
    assert row_sums(terms).tolist() == [by_halves(row) for row in terms.tolist()]


def test_an_exact_sum_is_that_of_rationals() -> None:
    drawn = torch.Generator().manual_seed(3)
    sizes = 10 ** (60 * torch.randn(5000, dtype=torch.float64, generator=drawn))
    values = torch.randn(5000, dtype=torch.float64, generator=drawn) * sizes
    values = torch.cat([values, torch.tensor([5e-324, -5e-324, 0.0, -0.0, 1.7e308, 1.7e308], dtype=torch.float64)])
    assert exact_sum(values) == sum(map(Fraction, values.tolist()))
    assert exact_sum(values[:0]) == 0


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_leaves_nothing_and_is_told_so(wrong: float) -> None:
    before, wanted, after, probes = weights()
    after = after.clone()
    after[3, 4] = wrong
    told = Survival.of(before, wanted, after, probes).plus(Survival.of(before, wanted, wanted, probes))
    assert not survival.Bounds().admit(told)
    assert Survival.read(told.words()).words() == told.words()
    assert set(told.to_json().values()) == {None}


@pytest.mark.parametrize("moved", [1.0, -1e-3, 1e120], ids=str)
def test_sums_beyond_float64_are_told_to_be_no_numbers(moved: float) -> None:
    """Squares of 2e154 are no float64; the sum of many just below is a rational that is none either."""
    before = torch.zeros(9, 1, dtype=torch.float64)
    wanted = torch.tensor([[1.3e154]] * 8 + [[2e154]], dtype=torch.float64)
    finite, beyond = (Survival.of(*(one[rows] for one in (before, wanted, wanted * moved))) for rows in (slice(8), [8]))
    assert finite.wanted > 2 * Fraction(torch.finfo(torch.float64).max)
    assert beyond.wanted == math.inf
    for told in (finite.plus(beyond), beyond.plus(finite), total({"a": finite, "b": beyond})):
        assert math.isnan(told.retained)
        assert math.isnan(told.noise)
        assert not survival.Bounds(-math.inf, math.inf).admit(told)
        assert str(told) == "retained nan, noise nan"


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_left_is_told_with_its_sign_where_it_is_beyond_float64(sign: int) -> None:
    tiny, huge = Fraction(2) ** -900, sign * Fraction(2) ** 900
    assert Survival(wanted=tiny, along=huge).retained == sign * math.inf


def test_rows_too_small_for_an_exact_product_count_as_nothing_of_the_outputs() -> None:
    before, wanted, after, probes = weights()
    tiny = torch.full_like(wanted[:1], 2.0**-500)
    more = (torch.cat([one, other]) for one, other in ((before, 0 * tiny), (wanted, tiny), (after, 0 * tiny)))
    told, plain = Survival.of(*more, probes), Survival.of(before, wanted, after, probes)
    assert (told.missed, told.effect) == (plain.missed, plain.effect)


def test_what_a_journal_keeps_is_exact() -> None:
    told = by_tiles(20)
    assert Survival.read(told.words()) == told


def test_a_ratio_beyond_float64_is_infinite() -> None:
    assert Survival(Fraction(1, 1 << 1074), Fraction(), Fraction(1 << 10)).noise == math.inf


@pytest.mark.parametrize("exponent", [-452, -451, -450, 448, 449], ids="2^{}".format)
def test_outputs_of_a_row_do_not_depend_on_those_that_are_measured_with_it(exponent: int) -> None:
    """An exact product takes rows from 2^-451 on and below 2^450; of one that is too small it makes nothing."""
    before, probes = torch.zeros(2, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    wanted = torch.tensor([[2.0**exponent], [2.0**-500]], dtype=torch.float64)
    both = Survival.of(before, wanted, before, probes)
    alone = [Survival.of(before[row], wanted[row], before[row], probes) for row in (slice(1), slice(1, 2))]
    assert both.words() == reduce(Survival.plus, alone).words()
    assert bool(both.effect) == (exponent > -452)


def test_the_inputs_of_probes_do_not_depend_on_threads(threads: int) -> None:
    """Products of many directions, which a BLAS adds in an order of its own."""
    drawn = torch.Generator().manual_seed(0)
    known = Feedback.of_inputs(torch.randn(300, 900, dtype=torch.float64, generator=drawn))
    white, r = torch.randn(900, 33, dtype=torch.float64, generator=drawn), known.columns.shape[1]
    mixed = torch.randn(r, 33, dtype=torch.float64, generator=drawn)
    whole = known.inputs(white, mixed)
    singly = torch.cat([known.inputs(*one) for one in zip(white.split(1, 1), mixed.split(1, 1), strict=True)], 1)
    assert torch.equal(whole, singly)
    assert threads == torch.get_num_threads()


def test_the_sum_over_weights_does_not_depend_on_which_was_ready_first() -> None:
    told = {
        name: Survival(Fraction(1, n), Fraction(1, n), Fraction(1, n))
        for name, n in zip("abcd", (3, 7, 11, 13), strict=True)
    }
    assert len({total(dict(order)) for order in permutations(told.items())}) == 1


def test_of_no_weight_all_is_left() -> None:
    assert (total({}).retained, total({}).noise) == (1.0, 0.0)
