"""A warmed-up process, an arena, and the tally: tests count, and a file named in the environment gets the sums."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from arena import Arena, write_inputs
from zygote import Zygote

TALLY = "SURGERY_FAULTS_TALLY"  # names the file
_sums: Counter[str] = Counter()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    folder = tmp_path_factory.mktemp("warm")
    write_inputs(folder)
    with Zygote(folder) as started:
        yield started


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """What a test counts, by name."""
    counts: Counter[str] = Counter()
    yield counts
    request.node.user_properties += counts.items()


@pytest.fixture
def arena(tmp_path: Path, zygote: Zygote, tally: Counter[str]) -> Arena:
    return Arena(tmp_path, zygote, tally)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        _sums.update(dict(report.user_properties))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if TALLY in os.environ and not hasattr(session.config, "workerinput"):
        Path(os.environ[TALLY]).write_text(json.dumps(_sums))
