"""Undo: what cannot be recomputed of a merge, found by evaluating the merge itself.

For m = merge(w), the candidates are all w' with merge(w') == m. Which of them w was is a small number: most
often there is one candidate and nothing is stored.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from surgery.core.bits import BitReader, BitWriter
from surgery.core.candidates import Survey, accumulate, candidates, from_order, merged_value, order
from surgery.core.method import Elementwise
from surgery.errors import CheckError

__all__ = ["Recorder", "Restorer", "accumulate", "from_order", "merged_value", "order"]


class Recorder:
    """Collects the index streams of one tensor, tile by tile in order; `streams` is its outcome."""

    def __init__(self) -> None:
        self.writers: dict[int, BitWriter] = {}
        self.exact = True  # False: this tensor cannot be recomputed and has to be kept

    def add(self, original: Tensor, merged: Tensor, steps: Sequence[Elementwise]) -> None:
        if not self.exact:
            return
        w = original.detach().reshape(-1)
        where = Survey(merged, steps, w.dtype).doubtful(w)
        low, spare = _candidates(merged, steps, w.dtype, where)
        index = order(w.index_select(0, where)) - low
        ranked, counts = _by_width(spare)
        self.exact = max(counts, default=0) < 63 and _at_least_0(index) and _at_least_0(spare - index)
        if self.exact:
            parts = index.cpu().index_select(0, ranked).split([*counts.values()])
            for bits, part in zip(counts, parts, strict=True):
                self.writers.setdefault(bits, BitWriter(bits)).write(part)

    def streams(self) -> dict[int, bytes]:
        """The packed indices, by bits each."""
        return {bits: writer.finish() for bits, writer in sorted(self.writers.items())}


class Restorer:
    """The inverse of Recorder: gives the original tiles back, in the same order."""

    def __init__(self, streams: Mapping[int, bytes]) -> None:
        self.readers = {bits: BitReader(bits, data) for bits, data in streams.items()}

    def restore(self, merged: Tensor, steps: Sequence[Elementwise], dtype: torch.dtype) -> Tensor:
        """The original tile in `dtype`. CheckError where the streams end too soon."""
        survey = Survey(merged, steps, dtype)
        w = survey.guess()
        where = survey.doubtful(w)
        key, spare = _candidates(merged, steps, dtype, where)
        ranked, counts = _by_width(spare)
        read = [self._reader(bits).read(count) for bits, count in counts.items()]
        if read:
            key.index_add_(0, ranked.to(key.device), torch.cat(read).to(key.device))
        w.index_copy_(0, where, from_order(key, dtype))
        return w.view(merged.shape)

    def _reader(self, bits: int) -> BitReader:
        if bits not in self.readers:
            raise CheckError("undo record: it ends too soon; the record or the merged weights have been changed")
        return self.readers[bits]


def _candidates(
    merged: Tensor, steps: Sequence[Elementwise], dtype: torch.dtype, where: Tensor
) -> tuple[Tensor, Tensor]:
    m = merged.detach().reshape(-1).index_select(0, where)
    return candidates(m, [step.at(where) for step in steps], dtype)


def _by_width(spare: Tensor) -> tuple[Tensor, dict[int, int]]:
    """By the bits that tell the first candidate from the `spare` ones: how many need each, and where, grouped.

    Those that need none are left out; the others stay in order within each group.
    """
    exponent = (spare.to(torch.float64).view(torch.int64) >> 52) - 1022  # float64 may round up: a bit too many
    width = exponent.clamp_(min=0).to(torch.int8).cpu().numpy()
    ranked = np.argsort(width, kind="stable")
    starts = np.searchsorted(width[ranked], np.arange(66)).tolist()
    counts = {bits: end - start for bits, (start, end) in enumerate(pairwise(starts)) if end > start}
    return torch.from_numpy(ranked[counts.pop(0, 0) :]), counts


def _at_least_0(numbers: Tensor) -> bool:
    return numbers.numel() == 0 or int(numbers.min()) >= 0
