"""Super-Tuning to peft and from it: outputs, gradients, files with their indices, and merges."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from both_ways import close, command_line_merges_and_takes_back, files_go_both_ways, gradients_agree
from pairs import (
    forward,
    judge_merge_of_peft,
    merge_for_transformers,
    merge_live_and_on_files,
    outputs,
    saved,
    trainable,
    trained,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import surgery
from surgery import ConfigError, FormatError, LoraConfig, MatchError, StateError, SupertuningConfig, ValueRangeError

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "the largest": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "the smallest, with a LoRA": (
        "llama",
        {"sparsity": 0.8, "select_top": False, "r": 4, "target_modules": ["q_proj", "down_proj"]},
    ),
    "with a LoRA": ("bert", {"sparsity": 0.5, "r": 3, "lora_alpha": 5.0, "target_modules": ["query", "output.dense"]}),
    "output head": ("llama", {"sparsity": 0.9, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "by default": ("bert", {"sparsity": 0.9, "r": 2, "lora_dropout": 0.1}),
}
FILE, TENSORS = "model.safetensors", "adapter_model.safetensors"
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def made(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL)) if kind == "bert" else LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith(
                "bias"
            ):  # which are made as zeros; the squares of a norm's outputs then add up to the same
                values.normal_(std=0.5)
    return model.to(dtype).eval()


def by_peft(model: nn.Module, fields: dict[str, Any]) -> nn.Module:
    return trained(peft.get_peft_model(copy.deepcopy(model), peft.SupertuningConfig(**copy.deepcopy(fields))), 1 / 8)


@each_case
def test_files_go_both_ways_with_equal_outputs_and_gradients(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    model = made(kind)
    theirs = by_peft(model, fields)
    ours = files_go_both_ways(model, theirs, outputs, tmp_path)
    assert {v.dtype for n, v in load_file(tmp_path / "ours" / TENSORS).items() if "indices" in n} == {torch.int32}
    for name, values in ours.named_parameters():
        values.requires_grad_("supertuning" in name or "modules_to_save" in name)
    gradients_agree(theirs, ours, forward)


@each_dtype
@each_case
def test_a_fresh_one_hits_the_same_modules_and_places_and_changes_nothing(case: str, dtype: torch.dtype) -> None:
    kind, fields = CASES[case]
    theirs = peft.get_peft_model(made(kind, dtype), peft.SupertuningConfig(**copy.deepcopy(fields)))
    ours = surgery.inject(made(kind, dtype), SupertuningConfig(**fields))
    assert trainable(ours) == trainable(theirs)
    found = ours.state_dict()
    for name, values in theirs.state_dict().items():
        if "indices" in name:
            assert torch.equal(found[name.removeprefix("base_model.model.")], values)
    assert torch.equal(outputs(ours), outputs(made(kind, dtype)))


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@each_dtype
@each_case
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    kind, fields = CASES[case]
    model = made(kind, dtype)
    judge_merge_of_peft(model, by_peft(model, fields), tmp_path, safe)


@each_dtype
@each_case
def test_live_and_streaming_merges_are_one_and_come_back(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    model = made(kind, dtype)
    by_peft(model, fields).save_pretrained(tmp_path / "adapter")
    base, ours = saved(model, tmp_path / "base"), surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    again, before = copy.deepcopy(ours), outputs(ours)
    changed = merge_live_and_on_files(base, tmp_path / "adapter", ours, tmp_path)
    report = surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert report.counts["bits"] == len(changed)
    assert close(outputs(surgery.merge(again)), before, 256)


def test_what_is_merged_here_loads_in_transformers_as_the_live_merge_to_the_bit(tmp_path: Path) -> None:
    model = made("llama")
    merge_for_transformers(model, by_peft(model, CASES["the largest"][1]), tmp_path, torch.float32)


def test_a_weight_of_an_adapter_adds_so_much_of_it_also_beside_lora(tmp_path: Path) -> None:
    model = made("llama").double()
    base = saved(model, tmp_path / "base")
    by_peft(model, {"sparsity": 0.9, "target_modules": ["q_proj"]}).save_pretrained(tmp_path / "sparse")
    surgery.save(
        trained(surgery.inject(copy.deepcopy(model), LoraConfig(r=2, target_modules=["v_proj"])), 1.0),
        tmp_path / "lora",
    )
    given = [(tmp_path / "sparse", -0.5), (tmp_path / "lora", 2.0)]
    surgery.merge_checkpoint(base, given, tmp_path / "out", reversible=True)
    assert surgery.verify_checkpoint(base, given, tmp_path / "out").counts["bits"] == 4
    name = "model.layers.0.self_attn.q_proj"
    p = load_file(tmp_path / "sparse" / TENSORS)
    v, at = (p[f"base_model.model.{name}.supertuning_{one}"] for one in ("values", "indices"))
    W, found = (load_file(tmp_path / one / FILE)[f"{name}.weight"].flatten() for one in ("base", "out"))
    assert torch.equal(found[at], W[at] - 0.5 * v)
    assert int((found != W).sum()) == len(at)
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()


@pytest.mark.parametrize("bad", [-1, 32 * 32, None], ids=["before", "beyond", "twice"])
def test_places_beyond_the_weight_or_twice_are_refused(bad: int | None, tmp_path: Path) -> None:
    model = made("llama")
    by_peft(model, {"target_modules": ["q_proj"]}).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    name = min(name for name in tensors if "indices" in name)
    tensors[name][1] = tensors[name][0] if bad is None else bad
    save_file(tensors, tmp_path / "adapter" / TENSORS)
    why = "an index twice" if bad is None else "indices beyond a weight of 1024 numbers"
    with pytest.raises(ValueRangeError, match=why):
        surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    with pytest.raises(ValueRangeError, match=why):
        surgery.merge_checkpoint(saved(model, tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")


def test_what_cannot_be_chosen_or_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MatchError, match=r"has 16 numbers; of a sparsity of 0\.99 nothing is left to train"):
        surgery.inject(nn.Sequential(nn.Linear(4, 4)), SupertuningConfig(target_modules=["0"]))
    with pytest.raises(StateError, match="it is on the meta device"):
        surgery.inject(nn.Sequential(nn.Linear(40, 40, device="meta")), SupertuningConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match="lora_alpha is 4, and r is null"):
        SupertuningConfig(lora_alpha=4)
    model = peft.get_peft_model(
        made("llama"), peft.SupertuningConfig(target_modules=["q_proj"], save_precomputed_indices=False)
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="save_precomputed_indices is false, and such files lack the places"):
        surgery.load(made("llama"), tmp_path)


def test_the_command_line_merges_and_takes_back(tmp_path: Path) -> None:
    model = made("bert")
    by_peft(model, CASES["with a LoRA"][1]).save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    command_line_merges_and_takes_back(tmp_path / "base", tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize("fields", [{}, {"r": 4}, {"r": 4, "lora_alpha": 5.5, "select_top": False}], ids=str)
def test_every_field_that_peft_writes_is_read_and_written_again(fields: dict[str, Any], tmp_path: Path) -> None:
    peft.SupertuningConfig(target_modules=["q"], **fields).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert SupertuningConfig.from_json(written).to_json() == written
    assert SupertuningConfig(target_modules=["q"], **fields).to_json() == written
