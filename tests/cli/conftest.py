"""A tiny base and adapter, and the command line called as a user calls it."""

from functools import partial
from pathlib import Path

import pytest
from checkpoint_folders import llama_base, write_adapter
from outcomes import Run, called


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(called, capsys)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")
