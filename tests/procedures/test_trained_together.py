"""Adapters whose sites train one tensor together: refilled in place, copied, beside LoRA, in bfloat16."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.adapters.peft import read_adapter
from surgery.procedures.live.refill import refill

TARGETS: dict[str, Any] = {"target_modules": ["0", "2"]}
KINDS: dict[str, Any] = {
    "vblora": lambda: surgery.VBLoRAConfig(num_vectors=6, vector_length=4, **TARGETS),
    "unilora": lambda: surgery.UniLoraConfig(theta_d_length=20, save_indices=True, **TARGETS),
    "tinylora": lambda: surgery.TinyLoraConfig(u=5, init_weights="uniform", init_v_bound=1.0, **TARGETS),
}
SHARED = {"vblora": "vblora_vector_bank", "unilora": "unilora_theta_d", "tinylora": "tinylora_v"}
X = torch.linspace(-1, 1, 40).view(5, 8)
each_kind = pytest.mark.parametrize("kind", KINDS)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))


def injected(kind: str, seed: int) -> nn.Sequential:
    model = net()
    torch.manual_seed(seed)
    return surgery.inject(model, KINDS[kind]())


def shared(model: nn.Sequential, kind: str) -> list[Tensor]:
    return [getattr(model[at], SHARED[kind])["default"] for at in (0, 2)]


@each_kind
def test_another_takes_its_place_in_the_very_parameters(kind: str, tmp_path: Path) -> None:
    first, second = injected(kind, 1), injected(kind, 2)
    surgery.save(first, tmp_path)
    before = {name: id(values) for name, values in second.named_parameters()}
    assert not torch.equal(first(X), second(X))
    refill(second, read_adapter(tmp_path), "default")
    assert {name: id(values) for name, values in second.named_parameters()} == before
    assert torch.equal(second(X), first(X))


@each_kind
@pytest.mark.parametrize("move", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # our own bytes
def test_copies_share_one_of_their_own(kind: str, move: Any) -> None:
    model = injected(kind, 1)
    moved = move(model)
    one, other = shared(moved, kind)
    assert one is other
    assert one is not shared(model, kind)[0]
    assert one.requires_grad
    assert torch.equal(moved(X), model(X))


@each_kind
def test_it_is_merged_beside_lora_and_undone_to_the_bit(kind: str) -> None:
    model, original = injected(kind, 1), net().state_dict()
    lora = surgery.LoraConfig(r=2, init_lora_weights=False, **TARGETS)
    surgery.inject(model, lora, adapter_name="beside")
    surgery.set_adapter(model, ["default", "beside"])
    out = model(X)
    surgery.merge(model)
    # Two layers' sums of at most 14 terms, each rounded on both sides, and factors on a grid of 2^-21.
    bound = (2 * 2 * 14 * torch.finfo(torch.float32).eps + 4 * 2.0**-21) * 8
    assert float((model(X) - out).abs().max()) <= bound * float(out.abs().max())
    surgery.unmerge(model)
    assert torch.equal(model(X), out)
    back = surgery.eject(model).state_dict()
    assert all(torch.equal(back[name], values) for name, values in original.items())


@each_kind
def test_over_bfloat16_it_is_trained_in_float32(kind: str) -> None:
    model = surgery.inject(net().bfloat16(), KINDS[kind]())
    out = model(X.bfloat16())
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {values.dtype for values in model.parameters() if values.requires_grad} == {torch.float32}
    assert bool(shared(model, kind)[0].grad.any())
