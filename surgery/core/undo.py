"""Undo: what cannot be recomputed of a merge, found by evaluating the merge itself.

For m = merge(w), the candidates are all w' with merge(w') == m. Which of them w was is a small number: most
often there is one candidate and nothing is stored.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from surgery.core.bits import BitReader, BitWriter
from surgery.core.candidates import (
    Survey,
    accumulate,
    accumulate_onto,
    candidates,
    crowded,
    from_order,
    merged_value,
    order,
)
from surgery.core.elementwise import Elementwise
from surgery.errors import CheckError

__all__ = ["LONGEST", "Recorder", "Restorer", "accumulate", "accumulate_onto", "from_order", "merged_value", "order"]

_PART = 1 << 16  # indices sorted and packed at a time, so that small tiles cost little each
LONGEST = 62  # bits of an index


class Recorder:
    """Collects the index streams of one tensor, tile by tile in order; `streams` is its outcome."""

    def __init__(self) -> None:
        self.writers: dict[int, BitWriter] = {}
        self.waiting: list[tuple[Tensor, Tensor]] = []  # indices and their widths
        self.exact = True  # False: this tensor cannot be recomputed and has to be kept

    def add(
        self, original: Tensor, merged: Tensor, steps: Sequence[Elementwise], near_ties: Tensor | None = None
    ) -> None:
        """`near_ties` are those of the merge's rounding, where they are known: most is told by them at once."""
        if not self.exact:
            return
        w = original.detach().reshape(-1)
        if (
            near_ties is not None
            and merged.is_cpu
            and merged.dtype == w.dtype
            and [one.adds for one in steps] == [True]
        ):
            where = crowded(w, merged.detach(), near_ties)
        else:
            where = Survey(merged, steps, w.dtype).doubtful(w)
        low, spare = _candidates(merged, steps, w.dtype, where)
        index, width = order(w.index_select(0, where)) - low, _width(spare)
        told = width.nonzero().squeeze(1)  # elsewhere there is one candidate alone
        self.exact = _at_least_0(index) and _at_least_0(spare - index) and _at_least_0(LONGEST - width)
        self.waiting.append((index[told], width[told]))
        if sum(map(len, (index for index, _ in self.waiting))) >= _PART:
            self._pack()

    def streams(self) -> dict[int, bytes]:
        """The packed indices, by bits each."""
        self._pack()
        return {bits: writer.finish() for bits, writer in sorted(self.writers.items())}

    def _pack(self) -> None:
        if not self.waiting:
            return
        index, width = (torch.cat(part) for part in zip(*self.waiting, strict=True))
        self.waiting.clear()
        ranked, counts = _by_width(width)
        parts = torch.split(index.index_select(0, ranked).cpu(), list(counts.values()))
        for bits, part in zip(counts, parts, strict=True):
            self.writers.setdefault(bits, BitWriter(bits)).write(part)


class Restorer:
    """The inverse of Recorder: gives the original tiles back, in the same order."""

    def __init__(self, streams: Mapping[int, bytes]) -> None:
        self.readers = {bits: BitReader(bits, data) for bits, data in streams.items()}

    def restore(self, merged: Tensor, steps: Sequence[Elementwise], dtype: torch.dtype) -> Tensor:
        """The original tile in `dtype`. CheckError where the streams end too soon."""
        survey = Survey(merged, steps, dtype)
        w = survey.guess()
        where = survey.doubtful(w)
        low, spare = _candidates(merged, steps, dtype, where)
        width = _width(spare)
        told = width.nonzero().squeeze(1)
        ranked, counts = _by_width(width[told])
        read = [self._reader(bits).read(count) for bits, count in counts.items()]
        if read:
            low[told[ranked]] += torch.cat(read).to(low.device)
        return w.index_copy_(0, where, from_order(low, dtype)).view(merged.shape)

    def _reader(self, bits: int) -> BitReader:
        if bits not in self.readers:
            raise CheckError("undo record: it ends too soon; the record or the merged weights have been changed")
        return self.readers[bits]


def _candidates(
    merged: Tensor, steps: Sequence[Elementwise], dtype: torch.dtype, where: Tensor
) -> tuple[Tensor, Tensor]:
    m = merged.detach().reshape(-1).index_select(0, where)
    return candidates(m, [step.at(where) for step in steps], dtype)


def _width(spare: Tensor) -> Tensor:
    """The bits that tell the first candidate from the `spare` ones; a bit too many where float64 rounds up. In int8."""
    exponent = (spare.to(torch.float64).view(torch.int64) >> 52) - 1022
    return exponent.clamp_(min=0).to(torch.int8)


def _by_width(width: Tensor) -> tuple[Tensor, dict[int, int]]:
    """Positions sorted by their width, in order where it is the same; and how many there are of each width."""
    counts = {bits: count for bits, count in enumerate(torch.bincount(width.to(torch.int32)).tolist()) if count}
    if width.is_cpu:  # numpy takes half of torch's time there
        return torch.from_numpy(np.argsort(width.numpy(), kind="stable")), counts
    return width.argsort(stable=True), counts


def _at_least_0(numbers: Tensor) -> bool:
    return numbers.numel() == 0 or int(numbers.min()) >= 0
