"""Adapters of stacked experts over files that hold a tensor for each expert: what cannot be told is refused."""

from pathlib import Path

import pytest
import torch
from checkpoint_folders import read_tensors, write_adapter, write_base
from torch import Tensor

import surgery

OWNER = "model.layers.0.mlp.experts"
SHAPES = {"gate_proj": (8, 12), "up_proj": (8, 12), "down_proj": (12, 8)}
TARGETS = {"r": 2, "target_modules": ["q_proj", "up_proj"], "target_parameters": ["experts.gate_up_proj"]}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def base(folder: Path, family: str = "qwen3_moe", shapes: dict[str, tuple[int, int]] = SHAPES) -> Path:
    held = {f"{OWNER}.{e}.{own}.weight": drawn(*shape) for e in range(3) for own, shape in shapes.items()}
    return write_base(folder, held, config={"model_type": family})


def stacked(inputs: int = 12, outputs: int = 16) -> dict[str, Tensor]:
    return {f"{OWNER}.lora_A.weight": drawn(6, inputs), f"{OWNER}.lora_B.weight": drawn(outputs, 6)}


def test_tensors_for_a_stack_and_for_a_part_of_it_are_refused(tmp_path: Path) -> None:
    single = {f"{OWNER}.1.up_proj.lora_A.weight": drawn(2, 12), f"{OWNER}.1.up_proj.lora_B.weight": drawn(8, 2)}
    for order in (stacked() | single, single | stacked()):
        adapter = write_adapter(tmp_path / f"adapter{len(list(tmp_path.iterdir()))}", order, **TARGETS)
        with pytest.raises(surgery.MatchError, match=r"experts\.1\.up_proj, and others for a parameter"):
            surgery.merge_checkpoint(base(tmp_path / f"base{adapter.name}"), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["my_private_moe", "gpt_oss_custom"])
def test_square_stacks_of_a_family_that_is_not_known_are_refused(family: str, tmp_path: Path) -> None:
    square = {"model.layers.0.mlp.experts.down_proj": drawn(3, 12, 12)}
    folder = write_base(tmp_path / "base", square, config={"model_type": family})
    targets = {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    adapter = write_adapter(tmp_path / "adapter", stacked(outputs=12), **targets)
    with pytest.raises(surgery.MatchError, match="its matrices are square"):
        surgery.merge_checkpoint(folder, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_that_memory_holds_as_a_stack_were_not_quantized_in_training(tmp_path: Path) -> None:
    """bitsandbytes takes linear layers alone, and a stack of experts is a parameter."""
    folder, adapter = base(tmp_path / "base"), write_adapter(tmp_path / "adapter", stacked(), **TARGETS)
    surgery.merge_checkpoint(folder, adapter, tmp_path / "plain")
    surgery.merge_checkpoint(folder, adapter, tmp_path / "as", base_as="nf4")
    found, wanted = read_tensors(tmp_path / "as"), read_tensors(tmp_path / "plain")
    assert all(torch.equal(found[name], values) for name, values in wanted.items())
