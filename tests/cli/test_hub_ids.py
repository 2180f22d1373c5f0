"""Ids of the Hub, read from a cache made here and without a network."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from checkpoint_folders import factors, file_hashes, write_adapter
from huggingface_hub import constants
from huggingface_hub.utils import _http
from outcomes import Outcome, Run

RECEIPT = "surgery.receipt.json"
DEAD = "http://127.0.0.1:9"
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


@pytest.fixture
def at_hub(cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Outcome]]:
    """The command line with this cache, where the Hub is out of reach."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between its calls it would wait
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def call(*arguments: object, offline: bool = True, endpoint: str = DEAD) -> Outcome:
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        _http.close_session()
        return run(*arguments)

    yield call
    _http.close_session()


def test_an_id_reads_as_the_folder_that_is_cached(
    at_hub: Callable[..., Outcome], base: Path, adapter: Path, tmp_path: Path
) -> None:
    listed = at_hub("inspect", "owner/base", "--json")
    assert listed.out == at_hub("inspect", base, "--json").out != ""
    plan = at_hub("plan", "owner/base@main", "owner/adapter@v1", "--json")
    assert json.loads(plan.out)["ok"] is True
    by_id = at_hub("merge", "owner/base", f"owner/adapter@{REVISIONS['v1']}=0.5", tmp_path / "by_id")
    by_path = at_hub("merge", base, f"{adapter}=0.5", tmp_path / "by_path")
    assert (by_id.code, by_path.code) == (0, 0), by_id.err + by_path.err
    found = [file_hashes(tmp_path / name) for name in ("by_id", "by_path")]
    assert found[0].pop(RECEIPT) != found[1].pop(RECEIPT)  # the one names repository and commit
    assert found[0] == found[1] != {}
    told = json.loads((tmp_path / "by_id" / RECEIPT).read_text())
    assert (told["base"]["hub_id"], told["base"]["commit"]) == ("owner/base", REVISIONS["main"])
    assert (told["adapters"][0]["hub_id"], told["adapters"][0]["commit"]) == ("owner/adapter", REVISIONS["v1"])


@pytest.mark.parametrize("hub_id", ["owner/other", "owner/adapter", "owner/base@v2"])
@pytest.mark.parametrize("offline", [True, False])
def test_what_is_not_cached_and_cannot_be_reached_is_code_5(
    at_hub: Callable[..., Outcome], hub_id: str, offline: bool
) -> None:
    done = at_hub("inspect", hub_id, offline=offline)
    assert done.code == 5
    assert done.err.startswith(f"surgery: {hub_id}: ")
    assert done.err.count("\n") == 1


def test_a_folder_of_that_name_wins(
    at_hub: Callable[..., Outcome], base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "missing").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    assert at_hub("inspect", "owner/missing").code == 0


def test_the_revision_chooses_the_files(
    at_hub: Callable[..., Outcome], cache: Path, base: Path, tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other", factors(seed=9))
    cached(cache, "owner/adapter", other, "main")
    out = tmp_path / "out"
    assert at_hub("merge", "owner/base", "owner/adapter", out, "--reversible").code == 0
    for hub_id, grades in (("owner/adapter", "4 bits, 5 untouched, 0 different"), ("owner/adapter@v1", "4 different")):
        done = at_hub("verify", "owner/base", hub_id, out)
        assert grades in done.out
        assert done.code == (0 if hub_id == "owner/adapter" else 4)
    assert at_hub("unmerge", out, tmp_path / "back").code == 0
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_a_cache_that_the_environment_names_serves_where_the_hub_is_dead(cache: Path) -> None:
    here = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": DEAD, "NO_PROXY": "*"}
    path = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "surgery", "plan", "owner/base", "owner/adapter@v1", "--json"]
    environment = {**os.environ, **here, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (0, True)


@pytest.mark.parametrize("lost", ["link", "blob"])
def test_a_cache_that_lacks_the_weights_is_refused(
    at_hub: Callable[..., Outcome], cache: Path, lost: str, tmp_path: Path
) -> None:
    [weights] = cache.glob("models--owner--base/snapshots/*/model.safetensors")
    (weights if lost == "link" else weights.resolve()).unlink()
    done = at_hub("merge", "owner/base", "owner/adapter@v1", tmp_path / "out")
    assert done.code in (3, 5)
    assert done.err.startswith("surgery: ")
    assert "safetensors" in done.err
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


def test_what_the_hub_does_not_have_is_code_3(at_hub: Callable[..., Outcome], endpoint: str) -> None:
    done = at_hub("inspect", "owner/other", offline=False, endpoint=endpoint)
    assert done.code == 3
    assert done.err.startswith("surgery: owner/other: ")
    assert done.err.count("\n") == 1


def test_a_missing_path_in_a_folder_that_is_there_is_code_3_without_a_network(
    at_hub: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").mkdir()
    monkeypatch.chdir(tmp_path)
    done = at_hub("inspect", "f/nope")
    assert done.code == 3
    assert done.err.startswith("surgery: f/nope: no such file or folder in f; else, ")
    assert at_hub("inspect", "g/nope").code == 5
