"""Candidates: the weights of a dtype that a merge makes m of, for each element of a tile.

A merge never decreases in w, or never increases and is then turned round: so they are neighbours in the order of
their bits, a first one and some beyond it.
Three ways find them, each left with what the one before could not decide: a pass over the whole tile that tells
where there is one alone, the edges of m taken back by algebra, and a search that evaluates the merge itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.core.elementwise import Elementwise, Scale
from surgery.core.halves import magnitude, places
from surgery.core.rounding import round_once

_INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def order(values: Tensor) -> Tensor:
    """Integers (int64) that rise with the values; -0 comes just before +0."""
    kind = _INTEGER[values.dtype]
    bits = values.contiguous().view(kind)
    return (bits ^ ((bits >> (8 * kind.itemsize - 1)) & torch.iinfo(kind).max)).to(torch.int64)


def from_order(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `order`."""
    kind = _INTEGER[dtype]
    bits = keys.to(kind)
    return (bits ^ ((bits >> (8 * kind.itemsize - 1)) & torch.iinfo(kind).max)).view(dtype)


def merged_value(w: Tensor, steps: Sequence[Elementwise], dtype: torch.dtype) -> Tensor:
    """The merge of float64 values: each step in float64, then one rounding to `dtype`."""
    return round_once(accumulate(w, steps), dtype)


def accumulate(w: Tensor, steps: Sequence[Elementwise]) -> Tensor:
    """The steps applied in order, unrounded."""
    return accumulate_onto(w.clone(), steps)


def accumulate_onto(w: Tensor, steps: Sequence[Elementwise]) -> Tensor:
    """The same in the memory of `w`."""
    for step in steps:
        w = step.onto(w)
    return w


class Survey:
    """A quick pass over a merged tile, in float32 where both dtypes are of 16 bits, else in float64.

    `doubtful` is its end: the memory of the values is used up.
    """

    def __init__(self, merged: Tensor, steps: Sequence[Elementwise], dtype: torch.dtype) -> None:
        self.merged, self.steps, self.dtype = merged.detach().reshape(-1), steps, dtype
        self.wide = torch.float32 if max(merged.itemsize, dtype.itemsize) == 2 else torch.float64
        self.value = self.merged.to(self.wide)
        # float64 is no wider than itself; and a scale other than 1 leaves most elements to be searched for anyway.
        self.quick = all(step.adds for step in steps) and torch.float64 not in (merged.dtype, dtype)
        self.shift = self._sum() if self.quick else torch.zeros(())

    def guess(self) -> Tensor:
        """The originals by algebra, flat, in the dtype: right wherever there is a lone candidate near it."""
        return (self.value - self.shift).to(self.dtype)

    def doubtful(self, w: Tensor) -> Tensor:
        """Flat positions at which others than `w` may lead to m as well, or others alone.

        Elsewhere the steps lead `w` to less than half an ulp from m, and its neighbours are an ulp away at least,
        so that they are led beyond the half. The thousandth taken off the half makes up for what float32 rounds:
        some 2^-24 of |w| and of |m|, where `w` and its neighbours are 2^-11 of |w| apart or more.
        """
        if not self.quick:
            return torch.arange(len(w), device=w.device)
        here, own = torch.finfo(self.merged.dtype), torch.finfo(self.dtype)
        near = w.to(self.wide)
        off = (near + self.shift).sub_(self.value).abs_()
        below = _clear_mantissa(self.value).clamp_(min=here.tiny)  # an ulp of m is this times eps
        apart = _greater(near.abs_(), below if here.eps == own.eps else below * (here.eps / own.eps))
        room = below.mul_(0.499 * here.eps)
        for step in self.steps if len(self.steps) > 1 else ():  # those that cancel round away more than their sum does
            room.sub_(self._flat(step.values).abs(), alpha=_lost(self.steps))
        apart &= _greater(room, off)
        return _unset(apart)

    def _sum(self) -> Tensor:
        if not self.steps:
            return torch.zeros_like(self.value)
        total = self.steps[0].values
        for step in self.steps[1:]:
            total = total + step.values
        return self._flat(total)

    def _flat(self, values: Tensor) -> Tensor:
        return values.detach().to(self.wide).reshape(-1)


def crowded(w: Tensor, m: Tensor, near_ties: Tensor) -> Tensor:
    """Flat positions where others than `w` may lead to m as well, by one shift; both of one half type, on a CPU.

    Elsewhere the sum is no tie, not even in float32: it lies within half an ulp of m by more than 2^-25 of m, and
    float64 rounds less. With w above the power of two below |m|, its neighbours are an ulp of m away at least, and
    are led beyond the half.
    """
    exponents, smallest = _HALF[w.dtype]
    below = torch.from_numpy(magnitude(m.reshape(-1)) & exponents).clamp_(min=smallest)
    mask = magnitude(w.reshape(-1)) <= below.numpy()
    mask[near_ties.numpy()] = True
    return torch.from_numpy(places(mask))


# The bits of exponents, and those of the smallest normal value.
_HALF = {torch.bfloat16: (np.int16(0x7F80), 0x0080), torch.float16: (np.int16(0x7C00), 0x0400)}


def _clear_mantissa(values: Tensor) -> Tensor:
    """In place: the power of two below each |value|."""
    kind, infinity = _WIDE[values.dtype]
    values.view(kind).bitwise_and_(infinity)
    return values


_WIDE = {torch.float32: (torch.int32, 0x7F80_0000), torch.float64: (torch.int64, 0x7FF0_0000_0000_0000)}


def _greater(left: Tensor, right: Tensor) -> Any:
    """left > right; on a CPU by numpy, for torch takes four times as long there."""
    return np.greater(left.numpy(), right.numpy()) if left.device.type == "cpu" else left > right


def _unset(mask: Any) -> Tensor:
    """Where a mask of `_greater`, which is used up, is false."""
    if isinstance(mask, Tensor):
        return mask.logical_not_().nonzero().squeeze(1)
    return torch.from_numpy(places(np.logical_not(mask, out=mask)))


def candidates(m: Tensor, steps: Sequence[Elementwise], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For each of `m` (flat) the first candidate (as `order`), and how many there are beyond it."""
    m, steps = _rising(m, steps)
    first, margin = _by_algebra(m, steps, dtype)
    if m.numel() and not bool(margin.min() > 0):  # NaN is the minimum of all
        rest = (margin > 0).all(0).logical_not_().nonzero().squeeze(1)
        here = [step.at(rest) for step in steps]
        about = first[:, rest].masked_fill_(margin[:, rest].isnan(), 0)
        first[0, rest] = _by_search(m[rest], here, dtype, about[0], torch.ge)
        first[1, rest] = _by_search(m[rest], here, dtype, about[1], torch.gt)
    low, end = first
    return low, (end - low).sub_(1).clamp_(min=0)


def _rising(m: Tensor, steps: Sequence[Elementwise]) -> tuple[Tensor, Sequence[Elementwise]]:
    """The same with m and merge of the other sign where the merge falls, so that it rises everywhere."""
    falls = [where for step in steps if (where := step.falls()) is not None]
    if not falls:
        return m, steps
    sign = torch.stack(falls).sum(0).remainder(2).mul(-2).add(1)  # -1 after an odd number of falls
    return m * sign.to(m.dtype), [*steps, Scale(sign.to(torch.float64))]


def _by_algebra(m: Tensor, steps: Sequence[Elementwise], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the edges between m and its neighbours below and above: the first key beyond, and the margin of that.

    Where the margin is above 0, no value of `dtype` is as near to the edge as what the steps may round away.
    """
    edge = _neighbours(m).to(torch.float64).add_(m.to(torch.float64)).mul_(0.5)  # [2, n]
    size = edge.abs()
    for step in reversed(steps):
        edge, size = step.undo(edge), step.reach(size)
    largest = torch.finfo(dtype).max
    found = edge.clamp(-largest, largest).to(dtype)  # rounded twice, maybe, but to one of the two about the edge
    gap = found.to(torch.float64) - edge
    first = order(found) - (gap.view(torch.int64) >> 63)  # one more where the gap is negative
    return first, gap.abs_().sub_(size, alpha=_lost(steps))


def _lost(steps: Sequence[Elementwise]) -> float:
    """Of the sum of all magnitudes, more than twice what float64 rounds away in applying or undoing the steps."""
    return (len(steps) + 1) * 2.0**-50


def _neighbours(m: Tensor) -> Tensor:
    """The next values below and above, [2, n]; a NaN for one of those of a zero."""
    kind = _INTEGER[m.dtype]
    bits = m.contiguous().view(kind)
    sign = (bits >> (8 * kind.itemsize - 1)) | 1
    return torch.stack([bits - sign, bits + sign]).view(m.dtype)


def _by_search(
    m: Tensor,
    steps: Sequence[Elementwise],
    dtype: torch.dtype,
    about: Tensor,
    beyond: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The first key whose outcome is `beyond` m."""
    target = order(m)

    def reached(keys: Tensor) -> Tensor:
        return beyond(order(merged_value(from_order(keys, dtype).to(torch.float64), steps, m.dtype)), target)

    return _first(reached, about, dtype)


def _first(reached: Callable[[Tensor], Tensor], about: Tensor, dtype: torch.dtype) -> Tensor:
    """The lowest key from which `reached` holds, of all finite values of `dtype`; the search starts at `about`.

    Strides that double lead outwards until it is enclosed, and after 2^20 of them bisection ends it.
    """
    top = int(order(torch.tensor(torch.finfo(dtype).max, dtype=dtype)))
    low, high = torch.full_like(about, -top - 2), torch.full_like(about, top + 1)
    probe, stride = about.clamp(-top - 1, top), 1
    while bool((low + 1 < high).any()):
        hit = reached(probe)
        high, low = torch.where(hit, probe, high), torch.where(hit, low, probe)
        mean = (low & high) + ((low ^ high) >> 1)  # without overflow
        if stride <= 1 << 20:
            outward = torch.where(hit, high - stride, low + stride)
            enclosed = (low > -top - 2) & (high < top + 1)
            mean = torch.where(enclosed, mean, outward)
        probe = mean.minimum(high - 1).maximum(low + 1)
        stride *= 2
    return high
