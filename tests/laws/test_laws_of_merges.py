"""Merges of every method over every op: tiles, steps, undo, biases and weights."""

import math

import pytest
import torch
from method_examples import (
    EPS,
    each_case,
    each_lasting,
    each_mixing,
    each_step,
    each_twins,
    each_with_steps,
    matrices,
    of_floats,
    stored_tiles,
    told,
    trained,
)
from op_examples import IN, OUT
from rational import same_bits

from surgery.core.arithmetic import exact_product, float_product
from surgery.core.elementwise import Elementwise, Growth
from surgery.core.method import Additive, Dense, Method, Mixing
from surgery.core.op import WHOLE, Op
from surgery.core.rounding import round_once, ulp
from surgery.core.sums import sum_rows
from surgery.core.undo import Recorder, Restorer, accumulate
from surgery.errors import StateError, ValueRangeError
from surgery.ops.bias import Bias


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@each_case
def test_a_merge_of_tiles_is_the_merge_of_the_whole_to_the_bit(method: Method, op: Op):
    """Of each size and of each dtype; all of a merge is in float64, and the sizes of tiles know no dtype."""
    for step, dtype in ((1, torch.float32), (4, torch.bfloat16), (7, torch.float16)):
        stored = op.stored(torch.randn(OUT, IN)).contiguous().to(dtype).double()
        p = told(method, op, op.matrix(stored), trained(method, op, torch.float32))
        whole = op.stored(method.merge(Dense(op.matrix(stored)), p, WHOLE, exact_product).weight)
        for rows in stored_tiles(op, math.lcm(step, method.together)):
            part = method.merge(Dense(op.matrix(stored[rows])), p, op.tile(rows), exact_product).weight
            assert same_bits(op.stored(part), whole[rows])
            assert same_bits(round_once(op.stored(part), dtype), round_once(whole, dtype)[rows])


@each_with_steps
def test_the_spread_of_a_tile_is_that_tile_of_the_whole_spread(method: Method, op: Op):
    p = told(method, op, torch.randn(OUT, IN), trained(method, op, torch.bfloat16))
    whole = op.stored(method.spread(p, WHOLE).expand(OUT, IN))
    assert bool((whole >= 0).all())
    if isinstance(method, Additive):
        added = op.stored(method.steps(p, WHOLE, exact_product).values.expand(OUT, IN))
        assert bool((whole > 0)[added != 0].all())
    for rows in stored_tiles(op, 5):
        part = op.stored(method.spread(p, op.tile(rows))).expand(whole[rows].shape)
        assert torch.allclose(part, whole[rows], rtol=2 * OUT * IN * EPS, atol=0)  # plain sums, in any order


@each_with_steps
def test_the_spread_over_a_tile_of_base_and_outcome_is_that_tile_of_the_whole(method: Method, op: Op):
    base = torch.randn(OUT, IN).double()
    p = told(method, op, base, trained(method, op, torch.bfloat16))
    outcome = method.merge(Dense(base), p, WHOLE, exact_product).weight
    whole = method.spread_over(base, outcome, p, WHOLE, torch.bfloat16).expand(OUT, IN)
    assert bool((whole >= method.spread(p, WHOLE)).all())
    assert bool((whole > 0).all()) or not method.of_base
    for rows in stored_tiles(op, 5):
        tile = op.tile(rows)
        part = method.spread_over(base[tile], outcome[tile], p, tile, torch.bfloat16).expand(base[tile].shape)
        assert torch.allclose(part, whole[tile], rtol=2 * OUT * IN * EPS, atol=0)  # plain sums, in any order


@each_step
def test_steps_are_the_merge_and_undo_takes_them_back(method: Method, op: Op):
    w, fitted = torch.randn(OUT, IN).double(), matrices(method, op, trained(method, op))
    assert (method.steps(fitted, WHOLE, exact_product) is None) == bool(method.couples)
    p = told(method, op, w, trained(method, op))
    step = method.steps(p, WHOLE, exact_product)
    assert step is not None
    step = step.seen(lambda values: values.expand(OUT, IN))
    merged = method.merge(Dense(w), p, WHOLE, exact_product).weight
    assert same_bits(step.apply(w), merged)
    # Two roundings, of the step and of its inverse: half an eps each of what it passes through.
    assert bool(((step.undo(merged) - w).abs() <= EPS * step.reach(merged.abs().clone())).all())
    where = torch.tensor([5, 0, OUT * IN - 1])
    assert same_bits(step.at(where).apply(w.flatten()[where]), merged.flatten()[where])
    higher = step.apply(torch.nextafter(w, torch.tensor(math.inf).double()))
    falls = step.falls()
    rises = torch.ones(OUT, IN, dtype=torch.bool) if falls is None else ~falls
    assert bool(torch.where(rises, higher >= merged, higher <= merged).all())


@each_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_the_merge_of_tensors_of_any_dtype(method: Method, op: Op, dtype: torch.dtype):
    w = torch.randn(OUT, IN).double()
    p = told(method, op, w, trained(method.weighted(0.3), op, dtype))
    step = method.weighted(0.3).steps(p, WHOLE, exact_product)
    assert step is not None
    assert same_bits(method.weighted(0.3).merge(Dense(w), p, WHOLE, exact_product).weight, step.apply(w))


@each_step
def test_plain_products_widen_nothing(method: Method, op: Op):
    p = told(method, op, torch.randn(OUT, IN), trained(method, op, torch.float32))
    step = method.steps(p, WHOLE, float_product)
    assert step is not None
    held = [values.dtype for values in p.values() if values.is_floating_point()]
    assert step.values.dtype == max(held, key=lambda dtype: dtype.itemsize)


@each_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_a_step_says_of_rounding_covers_the_merge_in_the_dtype_of_the_weight(
    method: Method, op: Op, dtype: torch.dtype
):
    w = torch.randn(OUT, IN).to(dtype)
    p = told(method, op, w, trained(method, op, dtype))
    step = method.steps(p, WHOLE, exact_product)
    assert step is not None
    exact = step.apply(w.double())
    narrow = step.seen(lambda values: values.to(dtype))
    if isinstance(narrow, Growth):
        grown = w * narrow.values
        plain = (w + (grown if narrow.added is None else grown + narrow.added)).double()
    else:
        plain = narrow.apply(w).double()
    held, outcome = step.rounded(w.double(), exact)
    base = method.spread_over(w.double(), exact, p, WHOLE, dtype) if method.of_base else 0
    assert bool(((plain - exact).abs() <= ulp(held, dtype) / 2 + ulp(outcome, dtype) / 2 + base).all())
    off = step.apply(w.double() + 2.0**-6) - exact
    carried = step.carried(torch.full((OUT, IN), 2.0**-6).double())
    assert bool(((off.abs() - carried).abs() <= 4 * EPS * (w.double().abs() + exact.abs() + 1)).all())


@each_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_in_the_memory_of_a_weight_are_the_same_and_leave_the_adapter_alone(
    method: Method, op: Op, dtype: torch.dtype
):
    w = torch.randn(OUT, IN).double()
    p = of_floats(told(method, op, w, trained(method, op)), lambda values: values.to(dtype))
    before = {role: values.clone() for role, values in p.items()}
    for one in (method, method.for_bias()):
        step = None if one is None else one.steps(p, WHOLE, exact_product)
        if step is not None:
            step = step.seen(lambda values: values.expand(OUT, IN))
            wanted = step.apply(w)
            assert same_bits(step.onto(w.clone()), wanted)
    assert all(same_bits(values, before[role]) for role, values in p.items())


@each_case
def test_a_method_that_changes_a_bias_does_so_as_its_steps_over_a_matrix_of_one_column(method: Method, op: Op):
    p, base = matrices(method, op, trained(method, op)), Dense(torch.randn(OUT, IN).double(), torch.randn(OUT).double())
    merged, on_bias = method.merge(base, p, WHOLE, exact_product), method.for_bias()
    if on_bias is None:
        assert merged.bias is base.bias
        return
    if on_bias.couples:
        assert on_bias.steps(p, WHOLE, exact_product) is None
        p = on_bias.told(p, sum_rows(on_bias.terms(base.weight, p, WHOLE, exact_product)))
    for rows in (slice(0, OUT), slice(OUT // 2, OUT)) if method.together in {1, OUT // 2} else [slice(0, OUT)]:
        column = Dense(base.bias[rows].unsqueeze(1))
        assert same_bits(on_bias.merge(column, p, Bias().tile(rows), exact_product).weight[:, 0], merged.bias[rows])
        step = on_bias.steps(p, Bias().tile(rows), exact_product)
        assert (step is None) == on_bias.mixes
        assert step is None or same_bits(step.seen(Bias().stored).apply(base.bias[rows]), merged.bias[rows])
    assert not torch.equal(merged.bias, base.bias)


@each_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merge_comes_back_to_the_bit_from_its_index(method: Method, op: Op, dtype: torch.dtype):
    stored = op.stored(torch.randn(OUT, IN)).to(dtype)
    p = told(method, op, op.matrix(stored), trained(method, op))

    def steps(rows: slice) -> list[Elementwise]:
        step = method.steps(p, op.tile(rows), exact_product)
        assert step is not None
        return [step.seen(lambda values: op.stored(values).expand(stored[rows].shape))]

    recorder, merged = Recorder(), []
    for rows in stored_tiles(op, 4):
        merged.append(round_once(accumulate(stored[rows].double(), steps(rows)), dtype))
        recorder.add(stored[rows], merged[-1], steps(rows))
    assert recorder.exact
    restorer, whole = Restorer(recorder.streams()), torch.cat(merged)
    assert torch.equal(whole, stored) == method.leaves_weight
    back = [restorer.restore(whole[rows], steps(rows), dtype) for rows in stored_tiles(op, 5)]
    assert same_bits(torch.cat(back), stored)


@each_lasting
@pytest.mark.parametrize("weight", [0.5, -2.0, 0.0])
def test_a_weight_scales_what_a_merge_changes(method: Method, op: Op, weight: float):
    p, w = matrices(method, op, trained(method, op)), torch.randn(OUT, IN).double()
    merged, weighted = (
        one.merge(Dense(w), p, WHOLE, exact_product).weight for one in (method, method.weighted(weight))
    )
    bound = 8 * EPS * (1 + abs(weight)) * (w.abs() + merged.abs())  # of some four roundings
    assert bool((((weighted - w) - weight * (merged - w)).abs() <= bound).all())
    assert same_bits(method.weighted(1.0).merge(Dense(w), p, WHOLE, exact_product).weight, merged)
    assert method.weighted(weight).settings() != method.settings()
    assert all(isinstance(text, str) for pair in method.settings().items() for text in pair)


@each_twins
def test_two_that_make_other_merges_of_the_same_tensors_have_other_settings(method: Method, twin: Method, op: Op):
    w, p = torch.randn(OUT, IN).double(), trained(method, op)
    merged, other = (
        one.merge(Dense(w, torch.ones(OUT).double()), told(one, op, w, p), WHOLE, exact_product)
        for one in (method, twin)
    )
    alike = same_bits(merged.weight, other.weight) and same_bits(merged.bias, other.bias)
    assert alike or method.settings() != twin.settings()


@each_case
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_tensors_that_are_not_finite_are_refused_where_a_merge_begins(method: Method, op: Op, bad: float):
    for role in (role for role, values in trained(method, op).items() if values.is_floating_point()):
        p = trained(method, op)
        p[role].view(-1)[0] = bad
        merges = [one for one in (method, method.for_bias()) if one is not None]
        with pytest.raises(ValueRangeError, match="NaN or infinity"):
            _ = [
                one.steps(one.prepared(matrices(method, op, p), exact_product), WHOLE, exact_product) for one in merges
            ]


@each_mixing
def test_what_a_base_is_off_by_is_carried_through_a_mix_and_no_further_than_told(method: Mixing, op: Op):
    w, p = torch.randn(OUT, IN).double(), method.prepared(matrices(method, op, trained(method, op)), exact_product)
    error = torch.zeros(OUT, IN).double()
    error[3, 5] = 2.0**-6
    moved, here = (method.merge(Dense(one), p, WHOLE, exact_product).weight for one in (w + error, w))
    allowed = method.strayed(w, error, p, WHOLE)
    assert bool(((moved - here).abs() <= allowed).all())
    assert bool(((moved - here).abs() > method.strayed(w, 0 * error, p, WHOLE)).any())  # else it could not fail
    assert method.steps(p, WHOLE, exact_product) is None


@each_mixing
def test_a_tile_that_cuts_what_lies_together_is_refused(method: Mixing, op: Op):
    stored = op.stored(torch.randn(OUT, IN).double())
    p = matrices(method, op, trained(method, op))
    for rows in (slice(0, 3), slice(1, len(stored)), slice(1, 1 + method.together)) if method.together > 1 else ():
        with pytest.raises(StateError, match="no whole groups"):
            method.merge(Dense(op.matrix(stored[rows])), p, op.tile(rows), exact_product)
