"""What a Hub can do wrong, as a table: the exit code, one line on stderr, and no wrong byte taken for a right one."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest
from fake_hub import FakeHub, Fault, Files, Handler
from hub_plays import CONFIG, ID, LISTING, SCRIPTS, WEIGHTS, Script, body, dropped, flipped, moved, status
from huggingface_hub import constants, get_session, hf_hub_download
from outcomes import Outcome, Run, told

from surgery.io import patience


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_fault_has_its_exit_code_and_gives_no_wrong_byte(
    script: Script, hub: FakeHub, model: Files, run: Run, tmp_path: Path, waits: list[float]
) -> None:
    hub.add(ID, model)
    hub.faults = list(script.faults)
    found = run("inspect", ID)
    if script.code == 0:
        assert (found.code, found.err) == (0, "")
        assert cached(tmp_path) == model
    else:
        line = told(found, script.code)
        assert ID in line
        assert all(word in line for word in script.words), line
        assert cached(tmp_path).items() <= model.items()
    if script.requests is not None:
        first = script.faults[0]
        met = [line for line in hub.log if line.startswith(first.method + " ") and first.part in line]
        assert len(met) == script.requests
    if script.waited_s is not None:
        assert sum(waits) == script.waited_s
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "cache"}
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".incomplete", ".tmp"))]
    hub.faults = []
    again = run("inspect", ID)
    assert (again.code, again.err) == (0, "")
    assert cached(tmp_path) == model


def cached(tmp_path: Path) -> Files:
    """What the snapshots of the cache hold; a file that is in two must be the same in both."""
    found: Files = {}
    for path in sorted((tmp_path / "cache").glob("models--*/snapshots/*/**/*")):
        if path.is_file():
            assert found.setdefault(path.name, path.read_bytes()) == path.read_bytes()
    return found


@pytest.mark.parametrize("name", ["../x.json", "a/../../x.json", "/x.json", "..\\x.json", "C:x.json"])
def test_the_library_too_refuses_a_name_that_leads_out(name: str, hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.add(ID, {name: b"{}"})
    with pytest.raises(ValueError, match="Invalid filename"):
        hf_hub_download(ID, name, revision=commit)
    assert not list(tmp_path.rglob("x.json"))


def test_the_library_alone_takes_a_wrong_body_of_the_right_length(hub: FakeHub, model: Files) -> None:
    commit = hub.add(ID, model)
    hub.faults = [Fault(body(flipped), "GET", WEIGHTS)]
    path = Path(hf_hub_download(ID, WEIGHTS, revision=commit))
    assert path.read_bytes() == flipped(model[WEIGHTS])  # why every body is hashed here


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": " 7 "}, 7),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:09 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 9),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT", "Date": "Wed, 21 Oct 2026 07:28:09 GMT"}, 0),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:09 GMT"}, None),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:09", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"Retry-After": "soon", "Date": "now"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "\u0663"}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=10;t=55'}, None),
        ({}, None),
    ],
)
def test_the_wait_that_a_hub_asks_for(headers: dict[str, str], wait_s: float | None) -> None:
    assert patience._asked_s(headers) == wait_s


def test_all_waits_together_are_bounded(hub: FakeHub, model: Files, run: Run, waits: list[float]) -> None:
    hub.add(ID, model)
    asked = status(429, Retry_After="25")
    hub.faults = [Fault(asked, "GET", LISTING, 1), Fault(asked, "HEAD", CONFIG, 1), Fault(asked, "HEAD", WEIGHTS, 1)]
    assert "asks to wait 25 s" in told(run("inspect", ID), 5)
    assert sum(waits) == 50 <= patience.WAIT_S


def test_a_silent_hub_is_given_up(hub: FakeHub, model: Files, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, model)
    stopped = threading.Event()

    def silent(_: Handler) -> bool:
        stopped.wait(5)
        return True

    monkeypatch.setattr("surgery.io.snapshot.TIMEOUT_S", 0.1)
    hub.faults = [Fault(silent, "GET", LISTING)]
    try:
        assert "ReadTimeout" in told(run("inspect", ID), 5)
    finally:
        stopped.set()


def test_a_hub_that_dies_after_the_listing_is_told_with_the_library_s_own_tries(
    hub: FakeHub, model: Files, run: Run, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, {WEIGHTS: model[WEIGHTS]})
    dead = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", dead)
    assert "several tries, the last: ConnectError" in told(run("inspect", ID), 5)
    assert 1 <= len(waits) <= 8


def test_a_full_disk_is_told_as_such(hub: FakeHub, model: Files, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.add(ID, model)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    assert "No space left on device" in told(run("inspect", ID), 5)


def test_the_command_itself_tells_one_line(hub: FakeHub, model: Files, tmp_path: Path) -> None:
    hub.add(ID, model)
    hub.faults = [Fault(dropped(4), "GET", CONFIG, 1), Fault(body(flipped), "GET", WEIGHTS)]
    here = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "surgery", "inspect", ID],
        env={**os.environ, **here, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert WEIGHTS in told(Outcome(done.returncode, done.stdout, done.stderr), 3)


def test_every_file_comes_from_the_commit_that_was_listed(hub: FakeHub, model: Files, run: Run, tmp_path: Path) -> None:
    hub.add(ID, model)
    hub.faults = [Fault(moved, "HEAD", "", 1)]
    found = run("inspect", ID)
    assert (found.code, found.err, cached(tmp_path)) == (0, "", model)


def test_another_thread_keeps_the_library_as_it_is(hub: FakeHub, model: Files, run: Run) -> None:
    hub.add(ID, model)
    assert run("inspect", ID).code == 0  # the hook is on the client now
    hub.faults = [Fault(status(503), "HEAD", WEIGHTS, 1)]
    assert get_session().head(f"{hub.endpoint}/{ID}/resolve/main/{WEIGHTS}").status_code == 503
