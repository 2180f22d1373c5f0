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
    """What computes for ever ends the test after 10 seconds of a processor, or 60 where it has many inputs.

    A read that blocks takes no processor, so it is given ten times as long: on a busy machine all takes longer.
    """

    def stop(*_: object) -> None:
        raise SystemExit(f"{processor_s} seconds, and no answer")

    before = {sent: signal.signal(sent, stop) for sent in (signal.SIGPROF, signal.SIGALRM)}
    long = any(request.node.get_closest_marker(name) for name in ("hypothesis", "slow"))
    processor_s = 60 if long else 10
    signal.setitimer(signal.ITIMER_PROF, processor_s)
    signal.setitimer(signal.ITIMER_REAL, 10 * processor_s)
    yield
    for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
        signal.setitimer(timer, 0)
    for sent, handler in before.items():
        signal.signal(sent, handler)
