"""exp by a fixed sequence of operations: within its bound of the true value, and of the same bits wherever it lies."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from rational import same_bits

from surgery.core.exponential import RELATIVE_ERROR, exp

UNIT = torch.finfo(torch.float64).eps / 2


def given() -> torch.Tensor:
    torch.manual_seed(0)
    near = torch.linspace(-3, 3, 401, dtype=torch.float64)
    halves = torch.arange(-40, 40).double() * (math.log(2) / 2)  # where the power of two changes
    wide = torch.rand(400, dtype=torch.float64) * 1416 - 708
    small = torch.tensor([0.0, -0.0, 1e-300, -1e-300, 2.0**-30, -(2.0**-53)]).double()
    return torch.cat([near, halves, torch.nextafter(halves, torch.zeros(())), wide, small])


def test_it_is_within_its_bound_of_the_true_value() -> None:
    assert RELATIVE_ERROR < 1e-15
    x = given()
    with localcontext() as context:
        context.prec = 40
        for one, found in zip(x.tolist(), exp(x).tolist(), strict=True):
            wanted = Decimal(one).exp()
            assert abs(Decimal(found) - wanted) <= Decimal(RELATIVE_ERROR) * wanted, one


def test_it_is_as_near_to_that_of_the_standard_library_as_both_are_to_the_true_value() -> None:
    x = given()
    wanted = torch.tensor([math.exp(one) for one in x.tolist()], dtype=torch.float64)
    # The library's is off by less than an ulp, which is at most two units.
    assert bool(((exp(x) - wanted).abs() <= (RELATIVE_ERROR + 2 * UNIT) * wanted).all())


def test_what_float64_cannot_hold_is_zero_or_infinite_and_what_is_no_number_stays_none() -> None:
    far = torch.tensor([-math.inf, -1e300, -1e4, -746, 710, 1e4, 1e300, math.inf], dtype=torch.float64)
    assert exp(far).tolist() == [0.0] * 4 + [math.inf] * 4
    assert bool(exp(torch.tensor([math.nan]).double()).isnan().all())
    low = torch.tensor([-740.0], dtype=torch.float64)  # below the normal range one rounding more
    assert math.isclose(float(exp(low)), math.exp(-740), rel_tol=RELATIVE_ERROR, abs_tol=2.0**-1074)


@pytest.mark.parametrize("count", [1, 3, 8, 17])
def test_its_bits_do_not_depend_on_where_a_number_stands(count: int) -> None:
    x = given()
    parts = torch.cat([exp(x[start : start + count]) for start in range(0, len(x), count)])
    assert same_bits(parts, exp(x))
    assert same_bits(exp(x.flip(0)).flip(0), exp(x))


def test_its_gradient_is_itself() -> None:
    x = (torch.rand(200, dtype=torch.float64) * 40 - 20).requires_grad_()
    found = exp(x)
    found.sum().backward()
    # The slope of a polynomial one degree lower: what that leaves out is below r^13 / 13! = 2e-16 of the value.
    assert x.grad is not None
    assert bool(((x.grad - found).abs() <= 8 * UNIT * found).all())
