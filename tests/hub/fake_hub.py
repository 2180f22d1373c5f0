"""A Hub on loopback: repositories of commits, files in git or LFS, uploads, and faults, once or for ever."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LFS = (".safetensors", ".bin")
Files = dict[str, bytes]


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repository:
    """Commits by their sha, and branches."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: Files, branch: str = "main") -> str:
        sha = blob_id(json.dumps([len(self.commits), sorted(files)]).encode())
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha


@dataclass
class Fault:
    """For requests of `method` whose path holds `part`, `times` times: `play`, which returns whether it answered."""

    play: "Callable[[Handler], bool]"
    method: str = "GET"
    part: str = ""
    times: int = 1 << 30


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.stored: dict[str, bytes] = {}
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, hub_id: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        return self.repositories.setdefault(hub_id, Repository()).commit(dict(files), branch)

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.log.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times and fault.method == method and fault.part in path:
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def running() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_GET(self) -> None:
        self.at = unquote(urlsplit(self.path).path)
        fault = self.server.fault_for(self.command, self.at)
        if fault is not None and fault.play(self):
            return
        if self.at.startswith("/api/models/"):
            self._info()
        else:
            self._resolve()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.at = unquote(urlsplit(self.path).path)
        self.body = self._read()
        fault = self.server.fault_for(self.command, self.at)
        if fault is not None and fault.play(self):
            return
        for pattern, answer in UPLOADS:
            if found := re.fullmatch(pattern, self.at):
                answer(self, **found.groupdict())
                return
        self.answer(404)

    def do_PUT(self) -> None:
        self.do_POST()

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def found(self) -> tuple[str, bytes] | None:
        """The commit and content that a resolve path names, after a 404 where there is none."""
        match = re.fullmatch(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.*)", self.at)
        repository = self.server.repositories.get(match["id"]) if match else None
        if match is None or repository is None:
            self.answer(404, X_Error_Code="RepoNotFound")
            return None
        commit = repository.branches.get(match["revision"], match["revision"])
        files = repository.commits.get(commit, {})
        if match["name"] not in files:
            self.answer(404, X_Error_Code="EntryNotFound")
            return None
        return commit, files[match["name"]]

    def headers_of(self, commit: str, data: bytes) -> dict[str, str]:
        if self.at.endswith(LFS):
            linked = {"X_Linked_ETag": f'"{sha256(data)}"', "X_Linked_Size": str(len(data))}
            return {"X_Repo_Commit": commit, "ETag": '"of-the-store"', **linked}
        return {"X_Repo_Commit": commit, "ETag": f'"{blob_id(data)}"'}

    def send_part(self, commit: str, data: bytes) -> None:
        """`data`, or the end of it that a Range asks for."""
        headers = self.headers_of(commit, data)
        if self.command == "HEAD":
            self.answer(200, Content_Length=str(len(data)), **headers)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        whole = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.answer(206 if start else 200, data[start:], **headers, **whole)

    def _resolve(self) -> None:
        if (found := self.found()) is not None:
            self.send_part(*found)

    def _info(self) -> None:
        match = re.fullmatch(r"/api/models/(?P<id>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?", self.at)
        repository = self.server.repositories.get(match["id"]) if match else None
        if match is None or repository is None:
            self.answer(404, X_Error_Code="RepoNotFound")
            return
        revision = match["revision"] or "main"
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            if match["revision"] is None:  # a repository without a commit
                self.json({"id": match["id"], "sha": "0" * 40, "siblings": []})
            else:
                self.answer(404, X_Error_Code="RevisionNotFound")
            return
        self.json(self.info(match["id"], commit))

    def info(self, hub_id: str, commit: str) -> dict[str, Any]:
        files = self.server.repositories[hub_id].commits[commit]
        lines = [sibling(name, data) for name, data in files.items()]
        return {"id": hub_id, "sha": commit, "private": self.server.repositories[hub_id].private, "siblings": lines}

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


def sibling(name: str, data: bytes) -> dict[str, Any]:
    """A line of the listing."""
    line = {"rfilename": name, "size": len(data), "blobId": blob_id(data)}
    if name.endswith(LFS):
        line |= {
            "blobId": blob_id(b"a pointer"),
            "lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 130},
        }
    return line


def _create(handler: Handler) -> None:
    asked = json.loads(handler.body)
    hub_id = f"{asked['organization']}/{asked['name']}"
    known = hub_id in handler.server.repositories
    if not known:
        handler.server.repositories[hub_id] = Repository(private=asked.get("visibility") == "private")
    handler.json({"url": f"{handler.server.endpoint}/{hub_id}"}, 409 if known else 200)


def _validate(handler: Handler) -> None:
    card = json.loads(handler.body)["content"]
    sound = isinstance(yaml.safe_load(card.split("---\n")[1]), dict)
    handler.json({"errors": [] if sound else [{"message": "no front matter"}]}, 200 if sound else 400)


def _preupload(handler: Handler, id: str, revision: str) -> None:
    del id, revision
    files = [
        {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LFS) else "regular", "shouldIgnore": False}
        for one in json.loads(handler.body)["files"]
    ]
    handler.json({"files": files})


def _batch(handler: Handler, id: str) -> None:
    del id
    objects = [
        {**one, "actions": {"upload": {"href": f"{handler.server.endpoint}/lfs/{one['oid']}"}}}
        for one in json.loads(handler.body)["objects"]
    ]
    handler.json({"transfer": "basic", "objects": objects})


def _store(handler: Handler, oid: str) -> None:
    handler.server.stored[oid] = handler.body
    handler.answer(200)


def _commit(handler: Handler, id: str, revision: str) -> None:
    repository = handler.server.repositories[id]
    files = dict(repository.commits.get(repository.branches.get(revision, ""), {}))
    for line in map(json.loads, handler.body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = handler.server.stored[value["oid"]]
    sha = repository.commit(files, revision)
    handler.json(
        {"commitUrl": f"{handler.server.endpoint}/{id}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None}
    )


UPLOADS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("/api/repos/create", _create),
    ("/api/validate-yaml", _validate),
    ("/api/models/(?P<id>[^/]+/[^/]+)/preupload/(?P<revision>.+)", _preupload),
    (r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _batch),
    ("/lfs/(?P<oid>[0-9a-f]+)", _store),
    ("/api/models/(?P<id>[^/]+/[^/]+)/commit/(?P<revision>.+)", _commit),
)
