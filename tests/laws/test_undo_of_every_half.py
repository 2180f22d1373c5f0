"""Every finite value of the half types under one shift: who leads to m is counted, and the record must agree."""

import numpy as np
import pytest
import torch
from rational import same_bits
from torch import Tensor

from surgery.core.elementwise import Elementwise, Scale, Shift
from surgery.core.rounding import rounding
from surgery.core.undo import Recorder, Restorer, accumulate, from_order, merged_value, order

BFLOAT, HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float16, torch.float32, torch.float64
PAIRS = [(BFLOAT, BFLOAT), (HALF, HALF), (BFLOAT, HALF), (HALF, BFLOAT), (BFLOAT, SINGLE), (HALF, SINGLE)]


def plus(value: float) -> Shift:
    return Shift(torch.tensor(value, dtype=DOUBLE))


def times(value: float) -> Scale:
    return Scale(torch.tensor(value, dtype=DOUBLE))


SHIFTS = {
    "zero": [0.0],
    "negative zero": [-0.0],
    "random": [0.0123456789],
    "random, negative": [-1.23456789e-4],
    "a power of two": [2.0**-6],
    "half a step of 1": [2.0**-8 + 2.0**-11],
    "a hair over half a step of 1": [2.0**-8 + 2.0**-50],
    "a hair under half a step of 1": [-(2.0**-11) * (1 - 2.0**-50)],
    "one step of the smallest": [2.0**-133],
    "half a step of the smallest": [-(2.0**-25)],
    "far below": [1e-300],
    "large": [100.1],
    "huge": [-3.3e38],
    "beyond float32, in two": [1e39, -1e39],
    "in two, whose rounding swallows": [2.0**60, -(2.0**60)],
    "in three": [0.3, -0.2, 1e-5],
    "in two that cancel": [0.7, -0.7],
}
STEPS = {name: [*map(plus, parts)] for name, parts in SHIFTS.items()} | {
    "times zero": [times(0.0)],
    "times negative zero": [times(-0.0)],
    "times one": [times(1.0)],
    "times minus one": [times(-1.0)],
    "times a power of two": [times(-(2.0**-7))],
    "times a bit less than one": [times(0.9)],
    "times a negative number": [times(-1.7)],
    "times little": [times(3.3e-39)],
    "times much": [times(1e30)],
    "times next to nothing": [times(2.0**-1060)],
    "times two that cancel": [times(3.0), times(1 / 3)],
    "falling twice": [times(-0.3), times(-7.0)],
    "shifted, then scaled": [plus(0.0123), times(-1.3)],
    "scaled, then shifted": [times(-1.3), plus(0.0123)],
    "scaled to nothing, then shifted": [times(0.0), plus(0.5)],
}


def every(dtype: torch.dtype) -> Tensor:
    """All finite values, rising."""
    top = int(order(torch.tensor(torch.finfo(dtype).max, dtype=dtype)))
    return from_order(torch.arange(-top - 1, top + 1), dtype)


def by_ties(w: Tensor, merged: Tensor, steps: list[Elementwise]) -> dict[int, bytes]:
    """The streams, where the ties are told that the rounding knows."""
    recorder = Recorder()
    recorder.add(w, merged, steps, rounding(accumulate(w.double(), steps), merged.dtype).near_ties)
    return recorder.streams()


def counted(outcome: Tensor) -> tuple[Tensor, Tensor]:
    """Of rising weights, by their outcomes: which of those with the same it is, and the bits to tell them apart."""
    _, group, sizes = torch.unique_consecutive(order(outcome), return_inverse=True, return_counts=True)
    first = sizes.cumsum(0) - sizes
    _, bits = torch.frexp((sizes - 1).double())  # the length of the binary number
    return torch.arange(len(outcome)) - first[group], bits[group]


def packed(indices: Tensor, bits: int) -> bytes:
    digits = indices.numpy()[:, None] >> np.arange(bits) & 1
    return np.packbits(digits.astype(np.uint8), bitorder="little").tobytes()


def each_merge() -> pytest.MarkDecorator:
    """All steps from each type to each; of the pairs of two types a half, in turns, is left to `make test-all`."""
    cases = [
        pytest.param(
            pair, name, id=f"{name}-{pair}", marks=[pytest.mark.slow] if pair[0] != pair[1] and (i + j) % 2 else []
        )
        for i, name in enumerate(STEPS)
        for j, pair in enumerate(PAIRS)
    ]
    return pytest.mark.parametrize(("pair", "name"), cases)


@each_merge()
def test_the_record_says_which_of_all_that_lead_to_m_it_was(pair, name):
    dtype, outcome = pair
    w = every(dtype)
    steps = [step.seen(lambda value: value.expand(w.shape)) for step in STEPS[name]]
    merged = merged_value(w.double(), steps, outcome)
    index, bits = counted(merged)
    chosen = torch.randperm(len(w), generator=torch.Generator().manual_seed(0))
    chosen = chosen[torch.isfinite(merged[chosen])]
    w, merged, index, bits = w[chosen], merged[chosen], index[chosen], bits[chosen]
    steps = [step.at(chosen) for step in steps]
    recorder = Recorder()
    recorder.add(w, merged, steps)
    assert recorder.exact
    assert recorder.streams() == {
        width: packed(index[bits == width], width) for width in bits.unique().tolist() if width
    }
    if len(steps) == 1 and name in SHIFTS:  # for whose sake a recorder looks at ties
        assert by_ties(w, merged, steps) == recorder.streams()
    assert same_bits(Restorer(recorder.streams()).restore(merged, steps, dtype), w)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("target", ["zero", "power of two", "subnormal", "largest", "half a step off"])
def test_every_value_comes_back_under_a_shift_of_its_own(dtype, target):
    w = every(dtype)
    info = torch.finfo(dtype)
    goal = {
        "zero": torch.zeros_like(w, dtype=DOUBLE),
        "power of two": torch.exp2(torch.frexp(w.double()).exponent.double() - 1),
        "subnormal": torch.full_like(w, 3 * info.tiny * info.eps, dtype=DOUBLE),
        "largest": torch.full_like(w, info.max, dtype=DOUBLE),
        "half a step off": w.double() * (1 + info.eps / 2),
    }[target]
    steps = [Shift(goal - w.double())]
    merged = merged_value(w.double(), steps, dtype)
    fine = torch.isfinite(merged)
    w, merged, steps = w[fine], merged[fine], [Shift(steps[0].values[fine])]
    recorder = Recorder()
    recorder.add(w, merged, steps)
    assert recorder.exact
    assert by_ties(w, merged, steps) == recorder.streams()
    assert same_bits(Restorer(recorder.streams()).restore(merged, steps, dtype), w)
