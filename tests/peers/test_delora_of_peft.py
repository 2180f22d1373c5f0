"""DeLoRA to peft and from it: outputs, gradients, files and merges."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from both_ways import command_line_merges_and_takes_back, files_go_both_ways, gradients_agree
from pairs import (
    each_merge,
    forward,
    judge_merge_of_peft,
    merge_for_transformers,
    merge_live_and_on_files,
    outputs,
    saved,
    trainable,
    trained,
)
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "plain": TARGETS | {"rank_pattern": {"q_proj": 3}, "lambda_pattern": {"down_proj": 2}, "module_dropout": 0.1},
    "both begin": TARGETS | {"init_weights": False},
    "biases": TARGETS | {"bias": "delora_only"},
    "output head": TARGETS | {"modules_to_save": ["lm_head"]},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True))
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.normal_() if name.endswith("bias") else values.mul_(4)
    return model.to(dtype).eval()


def config(case: str) -> peft.DeloraConfig:
    return peft.DeloraConfig(r=4, **copy.deepcopy(CASES[case]))


def by_peft(model: nn.Module, case: str) -> peft.PeftModel:
    return trained(peft.get_peft_model(copy.deepcopy(model), config(case)), 1 / 4)


@each_case
def test_files_go_both_ways_with_equal_outputs_and_gradients(case: str, tmp_path: Path) -> None:
    model = made()
    theirs = by_peft(model, case)
    files_go_both_ways(model, theirs, outputs, tmp_path)
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs", trainable=True)
    gradients_agree(theirs, ours, forward)


@each_case
def test_a_config_hits_the_same_modules_with_the_same_tensors_as_in_peft(case: str) -> None:
    theirs = peft.get_peft_model(made(), config(case))
    ours = surgery.inject(made(), config(case))
    if case != "biases":  # which are held beside the base's own here
        assert trainable(ours) == trainable(theirs)
    kept = {name.removeprefix("base_model.model."): held for name, held in theirs.named_buffers() if "w_norm" in name}
    found = {name: held for name, held in ours.named_buffers() if "w_norm" in name}
    assert found.keys() == kept.keys()
    for name, wanted in kept.items():
        # A sum of 64 squares or fewer in any order, halved by the root, and two roundings.
        assert torch.allclose(found[name], wanted, rtol=(64 / 2 + 2) * torch.finfo(torch.float32).eps, atol=0)


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.DeloraConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert surgery.DeloraConfig().to_json() == written
    assert surgery.DeloraConfig.from_json(written) == surgery.DeloraConfig()


@each_merge(["plain", "biases", "output head"], DTYPES)
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(dtype)
    judge_merge_of_peft(model, by_peft(model, case), tmp_path, safe)


@each_dtype
@pytest.mark.parametrize("case", ["plain", "biases"])
def test_what_is_merged_here_loads_in_transformers_as_the_live_merge_to_the_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(dtype)
    merge_for_transformers(model, by_peft(model, case), tmp_path, dtype)


def test_live_and_streaming_merges_are_one_and_the_command_line_takes_it_back(tmp_path: Path) -> None:
    model = made()
    by_peft(model, "plain").save_pretrained(tmp_path / "adapter")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    changed = merge_live_and_on_files(saved(model, tmp_path / "base"), tmp_path / "adapter", ours, tmp_path)
    assert len(changed) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) // 4
    model.save_pretrained(tmp_path / "whole")
    command_line_merges_and_takes_back(tmp_path / "whole", tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_over_a_base_of_half_precision_outputs_are_those_of_peft(dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(dtype)
    theirs = by_peft(model, "plain")
    theirs.save_pretrained(tmp_path)
    ours, wide = surgery.load(copy.deepcopy(model), tmp_path), surgery.load(copy.deepcopy(model).float(), tmp_path)
    exact = outputs(wide)
    # Of two layers with some eight products each, each rounded to the base's dtype.
    room = 4 * 2 * 8 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert outputs(ours).dtype == outputs(theirs).dtype == dtype
    for one in (ours, theirs):
        assert float((outputs(one).float() - exact).abs().max()) <= room
    assert float((outputs(model).float() - exact).abs().max()) > room  # else it could not fail


def test_factors_smaller_than_what_a_norm_counts_as_are_not_blown_up() -> None:
    model = surgery.inject(nn.Sequential(nn.Linear(8, 6)), surgery.DeloraConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        p = model[0].fitted["default"].params
        p["A"].fill_(2.0**-20)
        p["B"].fill_(2.0**-20)
    W = model[0].base_layer.weight.detach().clone()
    x = torch.randn(3, 8)
    before = model(x).detach()
    surgery.merge(model)
    # Two products of 2^-40, by lambda / r over 1e-4 squared, by the norm of an input, summed in float64.
    wanted = W.double() + 2 * 2.0**-40 * (15 / 2 / 1e-8) * W.double().square().sum(0).sqrt()
    eps = torch.finfo(torch.float32).eps
    assert float((model[0].weight.double() - wanted).abs().max()) <= 8 * eps * float(wanted.abs().max())
    assert float((model(x) - before).abs().max()) <= 16 * 8 * eps * float(before.abs().max())


def test_a_weight_that_is_not_there_yet_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(surgery.StateError, match=r"^0: .* DeLoRA keeps the norms of its weight"):
        surgery.inject(model, surgery.DeloraConfig(target_modules=["0"]))
