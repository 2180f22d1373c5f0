"""Every format, by the nearest codes and by feedback: kept with its scales, verified, and undone byte for byte."""

import math
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_folders import file_hashes, read_tensors, tensor_hashes, write_adapter, write_base

import surgery
from bench.formats import EXAMPLES, SITE, weight

EXPERTS = {"mxfp4"}  # held by tests/peers, in models of transformers: it is for stacks, which no linear layer has


@pytest.fixture(autouse=True)
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in a format are read and written without the library that it is of."""
    for name in ("bitsandbytes", "compressed_tensors", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in EXPERTS])
def test_a_merge_that_keeps_it_changes_codes_alone_and_is_undone(name: str, rounding: str, tmp_path: Path) -> None:
    example, size, drawn = EXAMPLES[name], 128, torch.Generator().manual_seed(0)
    packed = example.fresh(weight(size))
    base = write_base(
        tmp_path / "base",
        {SITE + example.codec.endings[role]: one for role, one in packed.tensors.items()},
        config={"model_type": "llama", "dtype": "bfloat16", "quantization_config": dict(example.config)},
    )
    factors = {f"{SITE}.lora_{one}.weight": torch.randn(4, size, generator=drawn) / 16 for one in "AB"}
    factors[f"{SITE}.lora_B.weight"] = factors[f"{SITE}.lora_B.weight"].T.contiguous()
    adapter, out = write_adapter(tmp_path / "adapter", factors), tmp_path / "out"
    options = {"into": "keep", "rounding": rounding, "min_retained": 0.0, "max_noise": math.inf}
    receipt = surgery.merge_checkpoint(base, adapter, out, reversible=True, **options).receipt
    before, after = (tensor_hashes(read_tensors(one)) for one in (base, out))
    codes = SITE + next(iter(example.codec.endings.values()))
    assert {one for one in before if before[one] != after[one]} == {codes}
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    report = surgery.verify_checkpoint(base, adapter, out)
    assert report.tensors[codes].grade == "bits"
    assert report.ok
    assert report.tensors[codes].survival.to_json().items() <= receipt["changed"][codes].items()
    surgery.unmerge_checkpoint(out, tmp_path / "back")
    assert file_hashes(tmp_path / "back") == file_hashes(base)
