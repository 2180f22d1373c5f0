"""Numbers packed into bits come back, whatever their width and however they were cut into calls."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.core.bits import BitReader, BitWriter
from surgery.errors import CheckError


@given(st.data(), st.integers(1, 63))
def test_what_is_written_is_read(data: st.DataObject, bits: int) -> None:
    number = st.integers(0, 2**bits - 1)
    calls = data.draw(st.lists(st.lists(number, max_size=20), max_size=5))
    writer = BitWriter(bits)
    for call in calls:
        writer.write(torch.tensor(call, dtype=torch.int64))
    packed = writer.finish()
    flat = [value for call in calls for value in call]
    assert len(packed) == -(-len(flat) * bits // 8)
    reader = BitReader(bits, packed)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(flat)), max_size=4))), len(flat)]
    assert [reader.read(end - start).tolist() for start, end in pairwise(cuts)] == [
        flat[start:end] for start, end in pairwise(cuts)
    ]


def test_the_first_number_takes_the_lowest_bits() -> None:
    writer = BitWriter(3)
    writer.write(torch.tensor([5, 1, 7]))
    assert writer.finish() == bytes([0b11_001_101, 0b1])


@pytest.mark.parametrize("bits", [1, 7, 13])
def test_many_numbers_cross_the_parts(bits: int) -> None:
    values = torch.randint(0, 2**bits, (200_001,), generator=torch.Generator().manual_seed(bits))
    writer = BitWriter(bits)
    writer.write(values[:70_001])
    writer.write(values[70_001:])
    assert torch.equal(BitReader(bits, writer.finish()).read(len(values)), values)


def test_reading_past_the_end_is_an_error() -> None:
    with pytest.raises(CheckError, match="ends too soon"):
        BitReader(4, b"\x12").read(3)
