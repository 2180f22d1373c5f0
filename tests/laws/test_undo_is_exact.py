"""Recorder and Restorer: what a merge made of a weight comes back to the bit."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rational import same_bits
from torch import Tensor

from surgery.core import bits, undo
from surgery.core.arithmetic import exact_product
from surgery.core.elementwise import Elementwise, Scale, Shift
from surgery.core.rounding import rounding
from surgery.core.undo import Recorder, Restorer, accumulate, from_order, merged_value, order
from surgery.errors import CheckError

SINGLE, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
SAME = [(SINGLE, SINGLE), (BFLOAT, BFLOAT), (HALF, HALF)]
CAST = [(SINGLE, BFLOAT), (SINGLE, HALF), (BFLOAT, SINGLE), (HALF, SINGLE), (BFLOAT, HALF), (HALF, BFLOAT)]
PAIRS = SAME + CAST
INTEGERS = {DOUBLE: torch.int64, SINGLE: torch.int32, BFLOAT: torch.int16, HALF: torch.int16}
KINDS = ["normal", "small", "zero", "power of two", "denormal", "any bits"]
SHIFTS = ["none", "negative none", "normal", "small", "cancels", "nearly cancels", "half a step", "large", "tiny"]


def weights(kind: str, dtype: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    """`count` weights of one kind, of magnitudes up to 2^10."""
    sign = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
    normal = torch.randn(count, dtype=DOUBLE, generator=generator)
    whole = torch.randint(-14, 8, (count,), generator=generator)
    if kind == "any bits":
        top = int(torch.tensor(2.0**10, dtype=dtype).view(INTEGERS[dtype]))
        patterns = torch.randint(0, top, (count,), generator=generator).to(INTEGERS[dtype])
        return patterns.view(dtype) * sign.to(dtype)
    values = {
        "normal": normal,
        "small": normal * 0.02,
        "zero": 0 * sign,
        "power of two": sign * 2.0**whole,
        "denormal": normal * torch.finfo(dtype).smallest_normal / 3,
    }
    return values[kind].to(dtype)


def shifts(kind: str, w: Tensor, generator: torch.Generator) -> Tensor:
    """A shift (float64) for each of `w`."""
    normal = torch.randn(w.shape, dtype=DOUBLE, generator=generator)
    step = from_order(order(w.abs()) + 1, w.dtype).double() - w.abs().double()  # to the next magnitude
    return {
        "none": torch.zeros_like(normal),
        "negative none": -torch.zeros_like(normal),
        "normal": normal,
        "small": normal * 2e-4,
        "cancels": -w.double(),
        "nearly cancels": -w.double() * (1 + normal * 2.0**-9),
        "half a step": step * (torch.randint(-4, 5, w.shape, generator=generator) / 2),
        "large": normal * 100,
        "tiny": normal * 1e-9,
    }[kind]


def tiles(count: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def cut(steps: Sequence[Elementwise], rows: slice) -> list[Elementwise]:
    return [step.seen(lambda values: values[rows]) for step in steps]


def record(w: Tensor, merged: Tensor, steps: Sequence[Elementwise], step: int) -> Recorder:
    """With and without the ties that the rounding tells of, which must be the same."""
    recorder, told = Recorder(), Recorder()
    for rows in tiles(len(w), step):
        here = cut(steps, rows)
        recorder.add(w[rows], merged[rows], here)
        told.add(w[rows], merged[rows], here, rounding(accumulate(w[rows].double(), here), merged.dtype).near_ties)
    assert (told.exact, told.streams()) == (recorder.exact, recorder.streams())
    return recorder


def restore(
    streams: dict[int, bytes], merged: Tensor, steps: Sequence[Elementwise], dtype: torch.dtype, step: int
) -> Tensor:
    restorer = Restorer(streams)
    return torch.cat([restorer.restore(merged[r], cut(steps, r), dtype) for r in tiles(len(merged), step)])


def mixture(dtype: torch.dtype, seed: int, each: int = 40) -> tuple[Tensor, Tensor]:
    """Every kind of weight under every kind of shift: [weights], [shift]."""
    generator = torch.Generator().manual_seed(seed)
    w = [weights(kind, dtype, each, generator) for kind in KINDS for _ in SHIFTS]
    moved = [shifts(SHIFTS[at % len(SHIFTS)], one, generator) for at, one in enumerate(w)]
    return torch.cat(w), torch.cat(moved)


def needed_bits(streams: dict[int, bytes]) -> int:
    return 8 * sum(map(len, streams.values()))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_kind_of_weight_comes_back_to_the_bit(pair, seed):
    dtype, outcome = pair
    w, shift = mixture(dtype, seed)
    steps = [Shift(shift)]
    merged = merged_value(w.double(), steps, outcome)
    recorder = record(w, merged, steps, len(w))
    assert recorder.exact
    streams = recorder.streams()
    assert needed_bits(streams) > 0
    assert same_bits(restore(streams, merged, steps, dtype, len(w)), w)


@pytest.mark.parametrize("pair", SAME, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moved", SHIFTS)
@settings(deadline=None, max_examples=4, database=None)
@given(seed=st.integers(0, 2**32))
def test_weights_of_one_kind_come_back_under_shifts_of_one_kind(pair, kind, moved, seed):
    dtype, outcome = pair
    generator = torch.Generator().manual_seed(seed)
    w = weights(kind, dtype, 30, generator)
    steps = [Shift(shifts(moved, w, generator))]
    merged = merged_value(w.double(), steps, outcome)
    recorder = record(w, merged, steps, 30)
    assert recorder.exact
    assert same_bits(restore(recorder.streams(), merged, steps, dtype, 30), w)


@pytest.mark.parametrize("pair", [*SAME, (SINGLE, BFLOAT), (HALF, SINGLE)], ids=str)
def test_tiles_of_other_sizes_give_the_same_streams_and_the_same_weights(pair):
    dtype, outcome = pair
    w, shift = mixture(dtype, seed=2, each=7)
    steps = [Shift(shift)]
    merged = merged_value(w.double(), steps, outcome)
    streams = record(w, merged, steps, len(w)).streams()
    for step in (5, 64, 377):
        assert record(w, merged, steps, step).streams() == streams
        assert same_bits(restore(streams, merged, steps, dtype, step), w)


@pytest.mark.parametrize("part", [1, 50, 1000])
def test_however_many_indices_are_packed_at_a_time_the_streams_are_the_same(part, monkeypatch):
    w, shift = mixture(BFLOAT, seed=10)
    steps = [Shift(shift)]
    merged = merged_value(w.double(), steps, BFLOAT)
    streams = record(w, merged, steps, len(w)).streams()
    monkeypatch.setattr(undo, "_PART", part)
    monkeypatch.setattr(bits, "_PART", part)
    assert record(w, merged, steps, 100).streams() == streams
    assert same_bits(restore(streams, merged, steps, BFLOAT, 70), w)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_any_shape_comes_back_after_any_number_of_steps(shape, count):
    generator = torch.Generator().manual_seed(11)
    w = torch.randn(shape, generator=generator).to(BFLOAT)
    steps = [Shift(torch.randn(shape, dtype=DOUBLE, generator=generator) * 0.01) for _ in range(count)]
    merged = merged_value(w.double(), steps, BFLOAT)
    recorder = Recorder()
    recorder.add(w, merged, steps)
    assert recorder.exact
    assert same_bits(Restorer(recorder.streams()).restore(merged, steps, BFLOAT), w)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_several_steps_come_back_in_their_order(pair):
    dtype, outcome = pair
    w, first = mixture(dtype, seed=3)
    generator = torch.Generator().manual_seed(4)
    second = torch.randn(w.shape, dtype=DOUBLE, generator=generator) * 1e-3
    steps = [Shift(first), Shift(second), Shift(-first)]
    merged = merged_value(w.double(), steps, outcome)
    recorder = record(w, merged, steps, 500)
    assert recorder.exact
    assert same_bits(restore(recorder.streams(), merged, steps, dtype, 300), w)


@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_a_matrix_comes_back_in_its_shape_from_any_layout(layout):
    w, shift = (values[: 60 * 36].view(60, 36) for values in mixture(BFLOAT, seed=5))
    if layout == "transposed":
        w, shift = w.T, shift.T
    steps = [Shift(shift)]
    merged = merged_value(w.contiguous().double(), [Shift(shift.contiguous())], BFLOAT)
    recorder = record(w, merged, steps, 13)
    assert recorder.exact
    assert same_bits(restore(recorder.streams(), merged, steps, BFLOAT, 8), w)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
def test_no_shift_leaves_nothing_to_record_but_which_zero_it_was(dtype):
    w = torch.cat([torch.randn(100, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, -0.0])]).to(dtype)
    steps = [Shift(torch.zeros(102, dtype=DOUBLE))]
    merged = merged_value(w.double(), steps, dtype)
    assert not torch.signbit(merged[-1])  # -0 + 0 is +0
    streams = record(w, merged, steps, 102).streams()
    assert {width: len(data) for width, data in streams.items()} == {1: 1}
    assert same_bits(restore(streams, merged, steps, dtype, 102), w)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_streams_that_end_too_soon_are_refused(pair):
    dtype, outcome = pair
    w, shift = mixture(dtype, seed=6, each=20)
    steps = [Shift(shift)]
    merged = merged_value(w.double(), steps, outcome)
    streams = record(w, merged, steps, len(w)).streams()
    assert streams
    for width, data in [*streams.items()][:: max(1, len(streams) // 3)]:  # each is read in the same way
        for short in (data[:-1], b""):
            with pytest.raises(CheckError, match="ends too soon"):
                restore({**streams, width: short}, merged, steps, dtype, len(w))
        rest = {other: kept for other, kept in streams.items() if other != width}
        with pytest.raises(CheckError, match="ends too soon"):
            restore(rest, merged, steps, dtype, len(w))


@pytest.mark.parametrize("outcome", [DOUBLE, SINGLE, BFLOAT], ids=str)
@pytest.mark.parametrize("moved", ["none", "small", "tiny", "half a step"])
def test_float64_comes_back_where_the_shift_does_not_swallow_it(outcome, moved):
    generator = torch.Generator().manual_seed(9)
    w = torch.cat([weights(kind, DOUBLE, 40, generator) for kind in ("normal", "power of two")])
    steps = [Shift(shifts(moved, w, generator))]
    merged = merged_value(w.double(), steps, outcome)
    recorder = record(w, merged, steps, 50)
    assert recorder.exact
    assert same_bits(restore(recorder.streams(), merged, steps, DOUBLE, 30), w)


def test_more_candidates_than_an_index_can_count_are_said_not_to_be_exact():
    w = torch.tensor([1e-300, -1e-300], dtype=DOUBLE)
    steps = [Shift(torch.tensor([1.0, 1.0], dtype=DOUBLE))]  # all between +-2^-54 lead to 1
    merged = merged_value(w, steps, DOUBLE)
    assert not record(w, merged, steps, 2).exact


@pytest.mark.parametrize("off", [1, -1])
def test_a_merge_that_cannot_be_recomputed_is_said_not_to_be_exact(off):
    w, shift = mixture(BFLOAT, seed=7)
    steps = [Shift(shift)]
    merged = merged_value(w.double(), steps, BFLOAT)
    wrong = from_order(order(merged) + off, BFLOAT)  # as if another arithmetic had merged
    assert record(w, merged, steps, 100).exact
    assert not record(w, wrong, steps, 100).exact


def test_a_realistic_merge_costs_less_than_three_tenths_of_a_bit_a_parameter():
    generator = torch.Generator().manual_seed(8)
    w = (torch.randn(512, 512, generator=generator) * 0.02).to(BFLOAT)
    B, A = torch.randn(512, 8, generator=generator), torch.randn(8, 512, generator=generator)
    delta = exact_product(B, A)
    steps = [Shift(delta * (2e-4 / float(delta.std())))]  # N(0, 2e-4)
    merged = merged_value(w.double(), steps, BFLOAT)
    recorder = record(w, merged, steps, 200)
    assert recorder.exact
    streams = recorder.streams()
    assert 0 < needed_bits(streams) / w.numel() < 0.3
    assert same_bits(restore(streams, merged, steps, BFLOAT, 300), w)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
def test_order_rises_with_the_values_and_tells_the_zeros_apart(dtype):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[torch.isfinite(values)]
    keys = order(values)
    assert same_bits(from_order(keys, dtype), values)
    ranked = values[keys.argsort()].double()
    assert torch.equal(ranked.diff() == 0, (ranked[1:] == 0) & (ranked[:-1] == 0))
    assert bool((ranked.diff() >= 0).all())
    assert order(torch.tensor([-0.0, 0.0], dtype=dtype)).diff().tolist() == [1]


@pytest.mark.parametrize("pair", [*PAIRS, (SINGLE, DOUBLE), (DOUBLE, DOUBLE), (DOUBLE, SINGLE)], ids=str)
@pytest.mark.parametrize("after", [None, "normal"])
def test_scales_of_either_sign_come_back_alone_and_among_shifts(pair, after):
    dtype, outcome = pair
    generator = torch.Generator().manual_seed(12)
    w = torch.cat([weights(kind, dtype, 60, generator) for kind in ("normal", "zero", "power of two")])
    factors = torch.randn(w.shape, dtype=DOUBLE, generator=generator)
    factors[::7], factors[1::7], factors[2::7] = 1.0, -1.0, 2.0**-20
    factors[3::7] *= 2.0**-40
    steps = [Scale(factors)]
    if after is not None:
        steps = [Shift(shifts(after, w, generator)), *steps, Shift(shifts("small", w, generator)), *steps]
    merged = merged_value(w.double(), steps, outcome)
    recorder = record(w, merged, steps, 50)
    if recorder.exact:
        assert same_bits(restore(recorder.streams(), merged, steps, dtype, 70), w)
    assert recorder.exact or dtype == DOUBLE  # of which more may lead to m than an index can count


@pytest.mark.parametrize("dtype", [SINGLE, BFLOAT, HALF], ids=str)
def test_a_scale_of_zero_costs_its_elements_alone_all_their_bits_but_the_sign(dtype):
    w = torch.randn(90, generator=torch.Generator().manual_seed(13)).to(dtype)
    factors = torch.ones(90, dtype=DOUBLE)
    factors[:16] = 0.0
    steps = [Scale(factors)]
    merged = merged_value(w.double(), steps, dtype)
    streams = record(w, merged, steps, 90).streams()
    assert needed_bits(streams) == 16 * (8 * dtype.itemsize - 1)
    assert same_bits(restore(streams, merged, steps, dtype, 90), w)
    whole = Scale(torch.zeros(90, dtype=DOUBLE))
    assert not record(w.double(), w.double() * 0, [whole], 90).exact  # float64 has too many


def test_a_realistic_scale_costs_about_half_a_bit_a_parameter():
    generator = torch.Generator().manual_seed(14)
    w = (torch.randn(256, 256, generator=generator) * 0.02).to(BFLOAT)
    steps = [Scale((1 + torch.randn(256, 1, dtype=DOUBLE, generator=generator) * 0.1).expand(256, 256))]
    merged = merged_value(w.double(), steps, BFLOAT)
    recorder = record(w, merged, steps, 100)
    assert recorder.exact
    streams = recorder.streams()
    assert 0 < needed_bits(streams) / w.numel() < 0.6
    assert same_bits(restore(streams, merged, steps, BFLOAT, 150), w)


def test_what_a_scale_leaves_below_the_normal_range_of_float64_comes_back():
    generator = torch.Generator().manual_seed(15)
    w = torch.randn(300, generator=generator)
    steps = [Scale(torch.randn(300, dtype=DOUBLE, generator=generator) * 2.0**-1055)]
    merged = merged_value(w.double(), steps, DOUBLE)
    assert 0 < float(merged.abs().max()) < torch.finfo(DOUBLE).tiny
    recorder = record(w, merged, steps, 300)
    assert recorder.exact
    assert same_bits(restore(recorder.streams(), merged, steps, SINGLE, 300), w)
