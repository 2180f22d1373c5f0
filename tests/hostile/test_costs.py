"""What a refusal may take: 256 MB beyond the start and 2 seconds, whatever the files say."""

from pathlib import Path

import pytest
from forked import merge_forked
from outsides import SIZES
from poisons import CONFIGS

PEAK_BYTES = 256_000_000
SECONDS = 2.0


@pytest.mark.parametrize("name", [*SIZES, *(name for name in CONFIGS if "long" in name or "million" in name)])
def test_a_refusal_is_bounded_in_time_and_memory(folder: Path, name: str) -> None:
    cost = merge_forked(folder, name)
    assert cost.code == 3
    assert cost.seconds < SECONDS
    assert cost.grown_bytes < PEAK_BYTES
