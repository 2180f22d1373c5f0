"""A run that was cut short is gone on with only where all that it depended on is the same."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_folders import (
    base_tensors,
    factors,
    file_hashes,
    read_tensors,
    rewrite,
    tensor_hashes,
    write_adapter,
    write_base,
)
from safetensors.torch import load_file

import surgery
from surgery.adapters.peft import read_adapter
from surgery.core.adapter import Weighted
from surgery.core.survival import Bounds
from surgery.hosts.checkpoint import Checkpoint
from surgery.io.staging import Staging
from surgery.procedures.planning.treatment import Treatment
from surgery.procedures.writing.filling import Pace
from surgery.procedures.writing.merge_checkpoint import Options, merge_checkpoint

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
SQUARE = ("model.layers.0.q_proj", "model.layers.1.q_proj")
Merge = Callable[[], object]


def cut_short(merge: Merge, monkeypatch: pytest.MonkeyPatch, after: int = 1) -> None:
    """The run ends as if interrupted when so many files are finished."""
    finish = Staging.finish
    done = []

    def counted(*arguments: object) -> None:
        done.append(finish(*arguments))  # type: ignore[arg-type, func-returns-value]
        if len(done) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Staging, "finish", counted)
        with pytest.raises(KeyboardInterrupt) as stopped:
            merge()
    assert "the same call goes on from there" in stopped.value.__notes__[0]


def finished(out: Path) -> list[str]:
    """The files that a run which was cut short has finished."""
    folder = out.with_name(f".{out.name}.surgery-staging")
    return sorted(path.name for path in folder.glob("*.safetensors"))


def merging(base: Path, adapter: Path, out: Path, **options: object) -> Merge:
    """A merge of one file at a time."""

    def merge() -> object:
        with Checkpoint(base) as source:
            adapters = [Weighted(read_adapter(adapter))]
            return merge_checkpoint(source, adapters, out, Options(pace=Pace(workers=1), **options))

    return merge


@pytest.mark.parametrize(
    "treatment",
    [Treatment(), Treatment(into="nf4", rounding="feedback"), Treatment(into="int8", fallback="16bit")],
    ids=["plain", "nf4", "int8"],
)
def test_finished_files_are_kept_and_the_bytes_are_the_same(
    treatment: Treatment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", base_tensors(torch.bfloat16), shards=3)
    adapter = write_adapter(tmp_path / "adapter")
    options = {"treatment": treatment, "reversible": True, "bounds": Bounds(0.0, 9.0), "probes": 3}
    merging(base, adapter, tmp_path / "straight", **options)()
    merge = merging(base, adapter, tmp_path / "out", **options)
    cut_short(merge, monkeypatch)
    [first] = finished(tmp_path / "out")
    stamp = (tmp_path / ".out.surgery-staging" / first).stat().st_mtime_ns
    merge()
    assert (tmp_path / "out" / first).stat().st_mtime_ns == stamp
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out", "straight"]


def test_a_head_written_apart_depends_on_the_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are finished, in files of their own, when the embedding changes."""
    tensors = {"model.norm.weight": torch.ones(6), "model.embed_tokens.weight": torch.randn(11, 6)}
    base = write_base(tmp_path / "base", tensors, shards=2, config=LLAMA)
    named = {"lm_head.lora_A.weight": torch.randn(4, 6), "lm_head.lora_B.weight": torch.randn(11, 4)}
    adapter = write_adapter(tmp_path / "adapter", named, target_modules=["lm_head"])
    merge = merging(base, adapter, tmp_path / "out", treatment=Treatment(tied="untie"), max_shard_bytes=300)
    cut_short(merge, monkeypatch, after=2)
    assert len(finished(tmp_path / "out")) == 2
    changed = {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"] + 100}
    rewrite(base / "model-00002-of-00002.safetensors", changed)
    merge()
    straight = merging(base, adapter, tmp_path / "straight", treatment=Treatment(tied="untie"), max_shard_bytes=300)
    straight()
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "straight")


def test_a_base_whose_data_has_changed_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", base_tensors(torch.float32), shards=2)
    adapter = write_adapter(tmp_path / "adapter")
    merge = merging(base, adapter, tmp_path / "out")
    cut_short(merge, monkeypatch)
    [first] = finished(tmp_path / "out")
    rewrite(base / first, {name: values * 2 for name, values in load_file(base / first).items()})
    merge()
    merging(base, adapter, tmp_path / "straight")()
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "straight")


def test_another_layout_of_the_same_weights_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "gpt2"}
    tensors = {name.replace("q_proj", "c_proj"): values for name, values in base_tensors(torch.float32).items()}
    base = write_base(tmp_path / "base", tensors, shards=2, config=config)
    named = {name.replace("q_proj", "c_proj"): values for name, values in factors(SQUARE).items()}
    adapter = write_adapter(tmp_path / "adapter", named, target_modules=["c_proj"])
    merge = merging(base, adapter, tmp_path / "out")
    cut_short(merge, monkeypatch)
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    merge()
    assert surgery.verify_checkpoint(base, adapter, tmp_path / "out").counts["bits"] == 2


def test_resume_asks_for_a_run_and_no_resume_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", base_tensors(torch.float32), shards=2)
    adapter = write_adapter(tmp_path / "adapter")
    with pytest.raises(surgery.StateError, match="nothing to go on with"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", resume=True)
    cut_short(merging(base, adapter, tmp_path / "out"), monkeypatch)
    [first] = finished(tmp_path / "out")
    inode = (tmp_path / ".out.surgery-staging" / first).stat().st_ino
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", resume=False)
    assert (tmp_path / "out" / first).stat().st_ino != inode
    surgery.merge_checkpoint(base, adapter, tmp_path / "two", overwrite=True)
    assert tensor_hashes(read_tensors(tmp_path / "two")) == tensor_hashes(read_tensors(tmp_path / "out"))
