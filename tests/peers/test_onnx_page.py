"""docs/onnx.md has a row for each architecture of the table, and errors where there is something to compare."""

import pytest
import torch
from onnx_table import NAMES, PAGE, WAYS, rows_of

NOISE = 8 * 10 * torch.finfo(torch.float32).eps  # 8 times what some ten roundings in a row may come to
ROWS = {row[0]: row[1:] for row in rows_of(PAGE.read_text())}


def test_the_page_lists_what_the_table_lists() -> None:
    assert list(ROWS) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_error_is_that_of_float32(name: str) -> None:
    merged, swappable, cached = ROWS[name][: len(WAYS)]
    assert all(0 < float(error) < NOISE for error in (merged, swappable, cached) if error)
    assert merged
    assert swappable
