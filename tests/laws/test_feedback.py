"""Feedback: the codes of GPTQ for an H of low rank, never worse than the nearest by it, row by row."""

import pytest
import torch
from torch import Tensor

from surgery.core.feedback import Feedback


def drawn(rows: int, columns: int, r: int) -> tuple[Tensor, Tensor]:
    """A weight in steps of 1, and directions."""
    generator = torch.Generator().manual_seed(rows * columns)
    wanted = 3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return wanted, torch.randn(r, columns, generator=generator, dtype=torch.float64)


def importance(directions: Tensor) -> Tensor:
    """H, as it is defined."""
    unit = directions / directions.norm(dim=1, keepdim=True)
    r, columns = directions.shape
    return torch.eye(columns, dtype=torch.float64) + columns / r * unit.T @ unit


def of_moments(inputs: Tensor, rest: Tensor) -> Tensor:
    """H of inputs, with a hundredth of an input's mean energy for all that was never seen."""
    moment = inputs.T @ inputs / len(inputs) + rest.diag()
    return moment + 0.01 * moment.diagonal().mean() * torch.eye(len(rest), dtype=torch.float64)


def measured(error: Tensor, H: Tensor) -> Tensor:
    return (error @ H * error).sum(dim=1)


def by_gptq(wanted: Tensor, held: Tensor, H: Tensor) -> Tensor:
    """Column by column, the later ones free to take off what is best: by the Schur complement over these."""
    chosen, columns = torch.empty_like(held), wanted.shape[1]
    for j in range(columns):
        now, later = slice(0, j + 1), slice(j + 1, columns)
        left = H[now, now] - H[now, later] @ torch.linalg.solve(H[later, later], H[later, now])
        errors = chosen[:, :j] - wanted[:, :j]
        target = wanted[:, j] - errors @ left[:j, j] / left[j, j]
        options = torch.stack([held[:, j] + step for step in (0, -1, 1)])
        chosen[:, j] = options.gather(0, (options - target).abs().argmin(dim=0, keepdim=True))[0]
    return chosen


@pytest.mark.parametrize("by", ["directions", "inputs"])
def test_the_codes_are_those_of_gptq_where_they_are_better_than_the_nearest(by: str):
    wanted, directions = drawn(40, 24, 3)
    rest = torch.linspace(0, 1, 24, dtype=torch.float64)
    H, feedback = importance(directions), Feedback.along(directions)
    if by == "inputs":
        H, feedback = of_moments(3 * directions, rest), Feedback.of_inputs(3 * directions, rest)
    held = wanted.round()
    found = feedback.choose(wanted, held, held - 1, held + 1)
    by_all = by_gptq(wanted, held, H)
    better = measured(by_all - wanted, H) < measured(held - wanted, H)
    assert torch.equal(found, torch.where(better.unsqueeze(1), by_all, held))
    assert int(better.sum()) > 30
    assert bool((measured(found - wanted, H) <= measured(held - wanted, H)).all())


@pytest.mark.parametrize(("unit", "most"), [(2.0**-500, 1), (2.0**511, 1), (2.0**1000, 0)], ids=str)
def test_the_unit_of_inputs_changes_no_bit(unit: float, most: int):
    wanted, directions = drawn(9, 24, 3)
    rest = torch.linspace(0, most, 24, dtype=torch.float64) if most else None
    known = Feedback.of_inputs(directions, rest)
    found = Feedback.of_inputs(directions * unit, None if rest is None else rest * unit * unit)
    assert torch.equal(found.columns, known.columns)
    assert torch.equal(found.alone, known.alone)
    assert bool(found.gains.isfinite().all())
    held = wanted.round()
    assert not torch.equal(found.choose(wanted, held, held - 1, held + 1), held)


def test_rows_know_nothing_of_each_other_and_a_zero_direction_counts_for_nothing():
    wanted, directions = drawn(9, 70, 5)
    held = wanted.round()
    whole = Feedback.along(directions).choose(wanted, held, held - 1, held + 1)
    with_zero = Feedback.along(torch.cat([directions, torch.zeros(1, 70)]))
    rows = [with_zero.choose(*(one[i : i + 2] for one in (wanted, held, held - 1, held + 1))) for i in range(0, 9, 2)]
    assert torch.equal(torch.cat(rows), whole)


def test_what_is_held_already_stays():
    held, directions = drawn(5, 33, 2)
    assert torch.equal(Feedback.along(directions).choose(held, held, held - 1, held + 1), held)
    assert torch.equal(Feedback.along(0 * directions).choose(held + 0.4, held, held - 1, held + 1), held)
