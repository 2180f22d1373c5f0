"""Adapters whose tensors fit weights of several sizes: what a plan says of them, and where it need not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_folders import write_base
from torch import nn

import surgery

TARGETS = {"target_modules": ["0", "2"]}
LOOSE: dict[str, Callable[[], surgery.AdapterConfig]] = {
    "OFT that shares its block": lambda: surgery.OFTConfig(oft_block_size=8, block_share=True, **TARGETS),
    "MiSS, mini": lambda: surgery.MissConfig(r=4, mini_r=4, init_weights="mini", **TARGETS),
}
TIGHT: dict[str, Callable[[], surgery.AdapterConfig]] = {
    "OFT of so many blocks": lambda: surgery.OFTConfig(r=4, oft_block_size=0, block_share=True, **TARGETS),
    "OFT": lambda: surgery.OFTConfig(oft_block_size=8, **TARGETS),
    "MiSS": lambda: surgery.MissConfig(r=4, **TARGETS),
    "LoRA": lambda: surgery.LoraConfig(r=4, **TARGETS),
    "trained biases": lambda: surgery.OFTConfig(oft_block_size=8, block_share=True, bias="all", **TARGETS),
}
TOLD = "its tensors fit weights of other sizes as well"


def net(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


def trained(config: surgery.AdapterConfig, folder: Path, *, told: bool = False) -> Path:
    """On a base of 32; with what tells it by its bytes, or as PEFT's files are, without."""
    surgery.save(surgery.inject(net(), config), folder)
    if not told:
        (folder / "surgery.base.json").unlink()
    return folder


def notes(base: Path, adapter: Path) -> list[str]:
    plan = surgery.plan(base, adapter)
    assert plan.ok
    return [note for note in plan.notes if TOLD in note]


@pytest.mark.parametrize("kind", LOOSE)
def test_a_plan_says_that_the_base_cannot_be_told(kind: str, tmp_path: Path) -> None:
    adapter = trained(LOOSE[kind](), tmp_path / "adapter")
    for width in (32, 64):
        base = write_base(tmp_path / f"base-{width}", net(width).state_dict())
        assert notes(base, adapter) == [f"{adapter}: {TOLD}, so that whether this is its base cannot be told"]


@pytest.mark.parametrize("kind", LOOSE)
def test_what_was_saved_with_its_base_is_told_from_another(kind: str, tmp_path: Path) -> None:
    own, wide = (write_base(tmp_path / f"base-{width}", net(width).state_dict()) for width in (32, 64))
    adapter = trained(LOOSE[kind](), tmp_path / "adapter", told=True)
    assert notes(own, adapter) == []
    told = r"trained on another base: 0\.weight was \[64, 32\] there, and here \[128, 64\]"
    with pytest.raises(surgery.InputError, match=told):
        surgery.merge_checkpoint(wide, adapter, tmp_path / "out")
    with pytest.raises(surgery.InputError, match=told):
        surgery.load(net(64), adapter)
    surgery.merge_checkpoint(own, adapter, tmp_path / "out")


@pytest.mark.parametrize("kind", TIGHT)
def test_nothing_is_said_where_a_tensor_tells_a_size_and_another_base_is_refused(kind: str, tmp_path: Path) -> None:
    own, wide = (write_base(tmp_path / f"base-{width}", net(width).state_dict()) for width in (32, 64))
    adapter = trained(TIGHT[kind](), tmp_path / "adapter")
    assert notes(own, adapter) == []
    assert not surgery.plan(wide, adapter).ok


def test_the_base_that_a_config_calls_by_name_is_told(tmp_path: Path) -> None:
    config = surgery.MissConfig(
        r=4, mini_r=4, init_weights="mini", base_model_name_or_path="owner/small", target_modules=["0"]
    )
    base = write_base(tmp_path / "base", net().state_dict())
    (note,) = notes(base, trained(config, tmp_path / "adapter"))
    assert "this is its base, which its config calls owner/small, cannot be told" in note
