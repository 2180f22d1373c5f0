"""Ids of the Hub, read from a cache made here and without a network."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from checkpoint_folders import factors, file_hashes, write_adapter

RECEIPT = "surgery.receipt.json"
REVISIONS = {"main": "a" * 40, "v1": "b" * 40}


def cached(cache: Path, hub_id: str, folder: Path, branch: str) -> None:
    """Lay `folder` into the cache as the Hub's library does: blobs, and a snapshot of links to them."""
    root, commit = cache / f"models--{hub_id.replace('/', '--')}", REVISIONS[branch]
    for name in ("blobs", "refs", f"snapshots/{commit}"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "refs" / branch).write_text(commit)
    for path in folder.iterdir():
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        (root / "blobs" / digest).write_bytes(data)
        (root / "snapshots" / commit / path.name).symlink_to(Path("../../blobs") / digest)


@pytest.fixture
def cache(base: Path, adapter: Path, tmp_path: Path) -> Path:
    cache = tmp_path / "hub"
    cached(cache, "owner/base", base, "main")
    cached(cache, "owner/adapter", adapter, "v1")
    return cache


def surgery(
    cache: Path,
    *arguments: object,
    offline: str = "1",
    endpoint: str = "http://127.0.0.1:9",
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    here = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": offline, "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}
    return subprocess.run(
        [sys.executable, "-m", "surgery.cli", *map(str, arguments)],
        env={**os.environ, **here, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_id_reads_as_the_folder_that_is_cached(cache: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    listed = surgery(cache, "inspect", "owner/base", "--json")
    assert listed.stdout == surgery(cache, "inspect", base, "--json").stdout != ""
    plan = surgery(cache, "plan", "owner/base@main", "owner/adapter@v1", "--json")
    assert json.loads(plan.stdout)["ok"] is True
    by_id = surgery(cache, "merge", "owner/base", f"owner/adapter@{REVISIONS['v1']}=0.5", tmp_path / "by_id")
    by_path = surgery(cache, "merge", base, f"{adapter}=0.5", tmp_path / "by_path")
    assert (by_id.returncode, by_path.returncode) == (0, 0), by_id.stderr + by_path.stderr
    found = [file_hashes(tmp_path / name) for name in ("by_id", "by_path")]
    assert found[0].pop(RECEIPT) != found[1].pop(RECEIPT)  # the one names repository and commit
    assert found[0] == found[1] != {}
    told = json.loads((tmp_path / "by_id" / RECEIPT).read_text())
    assert (told["base"]["hub_id"], told["base"]["commit"]) == ("owner/base", REVISIONS["main"])
    assert (told["adapters"][0]["hub_id"], told["adapters"][0]["commit"]) == ("owner/adapter", REVISIONS["v1"])


@pytest.mark.parametrize("hub_id", ["owner/other", "owner/adapter", "owner/base@v2"])
@pytest.mark.parametrize("offline", ["1", "0"])
def test_what_is_not_cached_and_cannot_be_reached_is_code_5(cache: Path, hub_id: str, offline: str) -> None:
    done = surgery(cache, "inspect", hub_id, offline=offline)
    assert done.returncode == 5
    assert done.stderr.startswith(f"surgery: {hub_id}: ")
    assert done.stderr.count("\n") == 1


def test_a_folder_of_that_name_wins(cache: Path, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "missing").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    assert surgery(cache, "inspect", "owner/missing").returncode == 0


def test_the_revision_chooses_the_files(cache: Path, base: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", factors(seed=9))
    cached(cache, "owner/adapter", other, "main")
    out = tmp_path / "out"
    assert surgery(cache, "merge", "owner/base", "owner/adapter", out, "--reversible").returncode == 0
    for hub_id, grades in (("owner/adapter", "4 bits, 5 untouched, 0 different"), ("owner/adapter@v1", "4 different")):
        done = surgery(cache, "verify", "owner/base", hub_id, out)
        assert grades in done.stdout
        assert done.returncode == (0 if hub_id == "owner/adapter" else 4)
    assert surgery(cache, "unmerge", out, tmp_path / "back").returncode == 0
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_a_cache_serves_where_the_hub_is_dead(cache: Path) -> None:
    done = surgery(cache, "plan", "owner/base", "owner/adapter@v1", "--json", offline="0")
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (0, True)


@pytest.mark.parametrize("lost", ["link", "blob"])
def test_a_cache_that_lacks_the_weights_is_refused(cache: Path, lost: str, tmp_path: Path) -> None:
    [weights] = cache.glob("models--owner--base/snapshots/*/model.safetensors")
    (weights if lost == "link" else weights.resolve()).unlink()
    done = surgery(cache, "merge", "owner/base", "owner/adapter@v1", tmp_path / "out")
    assert done.returncode in (3, 5)
    assert done.stderr.startswith("surgery: ")
    assert "safetensors" in done.stderr
    assert not list(tmp_path.glob("*out*"))


class Unknowing(BaseHTTPRequestHandler):
    """A Hub that has no repository."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Unknowing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_what_the_hub_does_not_have_is_code_3(cache: Path, endpoint: str) -> None:
    done = surgery(cache, "inspect", "owner/other", offline="0", endpoint=endpoint)
    assert done.returncode == 3
    assert done.stderr.startswith("surgery: owner/other: ")
    assert done.stderr.count("\n") == 1


def test_a_missing_path_in_a_folder_that_is_there_is_code_3_without_a_network(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    done = surgery(cache, "inspect", "f/nope", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.startswith("surgery: f/nope: no such file or folder in f; else, ")
    assert surgery(cache, "inspect", "g/nope", cwd=tmp_path).returncode == 5
