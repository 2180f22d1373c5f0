"""IA3 to peft and from it: outputs, gradients, files and merges."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from pairs import each_merge, gradients, judge_merge_of_peft, merge_for_transformers, outputs, trainable, trained
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "bert": lambda: BertModel(BertConfig(**SMALL)),
}
LLAMA = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
CASES = {
    "llama": ("llama", LLAMA),
    "biases": ("llama with biases", LLAMA),
    "patterns": ("llama", {"target_modules": r".*\.(k|down)_proj", "feedforward_modules": r".*down_proj"}),
    "gpt2": (
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "bert": ("bert", {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]}),
    "output head": ("llama", LLAMA | {"modules_to_save": ["lm_head"]}),
    "no feedforward": ("bert", {"target_modules": ["query"], "feedforward_modules": []}),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILE = "model.safetensors"
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[CASES[case][0]]().to(dtype).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("bias"):  # which are made as zeros
                values.normal_(std=0.1)
    return model


def config(case: str) -> peft.IA3Config:
    return peft.IA3Config(**copy.deepcopy(CASES[case][1]))


def by_peft(model: nn.Module, case: str) -> peft.PeftModel:
    """Some factors are negative."""
    return trained(peft.get_peft_model(copy.deepcopy(model), config(case)), 1 / 2)


@each_dtype
@each_case
def test_what_peft_saves_gives_equal_outputs_here_and_back_again(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(case, dtype)
    before, theirs = outputs(model), by_peft(model, case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs")
    assert torch.equal(outputs(ours), outputs(theirs))
    assert not torch.equal(outputs(ours), before)
    surgery.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    assert torch.equal(outputs(again), outputs(theirs))
    found, wanted = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if "ia3_l" in name)


@each_case
def test_a_config_hits_the_same_modules_with_the_same_shapes_as_in_peft(case: str) -> None:
    wanted = trainable(peft.get_peft_model(made(case), config(case)))
    assert trainable(surgery.inject(made(case), config(case))) == wanted


@each_dtype
@each_case
def test_gradients_are_those_of_peft_to_the_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(case, dtype)
    theirs = by_peft(model, case)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(model, tmp_path, trainable=True)
    found = []
    for one in (theirs, ours):
        one(torch.arange(12)[None])[0].float().square().sum().backward()
        found.append(gradients(one))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(bool(values.any()) for values in found[0].values())


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.IA3Config().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert surgery.IA3Config().to_json() == written
    assert surgery.IA3Config.from_json(written) == surgery.IA3Config()


@pytest.mark.parametrize("entry", ["down_proj", "proj"])
def test_a_list_of_feedforward_modules_names_ends_of_names_as_in_peft(entry: str) -> None:
    fields = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": [entry]}
    if entry == "proj":  # peft asks for a subset of target_modules
        fields["target_modules"] = ["k_proj", "down_proj", "proj"]
    theirs = peft.get_peft_model(made("llama"), peft.IA3Config(**fields))
    wanted = {name.removeprefix("base_model.model."): v.shape for name, v in theirs.named_parameters() if "ia3" in name}
    ours = surgery.inject(
        made("llama"), surgery.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[entry])
    )
    assert {name: v.shape for name, v in ours.named_parameters() if "ia3" in name} == wanted


@each_merge(CASES, DTYPES)
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(case, dtype)
    judge_merge_of_peft(model, by_peft(model, case), tmp_path, safe)


def test_two_adapters_merged_by_peft_pass_verify_in_either_order_and_one_alone_does_not(tmp_path: Path) -> None:
    model = made("biases")
    model.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(copy.deepcopy(model), config("biases"))
    theirs.add_adapter("other", config("biases"))
    with torch.no_grad():
        for name, values in theirs.named_parameters():
            if "ia3_l" in name:
                values.add_(torch.randn_like(values) / 2)
    theirs.save_pretrained(tmp_path)
    theirs.merge_and_unload(adapter_names=["default", "other"]).save_pretrained(tmp_path / "out")
    both = [tmp_path, tmp_path / "other"]
    assert surgery.verify_checkpoint(tmp_path / "base", both, tmp_path / "out").ok
    assert not surgery.verify_checkpoint(tmp_path / "base", both[:1], tmp_path / "out").ok
    assert not surgery.verify_checkpoint(tmp_path / "base", [both[0], (both[1], 0.5)], tmp_path / "out").ok


@each_dtype
@each_case
def test_what_is_merged_here_loads_in_transformers_as_the_live_merge_to_the_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(case, dtype)
    merge_for_transformers(model, by_peft(model, case), tmp_path, dtype)
