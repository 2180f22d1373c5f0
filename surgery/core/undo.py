"""Undo: what cannot be recomputed of a merge, found by evaluating the merge itself.

For m = merge(w), the candidates are all w' with merge(w') == m. A merge never decreases in w, so they are
neighbours in the order of their bits, and which of them w was is a small number: most often there is one
candidate and nothing is stored.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from surgery.core.arithmetic import round_once, ulp
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
        self.writers: dict[int, _BitWriter] = {}
        self.exact = True  # False: this tensor cannot be recomputed and has to be kept

    def add(self, original: Tensor, merged: Tensor, steps: Sequence[Elementwise]) -> None:
        guess, unsure = _guess(merged, steps, original.dtype)
        settled = torch.ones_like(unsure)
        settled[unsure.nonzero().squeeze(1)] = False
        truth = order(original).flatten()
        if not torch.equal(order(guess).flatten()[settled], truth[settled]):
            self.exact = False
        where = unsure.nonzero().squeeze(1)
        low, width = _candidates(merged, steps, original.dtype, where)
        index = truth[where] - low
        for bits in _widths(width):
            self.writers.setdefault(bits, _BitWriter(bits)).write(index[width == bits])
        if not bool(((index >= 0) & (index < 1 << width)).all()):
            self.exact = False

    def streams(self) -> dict[int, bytes]:
        """The packed indices, by bits each."""
        return {bits: writer.finish() for bits, writer in sorted(self.writers.items())}


class Restorer:
    """The inverse of Recorder: gives the original tiles back, in the same order."""

    def __init__(self, streams: Mapping[int, bytes]) -> None:
        self.readers = {bits: _BitReader(bits, data) for bits, data in streams.items()}

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

    def _reader(self, bits: int) -> "_BitReader":
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
    again = accumulate(guess.to(torch.float64), steps)
    apart = (again - value).abs() < 0.499 * ulp(value, dtype)
    return guess, ~(apart & (guess.abs() > _power_below(merged))).flatten()


def _power_below(values: Tensor) -> Tensor:
    """|values| with the mantissa cleared."""
    kind = _INTEGER[values.dtype]
    infinity = torch.tensor(torch.inf, dtype=values.dtype, device=values.device).view(kind)
    return (values.contiguous().view(kind) & infinity).view(values.dtype)


def _candidates(
    merged: Tensor, steps: Sequence[Elementwise], dtype: torch.dtype, where: Tensor
) -> tuple[Tensor, Tensor]:
    """The lowest candidate (as `order`) at each position of `where`, and the bits that tell them apart."""
    target = order(merged.flatten()[where])
    here = [step.at(where) for step in steps]

    def outcome(keys: Tensor) -> Tensor:
        return order(merged_value(from_order(keys, dtype).to(torch.float64), here, merged.dtype))

    low = _first(lambda keys: outcome(keys) >= target, target, dtype)
    high = _first(lambda keys: outcome(keys) > target, target, dtype) - 1
    spare = (high - low).clamp(min=0)  # candidates beyond the first
    return low, torch.frexp(spare.to(torch.float64)).exponent.to(torch.int64)


def _first(reached: Callable[[Tensor], Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """By bisection over all finite values of `dtype`: the lowest key from which `reached` holds."""
    top = int(order(torch.tensor(torch.finfo(dtype).max, dtype=dtype)))
    low, high = torch.full_like(like, -top - 1), torch.full_like(like, top + 1)
    for _ in range(8 * dtype.itemsize + 1):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        hit = reached(middle.clamp(-top - 1, top))
        high, low = torch.where(hit, middle, high), torch.where(hit, low, middle + 1).minimum(high)
    return high


def _widths(width: Tensor) -> list[int]:
    return [int(bits) for bits in torch.unique(width) if bits > 0]


class _BitWriter:
    """Packs integers of `bits` bits each, lowest bit first, across calls."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.done = bytearray()
        self.rest = torch.empty(0, dtype=torch.uint8)

    def write(self, values: Tensor) -> None:
        for part in torch.split(values.cpu(), 1 << 16):
            bits = (part[:, None] >> torch.arange(self.bits)) & 1  # [n, bits]
            stream = torch.cat([self.rest, bits.flatten().to(torch.uint8)])
            full = stream.numel() // 8 * 8
            self.done += _pack(stream[:full])
            self.rest = stream[full:].clone()

    def finish(self) -> bytes:
        padding = torch.zeros(-self.rest.numel() % 8, dtype=torch.uint8)
        return bytes(self.done) + _pack(torch.cat([self.rest, padding]))


class _BitReader:
    def __init__(self, bits: int, data: bytes) -> None:
        self.bits, self.data, self.at = bits, data, 0

    def read(self, count: int) -> Tensor:
        parts = [self._part(min(1 << 16, count - done)) for done in range(0, count, 1 << 16)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def _part(self, count: int) -> Tensor:
        end = self.at + count * self.bits
        if end > 8 * len(self.data):
            raise CheckError("undo record: it ends too soon; the record or the merged weights have been changed")
        window = bytearray(self.data[self.at // 8 : -(-end // 8)])
        octets = torch.frombuffer(window, dtype=torch.uint8)
        stream = ((octets[:, None] >> torch.arange(8)) & 1).flatten()[self.at % 8 :][: count * self.bits]
        self.at = end
        return (stream.view(count, self.bits).to(torch.int64) << torch.arange(self.bits)).sum(1)


def _pack(bits: Tensor) -> bytes:
    octets = (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)
    return bytes(octets.tolist())
