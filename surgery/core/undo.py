"""Undo: what cannot be recomputed of a merge, found by evaluating the merge itself.

For m = merge(w), the candidates are all w' with merge(w') == m. A merge never decreases in w, so they are
neighbours in the order of their bits, and which of them w was is a small number: most often there is one
candidate and nothing is stored.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from surgery.core.arithmetic import round_once
from surgery.core.bits import BitReader, BitWriter
from surgery.core.method import Elementwise
from surgery.errors import CheckError

_INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


class Recorder:
    """Collects the index streams of one tensor, tile by tile in order; `streams` is its outcome."""

    def __init__(self) -> None:
        self.writers: dict[int, BitWriter] = {}
        self.exact = True  # False: this tensor cannot be recomputed and has to be kept

    def add(self, original: Tensor, merged: Tensor, steps: Sequence[Elementwise]) -> None:
        guess, unsure = _guess(merged, steps, original.dtype)
        kind = _INTEGER[original.dtype]
        same = guess.view(kind) == original.contiguous().view(kind)
        where = unsure.nonzero().squeeze(1)
        low, width = _candidates(merged, steps, original.dtype, where)
        index = order(original.flatten()[where]) - low
        held = (index >= 0) & (index < 1 << width)
        self.exact &= bool((same.flatten() | unsure).all()) and bool(held.all())
        if self.exact:
            for bits in _widths(width):
                self.writers.setdefault(bits, BitWriter(bits)).write(index[width == bits])

    def streams(self) -> dict[int, bytes]:
        """The packed indices, by bits each."""
        return {bits: writer.finish() for bits, writer in sorted(self.writers.items())}


class Restorer:
    """The inverse of Recorder: gives the original tiles back, in the same order."""

    def __init__(self, streams: Mapping[int, bytes]) -> None:
        self.readers = {bits: BitReader(bits, data) for bits, data in streams.items()}

    def restore(self, merged: Tensor, steps: Sequence[Elementwise], dtype: torch.dtype) -> Tensor:
        """The original tile in `dtype`. CheckError where the streams end too soon."""
        guess, unsure = _guess(merged, steps, dtype)
        where = unsure.nonzero().squeeze(1)
        key, width = _candidates(merged, steps, dtype, where)
        for bits in _widths(width):
            chosen = (width == bits).nonzero().squeeze(1)
            key[chosen] += self._reader(bits).read(chosen.numel())
        flat = guess.flatten()
        flat[where] = from_order(key, dtype)
        return flat.view(merged.shape)

    def _reader(self, bits: int) -> BitReader:
        if bits not in self.readers:
            raise CheckError("undo record: it ends too soon; the record or the merged weights have been changed")
        return self.readers[bits]


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
    for step in steps:
        w = step.apply(w)
    return w


def _guess(merged: Tensor, steps: Sequence[Elementwise], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The original by algebra, rounded to `dtype`, and a flat mask of where that may be wrong.

    It is certain where the guess is larger than the power of two below |m|, so that its neighbours are at
    least one ulp of m away, and where its own merge lies well inside the half ulp around m.
    """
    value = merged.to(torch.float64)
    back = value
    for step in reversed(steps):
        back = step.undo(back)
    guess = round_once(back, dtype)
    if merged.dtype != dtype or dtype == torch.float64:
        return guess, torch.ones(merged.numel(), dtype=torch.bool, device=merged.device)
    below = _power_below(merged)  # an ulp of m is this times eps; below the normal range it is 0, and nothing certain
    off = (accumulate(guess.to(torch.float64), steps) - value).abs()
    apart = off < below.to(torch.float64) * (0.499 * torch.finfo(dtype).eps)
    return guess, ~(apart & (guess.abs() > below)).flatten()


def _power_below(values: Tensor) -> Tensor:
    """|values| with the mantissa cleared."""
    kind = _INTEGER[values.dtype]
    infinity = torch.tensor(torch.inf, dtype=values.dtype, device=values.device).view(kind)
    return (values.contiguous().view(kind) & infinity).view(values.dtype)


def _candidates(
    merged: Tensor, steps: Sequence[Elementwise], dtype: torch.dtype, where: Tensor
) -> tuple[Tensor, Tensor]:
    """The lowest candidate (as `order`) at each position of `where`, and the bits that tell them apart."""
    m = merged.flatten()[where]
    target = order(m)
    here = [step.at(where) for step in steps]

    def outcome(keys: Tensor) -> Tensor:
        return order(merged_value(from_order(keys, dtype).to(torch.float64), here, m.dtype))

    def origin_of_edge(neighbour: Tensor) -> Tensor:
        """By algebra, the key about which the outcome passes from m to its neighbour."""
        edge = from_order(neighbour, m.dtype).to(torch.float64) / 2 + m.to(torch.float64) / 2
        for step in reversed(here):
            edge = step.undo(edge)
        return order(round_once(edge, dtype))

    low = _first(lambda keys: outcome(keys) >= target, origin_of_edge(target - 1), dtype)
    high = _first(lambda keys: outcome(keys) > target, origin_of_edge(target + 1), dtype) - 1
    spare = (high - low).clamp(min=0)  # candidates beyond the first
    return low, torch.frexp(spare.to(torch.float64)).exponent.to(torch.int64)


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


def _widths(width: Tensor) -> list[int]:
    return [int(bits) for bits in torch.unique(width) if bits > 0]
