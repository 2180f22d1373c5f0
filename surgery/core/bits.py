"""Bits: whole numbers of a few bits each, packed into bytes without gaps, lowest bit first."""

import numpy as np
import torch
from torch import Tensor

from surgery.errors import CheckError

_PART = 1 << 16  # numbers packed at a time: bounds the memory that the single bits take


class BitWriter:
    """Packs numbers of `bits` bits each, across calls."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.done = bytearray()
        self.rest = np.empty(0, dtype=np.uint8)  # single bits that do not fill a byte yet

    def write(self, values: Tensor) -> None:
        """`values` are int64, each in [0, 2^bits)."""
        for part in torch.split(values.cpu(), _PART):
            little = part.numpy().astype("<i8").view(np.uint8).reshape(-1, 8)  # [n, 8]
            single = np.unpackbits(little, axis=1, count=self.bits, bitorder="little")  # [n, bits]
            stream = np.concatenate([self.rest, single.reshape(-1)])
            full = len(stream) // 8 * 8
            self.done += np.packbits(stream[:full], bitorder="little").tobytes()
            self.rest = stream[full:]

    def finish(self) -> bytes:
        """All of it; the last byte is filled up with zeros."""
        return bytes(self.done) + np.packbits(self.rest, bitorder="little").tobytes()


class BitReader:
    """The inverse of BitWriter."""

    def __init__(self, bits: int, data: bytes) -> None:
        self.bits, self.data, self.at = bits, np.frombuffer(data, dtype=np.uint8), 0

    def read(self, count: int) -> Tensor:
        """The next `count` numbers, as int64. CheckError where there are not as many."""
        parts = [self._part(min(_PART, count - done)) for done in range(0, count, _PART)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def _part(self, count: int) -> Tensor:
        end = self.at + count * self.bits
        if end > 8 * len(self.data):
            raise CheckError("undo record: it ends too soon; the record or the merged weights have been changed")
        stream = np.unpackbits(self.data[self.at // 8 : -(-end // 8)], bitorder="little")
        single = stream[self.at % 8 :][: count * self.bits].reshape(count, self.bits)
        little = np.zeros((count, 8), dtype=np.uint8)
        little[:, : -(-self.bits // 8)] = np.packbits(single, axis=1, bitorder="little")
        self.at = end
        return torch.from_numpy(little.view("<i8").reshape(-1).astype(np.int64))
