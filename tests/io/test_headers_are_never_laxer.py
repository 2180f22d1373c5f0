"""Whatever header we accept, the safetensors library accepts, with the same tensors of the same bytes."""

import pytest
import safetensors
from mutants import mutants

from surgery.errors import FormatError
from surgery.io.header import SPELLINGS, header_length, parse_header

PER_RUN = 50_000


def ours(data: bytes) -> dict[str, tuple] | None:
    """What we read: dtype, shape and bytes by name; None where it is refused."""
    try:
        length = header_length(data[:8], len(data), "file")
        header = parse_header(data[:length], len(data), "file")
    except FormatError as error:
        assert str(error).isprintable()  # noqa: PT017
        return None
    return {
        info.name: (SPELLINGS[info.dtype], list(info.shape), data[start : start + info.nbytes])
        for info, start in header.entries
    }


def theirs(data: bytes) -> dict[str, tuple]:
    found = safetensors.deserialize(data)
    assert len({name for name, _ in found}) == len(found)
    return {name: (one["dtype"], one["shape"], bytes(one["data"])) for name, one in found}


def compared(seed: int, count: int) -> tuple[int, int]:
    """How many of the mutants both accept, and how many we alone refuse."""
    both = alone = 0
    for data in mutants(seed, count):
        found = ours(data)
        if found is not None:
            assert found == theirs(data), data
            both += 1
            continue
        try:
            theirs(data)
            alone += 1
        except safetensors.SafetensorError:
            pass
    return both, alone


def test_20_000_headers_are_never_read_where_the_library_refuses() -> None:
    both, alone = compared(0, 20_000)
    assert 3_000 < both < 12_000, "the mutants are neither all sound nor all bad"
    assert alone > 100, "duplicates and unknown fields, which the library takes"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 1 + 1_000_000 // PER_RUN))
def test_a_million_headers_are_never_read_where_the_library_refuses(seed: int) -> None:
    assert compared(seed, PER_RUN)[0] > PER_RUN // 10
