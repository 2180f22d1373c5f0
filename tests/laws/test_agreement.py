"""Outputs agree where they lie within the noise of their dtype, and an adapter's effect stands out from the error."""

import json
import math
import re

import pytest
import torch
from torch import Tensor

from surgery.core.agreement import FACTOR, MARGIN, Agreements, compare, floors
from surgery.core.distance import NOWHERE, Distance, distance, half_ulp

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float64).eps


def logits(seed: int = 0, rows: int = 30, classes: int = 40) -> Tensor:
    return 4 * torch.randn(rows, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def judged(found: Tensor, true: Tensor | None = None, noise: float = 1e-6, base: Tensor | None = None) -> Agreements:
    """Of one output whose noise floor is `noise`, logits or not."""
    a = logits() if true is None else true
    floor = {"logits": Distance(noise, noise**2, noise**2 * 16, noise**2 * 256)}
    return compare({"logits": a}, {"logits": found}, floor, None if base is None else {"logits": base})


def off_by(error: float) -> Tensor:
    """The logits, one of which is off by so much of the largest."""
    found = logits()
    found[3, 5] += error * found.abs().max()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_output_is_nowhere_from_itself(dtype: torch.dtype) -> None:
    values = logits().to(dtype)
    assert distance(values, values.clone(), logits=True) == Distance(0.0, 0.0)


def test_the_measures_are_those_of_their_definitions() -> None:
    a, b = logits(), logits(1)
    found = distance(a, b, logits=True)
    p, q = a.softmax(1), b.softmax(1)
    kl = (p * (p / q).log()).sum(1)
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    assert found.error == float((a - b).abs().max() / a.abs().max())
    assert found.angle == pytest.approx(1 - float(cosine), rel=64 * EPS)
    assert (found.kl_mean, found.kl_max) == pytest.approx((float(kl.mean()), float(kl.max())), rel=1000 * EPS)
    assert found.top1 == float((a.argmax(1) == b.argmax(1)).double().mean())


@pytest.mark.parametrize("size", [1e-4, 1e-8, 1e-12])
def test_small_distances_do_not_cancel(size: float) -> None:
    """To second order in the errors d: the angle is half their square across the output, KL half their variance."""
    a, d = logits(), size * logits(1)
    found = distance(a, a + d, logits=True)
    across = d - a * (a * d).sum() / a.square().sum()
    p = a.softmax(1)
    variance = (p * d.square()).sum(1) - (p * d).sum(1).square()
    lost = 100 * size + 1000 * EPS / size  # the third order, and the roundings of a + d and of its logarithms
    assert found.angle == pytest.approx(float(across.square().sum() / a.square().sum()) / 2, rel=lost)
    assert found.kl_mean == pytest.approx(float(variance.mean()) / 2, rel=lost)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_one_rounding_lies_within_half_an_ulp(dtype: torch.dtype) -> None:
    a = logits()
    found, most = distance(a, a.to(dtype), logits=True), half_ulp(a.to(dtype), a, logits=True)
    assert 0 < found.error <= most.error
    assert 0 < found.angle <= most.angle
    assert 0 < found.kl_mean <= found.kl_max <= most.kl_max * (1 + 10 * most.error * float(a.abs().max()))


@pytest.mark.parametrize("k", [-9, 7])
def test_a_distance_does_not_depend_on_the_size_of_the_outputs(k: int) -> None:
    assert distance(logits(), logits(1)) == distance(logits() * 2.0**k, logits(1) * 2.0**k)


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_on_one_side_is_nowhere(what: float) -> None:
    wrong = logits()
    wrong[0, 0] = what
    assert distance(logits(), wrong, logits=True) == distance(wrong, logits(), logits=True) == NOWHERE
    assert not judged(wrong).ok
    assert (distance(wrong, wrong) == Distance(0.0, 0.0)) == (not math.isnan(what))
    assert json.loads(json.dumps(judged(wrong).to_json(), allow_nan=False))["ok"] is False


@pytest.mark.parametrize("noise", [1e-3, 1e-6])
def test_an_error_of_so_many_floors_agrees_and_a_larger_one_does_not(noise: float) -> None:
    assert judged(off_by(0.99 * FACTOR * noise), noise=noise).ok
    report = judged(off_by(1.01 * FACTOR * noise), noise=noise)
    assert not report.ok
    assert "the error is" in report.why


def test_a_direction_and_a_distribution_that_turn_are_found_under_an_error_that_is_small() -> None:
    floor = {"logits": Distance(0.1, 1e-12, 1.0, 1.0)}
    found = compare({"logits": logits()}, {"logits": logits() + 0.01 * logits(1)}, floor)
    assert "1 - cosine" in found.why
    found = compare({"logits": logits()}, {"logits": off_by(0.01)}, {"logits": Distance(0.1, 0.1, 1e-12, 1.0)})
    assert "the mean KL" in found.why
    found = compare({"logits": logits()}, {"logits": off_by(0.01)}, {"logits": Distance(0.1, 0.1, 1.0, 1e-12)})
    assert "the largest KL" in found.why


def test_two_logits_within_the_noise_may_swap_places_and_others_may_not() -> None:
    for lead, ok in ((1e-6, True), (1e-3, False)):
        true = torch.tensor([[1.0, 1 - lead, 0.0]], dtype=torch.float64)
        found = judged(true[:, [1, 0, 2]], true)
        assert found.ok == ok
        assert found.outputs[0].found.top1 == 0


def test_padded_rows_are_left_out_and_others_are_not() -> None:
    true, found = logits().reshape(3, 10, 40), off_by(1.0).reshape(3, 10, 40)
    rows = torch.ones(3, 10, dtype=torch.long)
    floor = {"logits": Distance(1e-6, 1e-6, 1e-6, 1e-6), "pooled": Distance(1e-6, 1e-6)}
    assert not compare({"logits": true}, {"logits": found}, floor, rows=rows).ok
    rows[0, 3] = 0
    report = compare({"logits": true}, {"logits": found}, floor, rows=rows)
    assert report.ok
    assert report.outputs[0].rows == 29
    pooled = {"pooled": true[:, 0]}
    assert compare(pooled, pooled, floor, rows=rows).outputs[0].rows == 3
    assert "no row" in compare({"logits": true}, {"logits": found}, floor, rows=torch.zeros(3, 10)).why


def test_the_floor_is_the_noise_of_a_run_and_never_below_half_an_ulp() -> None:
    exact = {"logits": logits(), "count": torch.arange(3)}
    noisy = {"logits": off_by(1e-3).float(), "count": torch.arange(3)}
    assert floors(noisy, exact)["logits"].error == pytest.approx(1e-3, rel=1e-3)
    same = floors({"logits": logits().bfloat16().double().bfloat16()}, {"logits": logits().bfloat16().double()})
    assert same["logits"] == half_ulp(logits().bfloat16(), logits().bfloat16().double(), logits=True)
    assert floors(noisy, exact)["count"] == Distance(0.0, 0.0)
    assert not compare(exact, exact | {"count": torch.tensor([0, 1, 3])}, floors(noisy, exact)).ok


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({}, "the other has it not"),
        ({"logits": logits()[:, 1:]}, r"the other's is \[30, 39\]"),
        ({"logits": logits(), "more": logits()}, "more: only the other has it"),
    ],
)
def test_outputs_of_other_names_and_shapes_do_not_agree(found: dict[str, Tensor], why: str) -> None:
    report = compare({"logits": logits()}, found, {"logits": Distance(1e-6, 1e-6, 1e-6, 1e-6)})
    assert not report.ok
    assert re.search(why, report.why)


@pytest.mark.parametrize("floor", [{}, {"logits": NOWHERE}, {"logits": Distance(1 / FACTOR, 1.0)}], ids=str)
def test_where_noise_drowns_all_nothing_agrees(floor: dict[str, Distance]) -> None:
    assert "noise floor" in compare({"logits": logits()}, {"logits": logits()}, floor).why


def test_no_output_at_all_is_no_agreement() -> None:
    assert "no output" in compare({}, {}, {}).why


def test_an_adapter_that_changes_nothing_does_not_agree() -> None:
    report = judged(logits(), base=logits())
    assert report.outputs[0].ok
    assert "the adapter changes no output" in report.why


@pytest.mark.parametrize("base", [{}, {"logits": logits()[:, 1:]}, {"logits": logits() * math.nan}], ids=len)
def test_without_a_base_of_numbers_no_effect_is_told(base: dict[str, Tensor]) -> None:
    floor = {"logits": Distance(1e-6, 1e-6, 1e-6, 1e-6)}
    assert "no effect can be told" in compare({"logits": logits()}, {"logits": logits()}, floor, base).why


def test_an_output_that_the_adapter_does_not_reach_is_judged_by_noise_alone() -> None:
    runs = {"logits": off_by(0.5), "embeds": logits()}
    floor = dict.fromkeys(runs, Distance(1e-6, 1e-6, 1e-6, 1e-6))
    assert compare(runs, runs, floor, {"logits": logits(), "embeds": logits()}).ok
    assert not compare(runs, runs | {"embeds": off_by(0.1)}, floor, {"logits": logits(), "embeds": logits()}).ok


def test_an_error_as_large_as_a_part_of_the_effect_does_not_agree() -> None:
    for part, ok in ((0.9 / MARGIN, True), (1.1 / MARGIN, False), (1.0, False)):
        report = judged(off_by(part * 1e-3), noise=1e-2, base=off_by(1e-3))
        assert report.ok == ok
        assert ("whole effect" in report.why) == (not ok)


def test_an_effect_stands_out_where_no_error_is_as_large_as_a_part_of_it() -> None:
    assert judged(off_by(1e-4), base=off_by(1e-3)).stands_out
    assert judged(off_by(1e-4)).stands_out  # of no adapter that is known
    assert not judged(off_by(1e-3), base=off_by(1e-3)).stands_out
    assert not judged(logits(), base=logits()).stands_out


def test_the_table_and_the_json_hold_all_figures() -> None:
    report = judged(off_by(1e-3), base=off_by(0.5))
    head, line = report.table().splitlines()
    assert head.split()[:4] == ["output", "agrees", "error", "floor"]
    assert line.split()[:4] == ["logits", "no", "0.001", "1e-06"]
    told = report.to_json()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["outputs"]["logits"]["found"]["error"] == pytest.approx(1e-3)
