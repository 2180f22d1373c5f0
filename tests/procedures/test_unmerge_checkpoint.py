"""A reversible merge gives every original file back, to the bit, or refuses."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import (
    SHAPES,
    base_tensors,
    factors,
    file_hashes,
    flip_byte,
    rewrite,
    write_adapter,
    write_base,
)

import surgery
from surgery import CheckError, FormatError, OutputExistsError
from surgery.io.staging import Staging

DTYPES = ("float32", "bfloat16", "float16")
CONFIG = {"model_type": "llama", "dtype": "float32", "architectures": ["LlamaForCausalLM"]}
TOKENIZER = {"tokenizer.json": '{"base": 1}', "special_tokens_map.json": "{ }", "vocab/words.txt": "a\nb\r\n"}


def _base(folder: Path, dtype: torch.dtype, shards: int = 1) -> Path:
    base = write_base(folder, base_tensors(dtype), shards, CONFIG)
    for name, text in TOKENIZER.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    return base


def _adapters(folder: Path) -> list[tuple[Path, float]]:
    """Linear sites and an embedding; the second adapter only scales some up."""
    tensors = factors(tuple(SHAPES)[1:])
    tensors["model.embed_tokens.lora_embedding_A"] = torch.randn(4, 11) / 3
    tensors["model.embed_tokens.lora_embedding_B"] = torch.randn(6, 4) / 3
    first = write_adapter(folder / "first", tensors)
    huge = {name: 16 * values for name, values in factors(tuple(SHAPES)[1:3], seed=7).items()}
    return [(first, 1.0), (write_adapter(folder / "second", huge), -0.37)]


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base = _base(tmp_path / "base", torch.bfloat16, shards=3)
    return surgery.merge_checkpoint(base, _adapters(tmp_path), tmp_path / "merged", reversible=True).out


def test_the_first_pattern_that_hits_is_the_first_in_the_record_too(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", torch.bfloat16)
    patterns = {"q_proj": 32, "layers.0.q_proj": 2}  # in no sorted order
    adapter = write_adapter(tmp_path / "adapter", alpha_pattern=patterns)
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True)
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("cast", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_gives_every_original_file(dtype: str, cast: str | None, shards: int, tmp_path: Path) -> None:
    base = _base(tmp_path / "base", getattr(torch, dtype), shards)
    report = surgery.merge_checkpoint(base, _adapters(tmp_path), tmp_path / "out", reversible=True, dtype=cast)
    for name, field in report.receipt["changed"].items():
        assert field["sha256"] != field["base_sha256"], name
    back = surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base) == back.files


def test_the_merged_folder_alone_is_enough(merged: Path, tmp_path: Path) -> None:
    wanted = file_hashes(tmp_path / "base")
    for name in ("base", "first", "second"):
        (tmp_path / name).rename(tmp_path / f"{name}-away")
    moved = merged.rename(tmp_path / "moved")
    surgery.unmerge_checkpoint(moved, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == wanted


def test_no_file_of_the_record_can_be_taken_for_weights(merged: Path) -> None:
    assert all(path.parent == merged for path in merged.rglob("*.safetensors"))


def test_an_adapters_tokenizer_wins_and_the_bases_comes_back(tmp_path: Path) -> None:
    base, (adapter, _) = _base(tmp_path / "base", torch.float32), _adapters(tmp_path)[0]
    (adapter / "tokenizer.json").write_text('{"adapter": 1}')
    (adapter / "added_tokens.json").write_text('{"<new>": 11}')
    (adapter / "training_args.json").write_text("{}")
    out = surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True).out
    assert (out / "tokenizer.json").read_text() == '{"adapter": 1}'
    assert (out / "added_tokens.json").read_text() == '{"<new>": 11}'
    assert (out / "special_tokens_map.json").read_text() == "{ }"
    assert not (out / "training_args.json").exists()
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def test_replaced_tensors_come_back(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", torch.float16)
    tensors = factors() | {"lm_head.weight": torch.randn(11, 6)}
    adapter = write_adapter(tmp_path / "saved", tensors, modules_to_save=["lm_head"])
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True)
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


def _files(merged: Path) -> list[str]:
    shards = sorted(path.name for path in merged.glob("*.safetensors"))
    return [*shards, "surgery.undo/streams-0", "surgery.undo/adapter-0.tensors", "tokenizer.json"]


@pytest.mark.parametrize("index", range(6))
def test_one_changed_byte_is_found_and_nothing_is_written(index: int, merged: Path, tmp_path: Path) -> None:
    name = _files(merged)[index]
    flip_byte(merged / name)
    with pytest.raises(CheckError, match="changed"):
        surgery.unmerge_checkpoint(merged, tmp_path / "restored" / "back")
    assert not (tmp_path / "restored").exists() or list((tmp_path / "restored").rglob("*")) == []


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_changed_byte_anywhere_in_the_streams_is_found(at: float, merged: Path, tmp_path: Path) -> None:
    streams = merged / "surgery.undo" / "streams-0"
    assert streams.stat().st_size > 10
    flip_byte(streams, int(at * streams.stat().st_size))
    with pytest.raises(CheckError, match="streams"):
        surgery.unmerge_checkpoint(merged, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_changed_tensor_is_found(merged: Path, tmp_path: Path) -> None:
    name = next(iter(json.loads((merged / "surgery.undo" / "record.json").read_text())["tensors"]))
    shard = next(path for path in merged.glob("*.safetensors") if name.encode() in path.read_bytes())
    rewrite(shard, {name: torch.zeros(SHAPES[name.removesuffix(".weight")], dtype=torch.bfloat16)})
    with pytest.raises(CheckError):
        surgery.unmerge_checkpoint(merged, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_missing_small_file_is_found(merged: Path, tmp_path: Path) -> None:
    (merged / "tokenizer.json").unlink()
    with pytest.raises(CheckError, match="missing"):
        surgery.unmerge_checkpoint(merged, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_merge_that_is_not_reversible_cannot_be_unmerged(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", torch.float32)
    surgery.merge_checkpoint(base, _adapters(tmp_path), tmp_path / "out")
    with pytest.raises(FormatError, match="reversible"):
        surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_existing_output_is_refused_until_overwrite_is_said(merged: Path, tmp_path: Path) -> None:
    wanted = file_hashes(tmp_path / "base")
    with pytest.raises(OutputExistsError):
        surgery.unmerge_checkpoint(merged, tmp_path / "first")
    surgery.unmerge_checkpoint(merged, tmp_path / "first", overwrite=True)
    assert file_hashes(tmp_path / "first") == wanted


@pytest.mark.parametrize("where", ["merged", "merged/back", "."])
def test_an_output_that_overlaps_with_the_merged_folder_is_refused(where: str, merged: Path, tmp_path: Path) -> None:
    before = file_hashes(tmp_path)
    with pytest.raises(OutputExistsError, match="overlaps"):
        surgery.unmerge_checkpoint(merged, tmp_path / where, overwrite=True)
    assert file_hashes(tmp_path) == before


@pytest.mark.parametrize("dtype", [None, "float32", "float64"])
def test_a_record_may_be_empty(dtype: str | None, tmp_path: Path) -> None:
    """Without zeros and powers of two, and in a wider dtype, every weight is recomputed."""
    torch.manual_seed(0)
    weights = {name: torch.rand(values.shape) + 1.1 for name, values in base_tensors(torch.float32).items()}
    base = write_base(tmp_path / "base", {name: values.bfloat16() for name, values in weights.items()}, shards=3)
    adapter = write_adapter(tmp_path / "adapter")
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True, dtype=dtype)
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)


@pytest.mark.parametrize("changed", ["special_tokens_map.json", "tokenizer.json"])  # carried, and displaced
def test_a_small_file_that_changes_once_it_is_copied_comes_back_as_it_was_copied(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _base(tmp_path / "base", torch.bfloat16)
    adapter, carry = write_adapter(tmp_path / "adapter"), Staging.carry
    (adapter / "tokenizer.json").write_text("of the adapter")
    before = file_hashes(base)

    def copied(self: Staging, source: Path, name: str) -> str:
        digest = carry(self, source, name)
        if source == base / changed:
            source.write_text("other")
        return digest

    monkeypatch.setattr(Staging, "carry", copied)
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True)
    assert (base / changed).read_text() == "other"
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert file_hashes(tmp_path / "back") == before
