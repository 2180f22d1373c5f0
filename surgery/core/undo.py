"""Undo: what cannot be recomputed of a merge, found by evaluating the merge itself.

For m = merge(w), the candidates are all w' with merge(w') == m. Which of them w was is a small number: most
often there is one candidate and nothing is stored.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgery.core.bits import BitReader, BitWriter
from surgery.core.candidates import Survey, accumulate, accumulate_onto, candidates, from_order, merged_value, order
from surgery.core.elementwise import Elementwise
from surgery.errors import CheckError

__all__ = ["Recorder", "Restorer", "accumulate", "accumulate_onto", "from_order", "merged_value", "order"]

_PART = 1 << 16  # indices sorted and packed at a time, so that small tiles cost little each
_LONGEST = 62  # bits of an index


class Recorder:
    """Collects the index streams of one tensor, tile by tile in order; `streams` is its outcome."""

    def __init__(self) -> None:
        self.writers: dict[int, BitWriter] = {}
        self.waiting: list[tuple[NDArray[np.int64], NDArray[np.int8]]] = []  # indices and their widths
        self.exact = True  # False: this tensor cannot be recomputed and has to be kept

    def add(self, original: Tensor, merged: Tensor, steps: Sequence[Elementwise]) -> None:
        if not self.exact:
            return
        w = original.detach().reshape(-1)
        where = Survey(merged, steps, w.dtype).doubtful(w)
        low, spare = _candidates(merged, steps, w.dtype, where)
        index, width = order(w.index_select(0, where)) - low, _width(spare)
        told = width.nonzero().squeeze(1)  # elsewhere there is one candidate alone
        self.exact = _at_least_0(index) and _at_least_0(spare - index) and _at_least_0(_LONGEST - width)
        self.waiting.append((index[told].cpu().numpy(), width[told].cpu().numpy()))
        if sum(map(len, (index for index, _ in self.waiting))) >= _PART:
            self._pack()

    def streams(self) -> dict[int, bytes]:
        """The packed indices, by bits each."""
        self._pack()
        return {bits: writer.finish() for bits, writer in sorted(self.writers.items())}

    def _pack(self) -> None:
        if not self.waiting:
            return
        index, width = (np.concatenate(part) for part in zip(*self.waiting, strict=True))
        self.waiting.clear()
        ranked, ends = _by_width(width)
        for bits, (start, end) in ends.items():
            writer = self.writers.setdefault(bits, BitWriter(bits))
            writer.write(torch.from_numpy(index[ranked[start:end]]))


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
        index = np.empty(len(told), dtype=np.int64)
        ranked, ends = _by_width(width[told].cpu().numpy())
        for bits, (start, end) in ends.items():
            index[ranked[start:end]] = self._reader(bits).read(end - start).numpy()
        low[told] += torch.from_numpy(index).to(low.device)
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


def _by_width(width: NDArray[np.int8]) -> tuple[NDArray[np.int64], dict[int, tuple[int, int]]]:
    """Positions sorted by their width, in order where it is the same; and where in that each width above 0 lies."""
    ranked = np.argsort(width, kind="stable")
    starts = np.searchsorted(width[ranked], np.arange(_LONGEST + 3, dtype=np.int8)).tolist()
    spans = {bits: span for bits, span in enumerate(pairwise(starts)) if span[0] < span[1]}
    spans.pop(0, None)
    return ranked, spans


def _at_least_0(numbers: Tensor) -> bool:
    return numbers.numel() == 0 or int(numbers.min()) >= 0
