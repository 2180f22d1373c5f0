"""A sound base and adapter for a test to damage, and an end to what hangs."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from merging import sound


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base, of two shards with their index, and adapter."""
    return sound(tmp_path)


@pytest.fixture(autouse=True)
def no_hang(request: pytest.FixtureRequest) -> Iterator[None]:
    """A read that blocks ends the test after 10 seconds, or 60 where it has many inputs."""

    def stop(*_: object) -> None:
        raise SystemExit("10 seconds, and no answer")

    before = signal.signal(signal.SIGALRM, stop)
    long = any(request.node.get_closest_marker(name) for name in ("hypothesis", "slow"))
    signal.alarm(60 if long else 10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
