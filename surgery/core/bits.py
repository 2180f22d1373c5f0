"""Bits: whole numbers of a few bits each, packed into bytes without gaps, lowest bit first."""

import numpy as np
import torch
from numpy.typing import NDArray
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
            numbers, single = part.numpy(), np.empty((len(part), self.bits), dtype=np.uint8)  # [n], [n, bits]
            for bit in range(self.bits):
                single[:, bit] = (numbers >> bit) & 1
            stream = np.concatenate([self.rest, single.reshape(-1)])
            full = len(stream) // 8 * 8
            self.done += np.packbits(stream[:full], bitorder="little").tobytes()
            self.rest = stream[full:].copy()

    def finish(self) -> bytes:
        """All of it; the last byte is filled up with zeros."""
        return bytes(self.done) + np.packbits(self.rest, bitorder="little").tobytes()


class BitReader:
    """The inverse of BitWriter."""

    def __init__(self, bits: int, data: bytes) -> None:
        self.bits, self.data, self.at = bits, np.frombuffer(data, dtype=np.uint8), 0
        self.ready = np.empty(0, dtype=np.int64)  # numbers that are unpacked and not read yet

    def read(self, count: int) -> Tensor:
        """The next `count` numbers, as int64. CheckError where there are not as many."""
        parts, missing = [self.ready[:count]], count - len(self.ready)
        self.ready = self.ready[count:]
        while missing > 0:
            part = self._part()
            parts.append(part[:missing])
            missing, self.ready = missing - len(part), part[missing:]
        return torch.from_numpy(np.concatenate(parts))

    def _part(self) -> NDArray[np.int64]:
        count = min(_PART, (8 * len(self.data) - self.at) // self.bits)
        if count == 0:
            raise CheckError("undo record: it ends too soon; the record or the merged weights have been changed")
        end = self.at + count * self.bits
        stream = np.unpackbits(self.data[self.at // 8 : -(-end // 8)], bitorder="little")
        single = stream[self.at % 8 :][: count * self.bits].reshape(count, self.bits)
        numbers = np.zeros(count, dtype=np.int64)
        for bit in range(self.bits):
            numbers |= single[:, bit].astype(np.int64) << bit
        self.at = end
        return numbers
