"""A merge goes to the Hub as one commit, with its card, and is the same bytes there; or the exit code tells why not."""

import json
from pathlib import Path

import pytest
import yaml
from checkpoint_folders import file_hashes, flip_byte
from fake_hub import FakeHub, Fault, Handler, sha256
from huggingface_hub import constants
from outcomes import Outcome, Run, parsed, told

import surgery

REPO = "me/merged"
CARD = "---\nlicense: other\nlicense_name: llama3\nbase_model: /home/me/x\n---\n# Base\nfrom /home/me/x\n"


@pytest.fixture
def out(hub: FakeHub, base: Path, adapter: Path, tmp_path: Path) -> Path:
    """A merge of local folders, whose base has a card."""
    del hub
    (base / "README.md").write_text(CARD)
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True)
    return tmp_path / "out"


def there(hub: FakeHub, repo: str = REPO) -> dict[str, str]:
    """sha256 by name of what the repository holds, but its card."""
    repository = hub.repositories[repo]
    files = repository.commits[repository.branches["main"]]
    return {name: sha256(data) for name, data in files.items() if name != "README.md"}


def card(hub: FakeHub, repo: str = REPO) -> str:
    repository = hub.repositories[repo]
    return repository.commits[repository.branches["main"]]["README.md"].decode()


def test_a_merge_is_pushed_whole_as_one_commit(hub: FakeHub, out: Path, run: Run) -> None:
    before = file_hashes(out)
    found = run("push", out, REPO)
    assert (found.code, found.err) == (0, "")
    assert len(hub.repositories[REPO].commits) == 1
    assert hub.repositories[REPO].branches["main"] in found.out
    assert not hub.repositories[REPO].private
    wanted = {"surgery.undo/files/README.md": before["README.md"]}
    assert there(hub) == wanted | {name: digest for name, digest in before.items() if name != "README.md"}
    assert file_hashes(out) == before
    head = yaml.safe_load(card(hub).split("---\n")[1])
    assert (head["license"], head["license_name"]) == ("other", "llama3")
    assert "base_model" not in head
    assert "/home" not in card(hub)
    assert str(out.parent) not in card(hub)


def test_what_was_pushed_verifies_and_unmerges_from_the_hub(
    hub: FakeHub, out: Path, base: Path, run: Run, tmp_path: Path
) -> None:
    assert run("push", out, REPO, "--private").code == 0
    assert hub.repositories[REPO].private
    assert run("verify", REPO).code == 0
    assert run("unmerge", REPO, tmp_path / "back").code == 0
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_merge_pushes_where_it_is_told_to(hub: FakeHub, base: Path, adapter: Path, run: Run, tmp_path: Path) -> None:
    found = run("merge", base, adapter, tmp_path / "out", "--push-to-hub", REPO, "--private", "--json")
    assert found.code == 0, found.err
    assert parsed(found)["pushed"] == f"{REPO}@{hub.repositories[REPO].branches['main']}"
    assert there(hub).keys() == file_hashes(tmp_path / "out").keys()
    assert hub.repositories[REPO].private
    report = surgery.merge_checkpoint(base, adapter, tmp_path / "two", push_to_hub="me/two")
    assert report.summary().endswith(f"; pushed as {report.pushed}")


def test_a_merge_that_cannot_be_pushed_is_a_merge(
    hub: FakeHub, base: Path, adapter: Path, run: Run, tmp_path: Path
) -> None:
    hub.faults = [on(status(503), "POST", "/api/repos/create")]
    line = told(run("merge", base, adapter, tmp_path / "out", "--push-to-hub", REPO), 5)
    assert "is merged and stays" in line
    assert run("verify", tmp_path / "out").code == 0
    hub.faults = []
    assert run("push", tmp_path / "out", REPO).code == 0


@pytest.mark.parametrize("repo", ["merged", "a/b/c", "../x", "a/..", "a/b--c", "a/b.git", "me/ x"])
def test_a_name_that_no_repository_can_have_is_code_2_before_the_merge(
    repo: str, hub: FakeHub, base: Path, adapter: Path, run: Run, tmp_path: Path
) -> None:
    told(run("merge", base, adapter, tmp_path / "out", "--push-to-hub", repo), 2)
    assert not (tmp_path / "out").exists()
    assert hub.log == []


def test_private_alone_is_code_2(hub: FakeHub, base: Path, adapter: Path, run: Run, tmp_path: Path) -> None:
    assert "private" in told(run("merge", base, adapter, tmp_path / "out", "--private"), 2)
    assert hub.log == []


def test_commits_of_base_and_adapter_stand_in_the_card(hub: FakeHub, out: Path) -> None:
    path = out / "surgery.receipt.json"
    receipt = json.loads(path.read_text())
    receipt["base"] |= {"hub_id": "owner/base", "commit": "a" * 40}
    receipt["adapters"][0] |= {"hub_id": "owner/adapter", "commit": "b" * 40}
    path.write_text(json.dumps(receipt))
    surgery.push_to_hub(out, REPO)
    assert yaml.safe_load(card(hub).split("---\n")[1])["base_model"] == ["owner/base"]
    assert f"surgery verify owner/base@{'a' * 40} owner/adapter@{'b' * 40} {REPO}" in card(hub)
    assert sha256(path.read_bytes()) in card(hub)


def status(code: int, **headers: str) -> Fault:
    def play(handler: Handler) -> bool:
        handler.answer(code, b"", **headers)
        return True

    return Fault(play)


def on(fault: Fault, method: str, part: str, times: int = 1 << 30) -> Fault:
    return Fault(fault.play, method, part, times)


def corrupted(handler: Handler) -> bool:
    handler.body = handler.body[:-1] + bytes([handler.body[-1] ^ 1])
    return False


def dropped_file(handler: Handler) -> bool:
    lines = [line for line in handler.body.splitlines() if b"config.json" not in line]
    handler.body = b"\n".join(lines)
    return False


def bad_card(handler: Handler) -> bool:
    handler.json({"errors": [{"message": "license is no license"}]}, 400)
    return True


def hung_up(handler: Handler) -> bool:
    handler.close_connection = True
    return True


@pytest.mark.parametrize(
    "fault",
    [
        *(on(status(503), method, part, 2) for method, part in (("POST", "/api/repos/create"), ("PUT", "/lfs/"))),
        on(status(429, Retry_After="2"), "POST", "/commit/main", 1),
        on(status(500), "POST", "/preupload/", 1),
        on(status(502), "POST", "/objects/batch", 1),
        Fault(hung_up, "POST", "/commit/main", 1),
        Fault(hung_up, "PUT", "/lfs/", 1),
        on(status(503), "GET", "/revision/", 1),
    ],
    ids=lambda fault: fault.part,
)
def test_a_passing_fault_is_got_over(fault: Fault, hub: FakeHub, out: Path, run: Run) -> None:
    hub.faults = [fault]
    found = run("push", out, REPO)
    assert (found.code, found.err) == (0, "")
    assert there(hub).items() >= file_hashes(out).items() - {("README.md", file_hashes(out)["README.md"])}


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (on(status(401), "POST", "/api/repos/create"), 3, "login"),
        (on(status(403), "POST", "/commit/main"), 3, "403"),
        (on(status(403), "PUT", "/lfs/"), 3, "403"),
        (Fault(bad_card, "POST", "/validate-yaml"), 3, "license is no license"),
        (on(status(503), "POST", "/commit/main"), 5, "503"),
        (on(status(503), "PUT", "/lfs/"), 5, "503"),
        (Fault(hung_up, "POST", "/api/repos/create"), 5, "RemoteProtocolError"),
        (Fault(corrupted, "PUT", "/lfs/"), 5, "model.safetensors is there with another hash"),
        (Fault(dropped_file, "POST", "/commit/main"), 5, "config.json is not there"),
    ],
)
def test_a_lasting_fault_is_told_and_the_folder_stays(
    fault: Fault, code: int, words: str, hub: FakeHub, out: Path, run: Run
) -> None:
    before = file_hashes(out)
    hub.faults = [fault]
    line = told(run("push", out, REPO), code)
    assert REPO in line
    assert words in line
    assert file_hashes(out) == before


def test_other_weights_in_the_repository_are_not_left_beside_ours(hub: FakeHub, out: Path, run: Run) -> None:
    hub.add(REPO, {"pytorch_model.bin": b"old", "picture.png": b"kept"})
    assert "pytorch_model.bin" in told(run("push", out, REPO), 3)
    hub.add(REPO, {"picture.png": b"kept", "model.safetensors": b"old"})
    assert run("push", out, REPO).code == 0
    assert run("push", out, REPO).code == 0
    assert there(hub)["picture.png"] == sha256(b"kept")


def test_a_public_repository_is_not_taken_for_a_private_one(out: Path, run: Run) -> None:
    assert run("push", out, REPO).code == 0
    assert "public" in told(run("push", out, REPO, "--private"), 3)


def _changed(out: Path) -> None:
    flip_byte(out / "model.safetensors", -1)


def _lost(out: Path) -> None:
    (out / "model.safetensors").unlink()


def _linked(out: Path) -> None:
    (out / "x").symlink_to("/etc/passwd")


def _without_receipt(out: Path) -> None:
    (out / "surgery.receipt.json").unlink()


@pytest.mark.parametrize(("damage", "code"), [(_changed, 4), (_lost, 4), (_linked, 3), (_without_receipt, 3)])
def test_a_folder_that_is_no_whole_merge_is_not_pushed(damage, code: int, hub: FakeHub, out: Path, run: Run) -> None:
    damage(out)
    told(run("push", out, REPO), code)
    assert hub.repositories == {}


def test_offline_pushes_nothing(hub: FakeHub, out: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in told(run("push", out, REPO), 5)
    assert hub.log == []


def test_a_push_is_told_as_data(hub: FakeHub, out: Path, run: Run) -> None:
    found: Outcome = run("push", out, REPO, "--json")
    report = parsed(found)
    assert (report["hub_id"], report["commit"]) == (REPO, hub.repositories[REPO].branches["main"])
    assert {name: digest for name, digest in report["files"].items() if name != "README.md"} == there(hub)


def test_a_fault_in_the_library_s_own_threads_is_got_over_too(hub: FakeHub, out: Path, run: Run) -> None:
    (out / "second.safetensors").write_bytes((out / "model.safetensors").read_bytes() + b"x")
    hub.faults = [on(status(503), "PUT", "/lfs/", 20)]
    found = run("push", out, REPO)
    assert found.code == 0, found.err
    hub.faults = [on(status(403), "PUT", "/lfs/")]
    assert "403" in told(run("push", out, "me/other"), 3)
