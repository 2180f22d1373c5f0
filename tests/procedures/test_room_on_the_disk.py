"""Room on the disk is asked for before the work: what the files and all that is known beside them take."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checkpoint_folders import base_tensors, factors, llama_base, write_adapter, write_base
from quantized_folders import SHAPES, SITES, quantized_base
from safetensors.torch import load_file
from torch import Tensor

import surgery
from surgery.adapters.peft import read_adapter
from surgery.core.adapter import Weighted
from surgery.hosts.checkpoint import Checkpoint
from surgery.io.staging import Staging
from surgery.procedures.writing.filling import Pace
from surgery.procedures.writing.merge_checkpoint import Options, merge_checkpoint


class Usage(NamedTuple):
    free: int


@pytest.fixture
def needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    """The bytes that a call needs: it refuses with one byte less, leaving nothing, and is done with as many."""

    def found(call: Callable[[], object]) -> int:
        before = {*tmp_path.iterdir()}
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda _: Usage(0))
            with pytest.raises(surgery.EnvironmentFault, match="bytes are needed") as caught:
                call()
            told = re.search(r"([\d,]+) bytes are needed", str(caught.value))
            assert told is not None
            count = int(told[1].replace(",", ""))
            patched.setattr(shutil, "disk_usage", lambda _: Usage(count - 1))
            with pytest.raises(surgery.EnvironmentFault, match="bytes are needed"):
                call()
            assert {*tmp_path.iterdir()} == before
            patched.setattr(shutil, "disk_usage", lambda _: Usage(count))
            call()
        return count

    return found


def size(*paths: Path) -> int:
    return sum(path.stat().st_size for path in paths)


def nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(one.nbytes for one in tensors.values())


def test_a_merge_asks_for_its_files_and_those_that_it_carries(
    tmp_path: Path, needed: Callable[[Callable[[], object]], int]
) -> None:
    base, adapter, out = llama_base(tmp_path / "base"), write_adapter(tmp_path / "adapter"), tmp_path / "out"
    (base / "notes.txt").write_bytes(b"x" * 5000)
    (adapter / "tokenizer.json").write_bytes(b"{}" * 700)
    count = needed(lambda: surgery.merge_checkpoint(base, adapter, out))
    assert count == size(*(out / name for name in ("model.safetensors", "config.json", "notes.txt", "tokenizer.json")))


def test_a_reversible_merge_asks_for_what_its_record_is_known_to_hold(
    tmp_path: Path, needed: Callable[[Callable[[], object]], int]
) -> None:
    tensors = factors() | {"lm_head.weight": torch.ones(11, 6)}  # of which the original is kept
    base, out = llama_base(tmp_path / "base"), tmp_path / "out"
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    count = needed(lambda: surgery.merge_checkpoint(base, adapter, out, reversible=True))
    weights = size(out / "model.safetensors", out / "config.json")
    assert count == weights + nbytes(factors()) + 11 * 6 * 2
    whole = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert count < whole  # none that has room is refused
    back = tmp_path / "back out"
    assert needed(lambda: surgery.unmerge_checkpoint(out, back)) == size(*back.iterdir())


@pytest.mark.parametrize("into", [None, "keep"])
def test_packed_weights_that_a_record_keeps_are_counted(
    tmp_path: Path, into: str | None, needed: Callable[[Callable[[], object]], int]
) -> None:
    base, out = quantized_base(tmp_path / "base", "int8"), tmp_path / "out"
    tensors = {}
    for site in SITES:
        rows, columns = SHAPES[site.rpartition(".")[2]]
        tensors |= {f"{site}.lora_A.weight": torch.ones(4, columns), f"{site}.lora_B.weight": torch.ones(rows, 4)}
    adapter = write_adapter(tmp_path / "adapter", tensors)
    options = {"reversible": True, "min_retained": 0.0, "max_noise": 1e9} if into else {"reversible": True}
    count = needed(lambda: surgery.merge_checkpoint(base, adapter, out, into=into, **options))
    kept = json.loads((out / "surgery.undo" / "record.json").read_text())["tensors"].values()
    assert sum(one["kept"][1] for one in kept) > 0
    weights = size(out / "model.safetensors") + (base / "config.json").stat().st_size
    assert count == weights + nbytes(tensors) + sum(one["kept"][1] for one in kept)


def test_a_run_that_goes_on_asks_for_what_is_still_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: Callable[[Callable[[], object]], int]
) -> None:
    """It lacks one file of two, and what the record keeps of that; the record's adapters are written at the end."""
    base, out = write_base(tmp_path / "base", base_tensors(torch.bfloat16), 2, {}), tmp_path / "out"
    tensors = factors() | {"lm_head.weight": torch.ones(11, 6)}
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    finish = Staging.finish

    def cut(*given: object) -> None:
        finish(*given)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    one_by_one = Options(reversible=True, pace=Pace(workers=1))
    with monkeypatch.context() as patched, Checkpoint(base) as source:
        patched.setattr(Staging, "finish", cut)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(source, [Weighted(read_adapter(adapter))], out, one_by_one)
    done = {path.name for path in (tmp_path / ".out.surgery-staging").glob("*.safetensors")}
    (lacking,) = [path for path in base.glob("*.safetensors") if path.name not in done]
    count = needed(lambda: surgery.merge_checkpoint(base, adapter, out, reversible=True))
    small = size(out / "config.json", base / "model.safetensors.index.json")
    head = 11 * 6 * 2 if "lm_head.weight" in load_file(lacking) else 0
    assert count == size(out / lacking.name) + small + nbytes(factors()) + head
