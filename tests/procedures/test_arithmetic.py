"""arithmetic "peft": told in the receipt, where verify finds it; refused by name where PEFT's bits are not known."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_folders import base_tensors, write_adapter, write_base
from torch import nn

import surgery
from surgery.adapters.peft import open_adapter
from surgery.core.adapter import Weighted
from surgery.hosts.checkpoint import Checkpoint
from surgery.io.octets import sha256_of
from surgery.procedures.planning.treatment import Treatment
from surgery.procedures.writing.filling import Pace
from surgery.procedures.writing.merge_checkpoint import Options, merge_checkpoint

# In float32 PEFT's product is rounded otherwise than an exact one; in bfloat16 only a safe merge rounds twice.
UNLIKE = [("peft", torch.float32), ("peft-safe", torch.bfloat16)]
each_arithmetic = pytest.mark.parametrize("arithmetic", ["peft", "peft-safe"])
EXACT = "exact"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", base_tensors(torch.bfloat16))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def counts(base: Path, adapter: Path, out: Path, arithmetic: str | None = None) -> dict[str, int]:
    return surgery.verify_checkpoint(base, adapter, out, arithmetic=arithmetic).counts


@pytest.mark.parametrize(("arithmetic", "dtype"), UNLIKE, ids=str)
def test_verify_derives_a_merge_by_the_arithmetic_of_its_receipt_unless_told_another(
    arithmetic: str, dtype: torch.dtype, adapter: Path, tmp_path: Path
) -> None:
    base, out = write_base(tmp_path / "base", base_tensors(dtype)), tmp_path / "out"
    report = surgery.merge_checkpoint(base, adapter, out, arithmetic=arithmetic)
    assert report.receipt["options"]["arithmetic"] == arithmetic
    assert counts(base, adapter, out)["bits"] == 4
    assert counts(base, adapter, out, EXACT)["rounding"] > 0
    (out / "surgery.receipt.json").unlink()
    assert counts(base, adapter, out)["rounding"] > 0
    assert counts(base, adapter, out, arithmetic)["bits"] == 4


@each_arithmetic
def test_a_damaged_tensor_is_different_by_that_arithmetic_too(
    arithmetic: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    surgery.merge_checkpoint(base, adapter, out, arithmetic=arithmetic)
    surgery.merge_checkpoint(base, [(adapter, 2.0)], other, arithmetic=arithmetic)
    assert surgery.verify_checkpoint(base, adapter, out).ok
    assert counts(base, adapter, other)["different"] == 4


@each_arithmetic
def test_small_tiles_and_many_workers_give_the_same_bytes(
    arithmetic: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    with Checkpoint(base) as source:
        options = Options(Treatment.of(arithmetic=arithmetic))
        for tile_elements in (7, 1 << 18):
            given = replace(options, pace=Pace(tile_elements=tile_elements, workers=3))
            out = tmp_path / f"{tile_elements}"
            merge_checkpoint(source, [Weighted(open_adapter(adapter))], out, given)
    files = [tmp_path / name / "model.safetensors" for name in ("7", f"{1 << 18}")]
    assert files[0].read_bytes() == files[1].read_bytes()


DORA = surgery.LoraConfig(r=2, target_modules=["0"], use_dora=True)
IA3 = surgery.IA3Config(target_modules=["0"], feedforward_modules=[])


@pytest.mark.parametrize(("config", "weight", "named"), [(DORA, 1.0, "DoRA"), (IA3, 0.5, "at another weight than 1")])
def test_a_merge_that_peft_has_not_or_that_is_not_known_to_the_bit_is_refused_by_name(
    config: surgery.LoraConfig | surgery.IA3Config, weight: float, named: str, tmp_path: Path
) -> None:
    model = surgery.inject(nn.Sequential(nn.Linear(6, 6)), config)
    held = model[0].base_layer.weight
    surgery.save(model, tmp_path / "adapter")
    base = write_base(tmp_path / "base", {"0.weight": held.detach()})
    with pytest.raises(surgery.ConfigError, match=named):
        surgery.merge_checkpoint(base, [(tmp_path / "adapter", weight)], tmp_path / "out", arithmetic="peft")
    assert not (tmp_path / "out").exists()
    before = sha256_of(held)
    if weight == 1:
        with pytest.raises(surgery.ConfigError, match=named):
            surgery.merge(model, arithmetic="peft")
    assert sha256_of(held) == before


def test_an_arithmetic_that_is_not_known_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(surgery.UsageError, match="one of exact, peft, peft-safe is wanted"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", arithmetic="fast")
