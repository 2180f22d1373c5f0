"""What a Hub can do wrong, as a table: the exit code, one line on stderr, and no wrong byte taken for a right one."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from fake_hub import FakeHub, Fault, Files, Handler, sibling
from huggingface_hub import constants, get_session, hf_hub_download
from outcomes import Outcome, Run, told

from surgery.io import patience

ID, OTHER = "owner/base", "f" * 40
LISTING, WEIGHTS, CONFIG = "/api/models/", "model.safetensors", "config.json"
Play = Callable[[Handler], bool]


def status(code: int, **headers: str) -> Play:
    def play(handler: Handler) -> bool:
        handler.answer(code, b"", **headers)
        return True

    return play


def dropped(eighths: int) -> Play:
    """The body ends there, and the connection with it."""

    def play(handler: Handler) -> bool:
        commit, data = handler.found() or ("", b"")
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        rest = data[start:]
        whole = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        code, length = 206 if start else 200, str(len(rest))
        part = rest[: len(rest) * eighths // 8]
        handler.answer(code, part, Content_Length=length, **handler.headers_of(commit, data), **whole)
        handler.close_connection = True
        return True

    return play


def body(change: Callable[[bytes], bytes]) -> Play:
    """Another body, of which the length is told as it is."""

    def play(handler: Handler) -> bool:
        commit, data = handler.found() or ("", b"")
        handler.answer(200, change(data), **handler.headers_of(commit, data))
        return True

    return play


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def hung_up(handler: Handler) -> bool:
    handler.close_connection = True
    return True


def trickle(handler: Handler) -> bool:
    commit, data = handler.found() or ("", b"")
    handler.answer(200, Content_Length=str(len(data)), **handler.headers_of(commit, data))
    for start in range(0, len(data), 1 + len(data) // 8):
        handler.wfile.write(data[start : start + 1 + len(data) // 8])
        handler.wfile.flush()
        threading.Event().wait(0.02)
    return True


def redirected(handler: Handler) -> bool:
    """To the store, on another host, as the Hub does for files in LFS."""
    commit, data = handler.found() or ("", b"")
    there = f"{handler.server.endpoint.replace('127.0.0.1', 'localhost')}/{ID}/resolve/{commit}/{WEIGHTS}"
    handler.answer(302, Location=there, **handler.headers_of(commit, data))
    return True


def in_a_circle(handler: Handler) -> bool:
    handler.answer(302, Location=handler.server.endpoint + handler.path)
    return True


def moved(handler: Handler) -> bool:
    """The branch goes on to other files after it was listed; the listed commit stays."""
    handler.server.add(ID, {CONFIG: b"{}", WEIGHTS: b"other"})
    return False


def of_another_commit(handler: Handler) -> bool:
    _, data = handler.found() or ("", b"")
    handler.send_part(OTHER, data)
    return True


def tagged(tag: str | None) -> Play:
    def play(handler: Handler) -> bool:
        commit, data = handler.found() or ("", b"")
        tags = {} if tag is None else {"ETag": tag}
        handler.answer(200, data, X_Repo_Commit=commit, Content_Length=str(len(data)), **tags)
        return True

    return play


def answered(value: bytes) -> Play:
    def play(handler: Handler) -> bool:
        handler.answer(200, value, Content_Type="application/json")
        return True

    return play


def listed(change: Callable[[list[dict]], object], **fields: object) -> Play:
    """A listing with other lines or fields."""

    def play(handler: Handler) -> bool:
        repository = handler.server.repositories[ID]
        info = handler.info(ID, repository.branches["main"])
        change(info["siblings"])
        handler.json({**info, **fields})
        return True

    return play


def named(name: str) -> Play:
    return listed(lambda lines: lines.append(sibling(name, b"{}")))


def lacking(key: str) -> Play:
    return listed(lambda lines: [line.pop(key) for line in lines])


class Script(NamedTuple):
    """`words` stand in the one line that is told; `after_s` are the waits that were asked for."""

    name: str
    code: int
    faults: Sequence[Fault]
    words: Sequence[str] = ()
    requests: int | None = None  # of the kind that the first fault meets
    waited_s: float | None = None


def at_first(name: str, play: Play, times: int, *, code: int = 0, part: str = WEIGHTS, method: str = "GET") -> Script:
    return Script(name, code, [Fault(play, method, part, times)])


BUSY = status(429, Retry_After="2")
SCRIPTS = [
    Script("no fault", 0, []),
    Script("listing: 429, then fine", 0, [Fault(BUSY, "GET", LISTING, 1)], requests=2, waited_s=2),
    Script("head: 429, then fine", 0, [Fault(BUSY, "HEAD", WEIGHTS, 1)], requests=2, waited_s=2),
    Script("body: 429 twice, then fine", 0, [Fault(BUSY, "GET", WEIGHTS, 2)], requests=3, waited_s=4),
    Script("429 for ever", 5, [Fault(BUSY, "GET", LISTING)], ["4 tries", "status 429"], 4, 6),
    Script("head: 429 for ever", 5, [Fault(BUSY, "HEAD", WEIGHTS)], [WEIGHTS, "4 tries", "status 429"], 4, 6),
    Script(
        "429 for an hour",
        5,
        [Fault(status(429, Retry_After="3600"), "GET", WEIGHTS)],
        ["1 try", "3600 s", "status 429"],
        1,
        0,
    ),
    Script(
        "429 by the Hub's own header",
        0,
        [Fault(status(429, RateLimit='"api";r=0;t=7'), "GET", LISTING, 1)],
        requests=2,
        waited_s=7,
    ),
    *(
        Script(f"{where} {code} {times} times", 0, [Fault(status(code), method, part, times)], requests=times + 1)
        for code in (500, 502, 503)
        for times in (1, 2)
        for where, method, part in (
            ("listing", "GET", LISTING),
            ("head", "HEAD", WEIGHTS),
            ("body", "GET", WEIGHTS),
            ("small file", "GET", CONFIG),
        )
    ),
    *(
        Script(f"{code} for ever", 5, [Fault(status(code), "GET", WEIGHTS)], ["4 tries", f"status {code}", WEIGHTS], 4)
        for code in (500, 502, 503)
    ),
    *(at_first(f"body dropped at {eighths}/8", dropped(eighths), 1) for eighths in range(8)),
    *(at_first(f"small body dropped at {n}/8", dropped(n), 1, part=CONFIG) for n in (0, 3, 7)),
    at_first("body dropped three times", dropped(3), 3),
    Script("body dropped for ever", 5, [Fault(dropped(0), "GET", WEIGHTS)], [WEIGHTS, "tries"]),
    at_first("hung up on the listing", hung_up, 1, part=LISTING),
    at_first("hung up on the head", hung_up, 1, method="HEAD"),
    Script("hung up for ever", 5, [Fault(hung_up, "GET", LISTING)], ["4 tries", "RemoteProtocolError"], 4),
    Script("wrong body in LFS", 3, [Fault(body(flipped), "GET", WEIGHTS)], [WEIGHTS, "bytes"], 1),
    Script("wrong body in git", 3, [Fault(body(flipped), "GET", CONFIG)], [CONFIG, "bytes"], 1),
    Script("empty body", 3, [Fault(body(lambda _: b""), "GET", WEIGHTS)], [WEIGHTS, "length"]),
    Script("body too long", 3, [Fault(body(lambda data: data + b"x"), "GET", WEIGHTS)], [WEIGHTS, "length"]),
    Script("body too short", 3, [Fault(body(lambda data: data[:-1]), "GET", WEIGHTS)], [WEIGHTS, "length"]),
    at_first("body too short once", body(lambda data: data[:-1]), 1),
    Script("redirect to a store", 0, [Fault(redirected, "HEAD", WEIGHTS)]),
    Script("redirect in a circle", 5, [Fault(in_a_circle, "HEAD", WEIGHTS)], [WEIGHTS, "circle"]),
    Script("listing in a circle", 5, [Fault(in_a_circle, "GET", LISTING)], ["circle"]),
    Script("another commit is answered", 3, [Fault(of_another_commit, "HEAD", WEIGHTS)], [WEIGHTS, "another commit"]),
    Script("branch gone", 3, [Fault(status(404, X_Error_Code="RevisionNotFound"), "GET", LISTING)], ["revision"], 1),
    Script("401", 3, [Fault(status(401), "GET", LISTING)], ["login"], 1, 0),
    Script("403", 3, [Fault(status(403), "GET", LISTING)], ["403", "login"], 1, 0),
    Script("403 of a file", 3, [Fault(status(403), "HEAD", WEIGHTS)], [WEIGHTS, "403"], 1, 0),
    Script("gated", 3, [Fault(status(403, X_Error_Code="GatedRepo"), "HEAD", WEIGHTS)], ["gated", "terms"], 1, 0),
    Script("404 repository", 3, [Fault(status(404, X_Error_Code="RepoNotFound"), "GET", LISTING)], ["no such"], 1, 0),
    Script("404 file", 3, [Fault(status(404, X_Error_Code="EntryNotFound"), "HEAD", WEIGHTS)], [WEIGHTS, "404"], 1, 0),
    Script("slow trickle", 0, [Fault(trickle, "GET", WEIGHTS)]),
    Script("ETag missing", 5, [Fault(tagged(None), "HEAD", CONFIG)], [CONFIG, "ETag"]),
    Script("ETag leads out", 3, [Fault(tagged('"../../../evil"'), "HEAD", CONFIG)], ["ETag"]),
    Script("ETag of another file", 0, [Fault(tagged('"' + "a" * 40 + '"'), "HEAD", CONFIG)]),
    Script("listing is no JSON", 5, [Fault(answered(b"<html>log in</html>"), "GET", LISTING)], ["no JSON", "4 tries"]),
    at_first("listing is no JSON once", answered(b"<html>"), 1, part=LISTING),
    Script("listing is no object", 5, [Fault(answered(b"[1, 2]"), "GET", LISTING)], ["no listing", "HF_ENDPOINT"], 1),
    Script("listing is nested", 5, [Fault(answered(b"[" * 100_000), "GET", LISTING)], ["HF_ENDPOINT"]),
    Script("listing without hashes", 3, [Fault(lacking("blobId"), "GET", LISTING)], ["hash"], 1),
    Script("listing without sizes", 3, [Fault(lacking("size"), "GET", LISTING)], ["size"], 1),
    Script("listing of no commit", 5, [Fault(listed(len, sha="../../x"), "GET", LISTING)], ["no listing"], 1),
    Script("name listed twice", 3, [Fault(listed(lambda ls: ls.append(ls[0])), "GET", LISTING)], ["twice"], 1),
    *(
        Script(f"hostile name {name!r}", 3, [Fault(named(name), "GET", LISTING)], ["relative name"], 1)
        for name in (
            "../x.json",
            "a/../../x.json",
            "/tmp/x.json",
            "..\\x.json",
            "C:x.json",
            "x\0.json",
            "a//b.json",
            "\ud800.json",
        )
    ),
]


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
