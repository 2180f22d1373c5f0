"""Exact arithmetic, every method over every op, and every codec: a GPU gives the bits that a CPU gives."""

import codec_examples
import pytest
import torch
from device import DEVICE, all_there, here, there
from method_examples import (
    EPS,
    Below,
    each_case,
    each_with_steps,
    given,
    magnitude,
    matrices,
    stored_tiles,
    told,
    trained,
)
from op_examples import IN, OUT, beside, site_of
from rational import same_bits
from torch import Tensor

from surgery.codecs import FORMS
from surgery.core.arithmetic import divided, exact_product, largest_change, tree_sum
from surgery.core.codec import Codec, Packed
from surgery.core.elementwise import Elementwise
from surgery.core.feedback import Feedback
from surgery.core.method import Dense, Method, Mixing
from surgery.core.op import WHOLE, Op
from surgery.core.rounding import round_once, ulp
from surgery.core.sums import sum_rows
from surgery.core.undo import Recorder, Restorer, accumulate

HALVES = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
each_packed = pytest.mark.parametrize(("codec", "name"), codec_examples.CASES)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def same(found: Tensor, wanted: Tensor) -> bool:
    """To the bit, of what was found there and what is wanted here."""
    assert found.device.type == torch.device(DEVICE).type
    return same_bits(here(found), wanted)


@pytest.mark.parametrize(("out", "r", "columns"), [(1, 1, 1), (130, 8, 257), (64, 512, 4096), (33, 1200, 70)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_products_have_the_same_bits(out: int, r: int, columns: int, dtype: torch.dtype):
    sizes = torch.logspace(-30, 30, r, dtype=torch.float64).unsqueeze(1)
    B, A = torch.randn(out, r, dtype=torch.float64), torch.randn(r, columns, dtype=torch.float64) * sizes
    B, A = B.to(dtype), A.to(dtype)
    wanted = exact_product(B, A)
    assert same(exact_product(there(B), there(A)), wanted)
    tile = slice(out // 2, out), slice(0, columns)
    assert same(exact_product(there(B), there(A), tile), wanted[tile])
    assert same(exact_product(there(B), there(A), fine=True), exact_product(B, A, fine=True))


@each_dtype
def test_roundings_sums_and_divisions_have_the_same_bits(dtype: torch.dtype):
    values = torch.randn(1 << 16, dtype=torch.float64) * torch.logspace(-45, 38, 1 << 16, dtype=torch.float64)
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(HALVES[0]).to(torch.float64)
    ties = halves * (1 + 2.0**-8) + 2.0**-60 * halves
    for one in (values, halves[halves.isfinite()], ties[ties.isfinite()]):
        assert same(round_once(there(one), dtype), round_once(one, dtype))
        assert same(ulp(there(one), dtype), ulp(one, dtype))
        assert tree_sum(there(one)) == tree_sum(one)
    held = values[:30000].clamp(-1e4, 1e4).to(dtype)
    assert all(same(divided(there(held), n), held / n) for n in (6, 7.5, 12, 15, 127.5))
    assert same(sum_rows(there(values.view(64, -1))), sum_rows(values.view(64, -1)))
    assert largest_change(there(held), there(held + 1)) == largest_change(held, held + 1)


@each_case
@each_dtype
def test_a_merge_has_the_same_bits(method: Method, op: Op, dtype: torch.dtype):
    stored, p = op.stored(torch.randn(OUT, IN)).contiguous().to(dtype).double(), trained(method, op, torch.float32)
    wanted = op.stored(
        method.merge(Dense(op.matrix(stored)), told(method, op, op.matrix(stored), p), WHOLE, exact_product).weight
    )
    placed, p = there(stored), all_there(p)
    p = told(method, op, op.matrix(placed), p)
    found = op.stored(method.merge(Dense(op.matrix(placed)), p, WHOLE, exact_product).weight)
    assert same(found, wanted)
    assert same(round_once(found, dtype), round_once(wanted, dtype))


@each_with_steps
@each_dtype
def test_what_one_records_of_a_merge_the_other_undoes(method: Method, op: Op, dtype: torch.dtype):
    stored, p = op.stored(torch.randn(OUT, IN)).contiguous().to(dtype), trained(method, op, torch.float32)
    streams, merged = {}, {}
    for place in ("cpu", DEVICE):
        weight, known = stored.to(place), {role: values.to(place) for role, values in p.items()}
        known = told(method, op, op.matrix(weight.double()), known)
        recorder, parts = Recorder(), []
        for rows in stored_tiles(op, 4):
            steps = [_step(method, op, known, weight[rows], rows)]
            parts.append(round_once(accumulate(weight[rows].double(), steps), dtype))
            recorder.add(weight[rows], parts[-1], steps)
        streams[place], merged[place] = recorder.streams(), torch.cat(parts)
        assert recorder.exact
    assert streams["cpu"] == streams[DEVICE]
    assert same(merged[DEVICE], merged["cpu"])
    restorer = Restorer(streams["cpu"])
    back = [
        restorer.restore(merged[DEVICE][rows], [_step(method, op, known, weight[rows], rows)], dtype)
        for rows in stored_tiles(op, 5)
    ]
    assert same(torch.cat(back), stored)


def _step(method: Method, op: Op, p: dict[str, Tensor], part: Tensor, rows: slice) -> Elementwise:
    step = method.steps(p, op.tile(rows), exact_product)
    assert step is not None
    return step.seen(lambda values: op.stored(values).expand(part.shape))


@each_case
@each_dtype
def test_a_fresh_adapter_leaves_the_output_equal_to_the_bit(method: Method, op: Op, dtype: torch.dtype):
    base, x = (
        Dense(there(torch.randn(OUT, IN, dtype=dtype)), there(torch.randn(OUT, dtype=dtype))),
        there(given(op, dtype, 4, 3)),
    )
    fresh = all_there(method.init(site_of(op), lambda: base))
    assert same_bits(method.branch(x, Below(op, base), op, fresh, True).to(dtype), op.apply(x, *base))


@each_case
def test_a_branch_is_the_merged_forward_within_the_spread(method: Method, op: Op):
    base = Dense(there(torch.randn(OUT, IN).double()), there(torch.randn(OUT).double()))
    p, x = all_there(trained(method, op)), there(given(op, torch.float64, 5, 3))
    merged = method.merge(base, matrices(method, op, p), WHOLE, exact_product)
    apart = (method.branch(x, Below(op, base), op, p, False) - op.apply(x, merged.weight, merged.bias)).abs()
    p = told(method, op, base.weight, p)
    off = method.spread_over(base.weight, merged.weight, p, WHOLE, torch.float64)
    if isinstance(method, Mixing):
        off = method.strayed(
            base.weight, there(torch.zeros(OUT, IN).double()), method.prepared(p, exact_product), WHOLE
        )
    biases = beside(op, base.bias.abs() + merged.bias.abs())
    rounding = (IN + 2) * EPS * (magnitude(op, x, base.weight) + magnitude(op, x, merged.weight) + biases)
    assert bool((apart <= magnitude(op, x, off.expand(OUT, IN)) + rounding).all())


def same_numbers(found: Tensor, wanted: Tensor) -> bool:
    """The same bits but for those of a NaN."""
    nowhere = wanted.isnan()
    return torch.equal(here(found.isnan()), nowhere) and same(
        found.masked_fill(there(nowhere), 0), wanted.masked_fill(nowhere, 0)
    )


def placed(packed: Packed) -> Packed:
    return packed._replace(tensors=all_there(packed.tensors))


@each_packed
def test_a_codec_gives_the_same_bits(codec: Codec, name: str):
    packed = codec_examples.EXAMPLES[codec.name][name]
    there_too = placed(packed)
    for dtype in (torch.float64, *HALVES):
        assert same_numbers(codec.decode(there_too, dtype), codec.decode(packed, dtype))
    for found, wanted in zip(codec.grid(there_too), codec.grid(packed), strict=True):
        assert same_numbers(found + 0.0, wanted + 0.0)  # of a -0 and a 0, which is the smaller is left open
    weight = codec.decode(packed, torch.float64)
    moved = torch.where(weight.isfinite(), weight + 0.1 * torch.randn(weight.shape, dtype=torch.float64), weight)
    found, wanted = codec.encode(there(moved), like=there_too), codec.encode(moved, like=packed)
    role = next(iter(codec.endings))
    assert same(found.tensors[role], wanted.tensors[role])


@each_dtype
@pytest.mark.parametrize("form", FORMS)
def test_fresh_scales_and_codes_have_the_same_bits(form: str, dtype: torch.dtype):
    codec, settings = FORMS[form]
    weight = (torch.randn(257, 384) * torch.logspace(-3, 1, 257).unsqueeze(1)).to(dtype)
    wanted, found = codec.fresh(weight, settings), codec.fresh(there(weight), settings)
    assert {role: here(values) for role, values in found.tensors.items()}.keys() == wanted.tensors.keys()
    assert all(same_bits(here(values), wanted.tensors[role]) for role, values in found.tensors.items())
    assert found.settings == wanted.settings


@pytest.mark.parametrize("by", ["directions", "inputs"])
def test_feedback_chooses_the_same_codes(by: str):
    wanted, directions = 3 * torch.randn(70, 96, dtype=torch.float64), torch.randn(5, 96)
    held = wanted.round()
    feedback = Feedback.along(directions) if by == "directions" else Feedback.of_inputs(directions)
    chosen = feedback.choose(wanted, held, held - 1, held + 1)
    if by == "directions":
        feedback = Feedback.along(there(directions))
    values = [there(one) for one in (wanted, held, held - 1, held + 1)]
    assert same(feedback.choose(*values), chosen)
    assert not torch.equal(chosen, held)
