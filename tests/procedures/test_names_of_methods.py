"""One name for a method: as an adapter is inspected, planned and recorded."""

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_folders import write_base
from torch import nn

import surgery

LINEAR = {"target_modules": ["1"]}
NAMED: dict[str, tuple[Callable[[], surgery.AdapterConfig], set[str]]] = {
    "LoRA": (lambda: surgery.LoraConfig(r=2, **LINEAR), {"LoRA"}),
    "DoRA": (lambda: surgery.LoraConfig(r=2, use_dora=True, **LINEAR), {"DoRA"}),
    "lora_bias": (lambda: surgery.LoraConfig(r=2, lora_bias=True, **LINEAR), {"lora_bias"}),
    "BEFT": (lambda: surgery.BeftConfig(**LINEAR), {"BEFT"}),
    "trainable tokens": (
        lambda: surgery.TrainableTokensConfig(token_indices=[1], target_modules=["0"]),
        {"trainable tokens"},
    ),
    "trainable tokens beside LoRA": (
        lambda: surgery.LoraConfig(r=2, trainable_token_indices={"0": [1]}, **LINEAR),
        {"LoRA", "trainable tokens"},
    ),
    "LoRA that saves a module": (
        lambda: surgery.LoraConfig(r=2, modules_to_save=["2"], target_modules=["1"]),
        {"LoRA"},
    ),
}


@pytest.mark.parametrize("kind", NAMED)
def test_a_method_has_one_name_wherever_it_is_told(kind: str, tmp_path: Path) -> None:
    config, names = NAMED[kind]
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    base, adapter = write_base(tmp_path / "base", model.state_dict()), tmp_path / "adapter"
    surgery.save(surgery.inject(model, config()), adapter)
    told = surgery.inspect(adapter).adapter
    assert told is not None
    assert set(told.method) == names
    changes = surgery.plan(base, adapter).to_json()["changes"]
    assert {one["method"] for change in changes for one in change["methods"]} == names
    receipt = surgery.merge_checkpoint(base, adapter, tmp_path / "out").receipt
    assert {one["method"] for change in receipt["changed"].values() for one in change["methods"]} == names


def test_what_trains_modules_whole_has_a_name_too(tmp_path: Path) -> None:
    norm = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    surgery.save(surgery.inject(norm, surgery.LNTuningConfig(target_modules=["1"])), tmp_path / "norm")
    assert surgery.inspect(tmp_path / "norm").summary().startswith("adapter: LN tuning; ")
