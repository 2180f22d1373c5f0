"""What a Hub can do wrong, as a table of plays that a fake one puts on."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fake_hub import Fault, Handler, sibling

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
