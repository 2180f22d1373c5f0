"""A Hub on loopback that the library takes for the real one, with an empty cache, and no real waiting."""

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_folders import llama_base, write_adapter
from fake_hub import FakeHub, Files, running
from huggingface_hub import constants
from huggingface_hub.utils import _http
from outcomes import Outcome, Run, called


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("NO_PROXY", "*")
    with running() as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        _http.close_session()
        yield hub
        _http.close_session()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be waited; not those that a file takes to settle, which are below a hundredth."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", lambda wait_s: found.append(wait_s) if wait_s >= 0.01 else None)
    return found


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line; what the library logs goes to the same stderr."""

    def call(*arguments: object) -> Outcome:
        for handler in logging.getLogger("huggingface_hub").handlers:
            monkeypatch.setattr(handler, "stream", sys.stderr)
        return called(capsys, *arguments)

    return call


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def model(base: Path) -> Files:
    """The files of the base."""
    return {path.name: path.read_bytes() for path in base.iterdir()}
