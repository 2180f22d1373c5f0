"""Which files are fetched, from which commit, and what the cache alone can serve."""

import errno
from pathlib import Path
from typing import NoReturn

import pytest
from fake_hub import FakeHub, Fault, Files, Handler
from huggingface_hub import constants, hf_hub_download
from outcomes import Run

from surgery.errors import EnvironmentFault, InputError
from surgery.io.hub import Located, located
from surgery.io.hub_files import HubFile, needed_at_first, needed_weights, shard_names

ID = "owner/base"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
SMALL = [
    "config.json",
    "tokenizer.json",
    "README.md",
    "LICENSE",
    "1_Pooling/config.json",
    "modeling_x.py",
    "a.tiktoken",
]
OTHERS = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.onnx",
    "model.gguf",
    "onnx/config.json",
    "onnx/model.onnx",
    "optimizer.pt",
    "training_args.bin",
    ".gitattributes",
    "tf_model.h5",
    "picture.png",
]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "merges.txt"]


def needed(names: list[str], shards: list[str] | None = None) -> set[str]:
    files = [HubFile(name, 1, None, "0" * 40) for name in names]
    found = needed_at_first(files, "x/y") + needed_weights(files, shards or [], "x/y")
    assert len(found) == len(set(found))
    return {file.name for file in found}


@pytest.mark.parametrize(
    ("names", "shards", "wanted"),
    [
        ([SINGLE, *SMALL, *OTHERS], [], [SINGLE, *SMALL]),
        ([SINGLE, "consolidated.safetensors", "unet/model.safetensors"], [], [SINGLE]),
        ([INDEX, *SHARDS, SINGLE, "consolidated.safetensors", *OTHERS], SHARDS, [INDEX, *SHARDS]),
        ([INDEX, *SHARDS], [], [INDEX]),  # an index that names nothing: the checkpoint's reader refuses it
        (["x.safetensors"], [], ["x.safetensors"]),
        ([*ADAPTER, *TOKENIZER, "adapter_model.bin", "README.md", "trainer_state.json"], [], [*ADAPTER, *TOKENIZER]),
        ([*ADAPTER, "checkpoint-5/adapter_model.safetensors", "checkpoint-5/tokenizer.json"], [], ADAPTER),
        ([*ADAPTER, SINGLE, "config.json"], [], [*ADAPTER, SINGLE, "config.json"]),
        (
            [
                SINGLE,
                "surgery.receipt.json",
                "surgery.undo/record.json",
                "surgery.undo/streams-0",
                "surgery.undo/x.bin",
            ],
            [],
            [SINGLE, "surgery.receipt.json", "surgery.undo/record.json", "surgery.undo/streams-0"],
        ),
    ],
)
def test_what_is_needed_and_nothing_else(names: list[str], shards: list[str], wanted: list[str]) -> None:
    assert needed(names, shards) == set(wanted)


@pytest.mark.parametrize(
    ("names", "shards", "words"),
    [
        (["config.json", "pytorch_model.bin"], [], "only pytorch_model.bin; pickles"),
        (["config.json"], [], "no safetensors file"),
        (["adapter_config.json", "adapter_model.bin"], [], "only adapter_model.bin; pickles"),
        (["adapter_config.json"], [], "no adapter_model.safetensors"),
        (["a.safetensors", "b.safetensors"], [], "2 safetensors files"),
        ([INDEX, SHARDS[0]], SHARDS, SHARDS[1]),
    ],
)
def test_a_repository_without_its_weights_is_refused_before_they_are_fetched(
    names: list[str], shards: list[str], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        needed(names, shards)


def test_a_sharded_model_and_an_adapter_come_whole_and_merge(
    hub: FakeHub, model: Files, adapter: Path, run: Run, tmp_path: Path
) -> None:
    hub.add(ID, {**model, **dict.fromkeys(OTHERS, b"x")})
    hub.add("owner/adapter", {path.name: path.read_bytes() for path in adapter.iterdir()})
    assert run("merge", ID, "owner/adapter=0.5", tmp_path / "out").code == 0
    assert not [line for line in hub.log if any(line.endswith(f"/{name}") for name in OTHERS)]
    assert not [line for line in hub.log if line.startswith("GET") and "/resolve/main/" in line]


def test_a_location_names_repository_and_commit(hub: FakeHub, model: Files, base: Path) -> None:
    first = hub.add(ID, model)
    second = hub.add(ID, model | {"config.json": b"{}"}, "next")
    assert located(ID)[1:] == (ID, first)
    assert located(f"{ID}@main") == located(f"{ID}@{first}")
    assert located(f"{ID}@next").commit == second
    hub.repositories[ID].branches["refs/pr/1"] = second
    assert located(f"{ID}@refs/pr/1").commit == second
    assert located(base) == Located(base, None, None)


@pytest.mark.parametrize("mode", ["offline", "dead", "busy"])
def test_a_whole_cache_serves_without_the_hub(
    mode: str, hub: FakeHub, model: Files, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    hub.add(ID, model)
    known = located(ID)
    hub.log.clear()
    if mode == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif mode == "dead":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        hub.faults = [Fault(busy)]
    assert located(ID) == known
    assert located(f"{ID}@{known.commit}") == known
    assert len(hub.log) == (mode == "busy")  # one try, and none for a commit
    assert not waits
    for name, data in model.items():
        assert (known.path / name).read_bytes() == data


def busy(handler: Handler) -> bool:
    handler.answer(503)
    return True


@pytest.mark.parametrize("when", ["small", "weights"])
def test_a_download_that_was_cut_off_is_no_whole_cache(
    when: str, hub: FakeHub, model: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, model | {"tokenizer.json": b"{}"})
    hub.faults = [Fault(busy, "GET", "tokenizer.json" if when == "small" else SINGLE)]
    with pytest.raises(EnvironmentFault, match="4 tries"):
        located(ID)
    hub.faults = []
    commit = hub.repositories[ID].branches["main"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for hub_id in (ID, f"{ID}@{commit}"):
        with pytest.raises(EnvironmentFault, match="HF_HUB_OFFLINE"):
            located(hub_id)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert (located(f"{ID}@{commit}").path / "tokenizer.json").read_bytes() == b"{}"


def test_a_branch_that_moved_is_read_anew_and_the_old_commit_stays_while_the_new_is_not_whole(
    hub: FakeHub, model: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, model)
    old = located(ID)
    new = hub.add(ID, model | {"config.json": b'{"model_type": "other"}'})
    hub.faults = [Fault(busy, "GET", "config.json")]
    with pytest.raises(EnvironmentFault):
        located(ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert located(ID) == old
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.faults = []
    assert located(ID).commit == new


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.json", lambda data: b"[" + data[1:]),
        (SINGLE, lambda data: data[:-1]),
        (SINGLE, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    ],
)
def test_what_was_damaged_in_the_cache_is_fetched_anew(
    name: str, damage: object, hub: FakeHub, model: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, model)
    path = located(ID).path / name
    path.resolve().write_bytes(damage(model[name]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault, match=name):
        located(ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.log.clear()
    assert located(ID).path / name == path
    assert path.read_bytes() == model[name]
    assert [line for line in hub.log if line.startswith("GET") and "/resolve/" in line] == [
        f"GET /{ID}/resolve/{hub.repositories[ID].branches['main']}/{name}"
    ]


class Killed(BaseException):
    """As a signal would end it."""


def test_a_run_that_was_killed_before_the_check_leaves_nothing_unchecked(
    hub: FakeHub, model: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.io.hub_cache.RECHECKED_BYTES", 0)
    hub.add(ID, model)
    hub.faults = [Fault(wrong, "GET", SINGLE)]
    check = HubFile.is_content_of

    def killed(file: HubFile, path: Path) -> bool:
        if file.name == SINGLE:
            raise Killed
        return check(file, path)

    with monkeypatch.context() as patched:
        patched.setattr(HubFile, "is_content_of", killed)
        with pytest.raises(Killed):
            located(ID)
    with pytest.raises(InputError, match=SINGLE):
        located(ID)
    hub.faults = []
    assert (located(ID).path / SINGLE).read_bytes() == model[SINGLE]


def wrong(handler: Handler) -> bool:
    commit, data = handler.found() or ("", b"")
    handler.answer(200, data[:-1] + bytes([data[-1] ^ 1]), **handler.headers_of(commit, data))
    return True


def test_large_cached_files_are_checked_by_size_alone(
    hub: FakeHub, model: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, model)
    known = located(ID)
    monkeypatch.setattr("surgery.io.hub_cache.RECHECKED_BYTES", 0)
    monkeypatch.setattr(HubFile, "is_content_of", lambda *_: pytest.fail("it is hashed again"))
    assert located(ID) == known


def test_equal_files_of_two_commits_are_one_blob(hub: FakeHub, model: Files) -> None:
    hub.add(ID, model)
    first = located(ID)
    hub.add(ID, model | {"config.json": b"{}"})
    hub.log.clear()
    second = located(ID)
    assert (first.path / SINGLE).resolve() == (second.path / SINGLE).resolve()
    assert not [line for line in hub.log if line.startswith("GET") and line.endswith(SINGLE)]


@pytest.mark.parametrize("revision", ["../main", "a/../../b", "/etc/passwd", "-x", ""])
def test_a_revision_that_leads_out_of_the_cache_is_refused(revision: str, hub: FakeHub) -> None:
    with pytest.raises(InputError, match="is wanted"):
        located(f"{ID}@{revision}")
    assert hub.log == []


def test_the_cache_of_another_tool_is_read_as_it_is(
    hub: FakeHub, model: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, model)
    [folder] = {Path(hf_hub_download(ID, name)).parent for name in model}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert located(ID).path == folder


def test_a_cache_of_another_tool_without_weights_is_not_taken_for_the_model(
    hub: FakeHub, model: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, model)
    hf_hub_download(ID, "config.json")
    with monkeypatch.context() as patched:
        patched.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(EnvironmentFault, match="without a safetensors file"):
            located(ID)
    hub.faults = [Fault(busy, "GET", "/api/models/", 1)]
    assert (located(ID).path / SINGLE).read_bytes() == model[SINGLE]


@pytest.mark.parametrize("weight_map", [None, [1], {"a": ["x"], "b": 1, "c": "../x.safetensors", "d": "y.bin"}])
def test_an_index_that_names_no_shard_is_left_to_the_reader(weight_map: object) -> None:
    assert list(shard_names(weight_map)) == []


def test_only_what_lies_in_the_cache_is_discarded(hub: FakeHub, model: Files, tmp_path: Path) -> None:
    hub.add(ID, model)
    path = located(ID).path / SINGLE
    outside, behind = tmp_path / "outside", tmp_path / "behind"
    behind.write_bytes(b"kept")
    outside.symlink_to(behind)
    path.unlink()
    path.symlink_to(outside)
    located(ID)
    assert outside.is_symlink()
    assert behind.read_bytes() == b"kept"
    assert path.read_bytes() == model[SINGLE]


def test_a_cache_for_reading_only_serves(hub: FakeHub, model: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, model)
    known = located(ID)
    hub.repositories[ID].branches["other"] = str(known.commit)

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert located(ID) == located(f"{ID}@other") == known
