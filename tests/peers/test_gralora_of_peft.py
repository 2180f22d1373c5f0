"""GraLoRA to peft and from it: outputs, gradients, files and merges."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from both_ways import close, command_line_merges_and_takes_back, files_go_both_ways, gradients_agree
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
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.core.arithmetic import exact_product
from surgery.core.op import WHOLE

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {"target_modules": ["q_proj", "down_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"gralora_dropout": 0.1},
    "hybrid": LLAMA | {"hybrid_r": 3, "gralora_k": 4, "alpha": 11},
    "one block": LLAMA | {"gralora_k": 1, "init_weights": False},
    "biases": LLAMA | {"bias": "gralora_only"},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "hybrid_r": 2},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    llama = LlamaConfig(**SMALL, attention_bias=True)
    model = GPT2LMHeadModel(GPT2Config(**GPT2)) if case == "gpt2" else LlamaForCausalLM(llama)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("bias"):  # which are made as zeros
                values.normal_(std=0.1)
    return model.to(dtype).eval()


def config(case: str) -> peft.GraloraConfig:
    return peft.GraloraConfig(r=8, **copy.deepcopy(CASES[case]))


def by_peft(model: nn.Module, case: str) -> peft.PeftModel:
    return trained(peft.get_peft_model(copy.deepcopy(model), config(case)), 1 / 8)


@each_case
def test_files_go_both_ways_with_equal_outputs_and_gradients(case: str, tmp_path: Path) -> None:
    model = made(case)
    theirs = by_peft(model, case)
    files_go_both_ways(model, theirs, outputs, tmp_path)
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs", trainable=True)
    gradients_agree(theirs, ours, forward)


@each_case
def test_a_config_hits_the_same_modules_with_the_same_shapes_as_in_peft(case: str) -> None:
    wanted, found = (
        trainable(peft.get_peft_model(made(case), config(case))),
        trainable(surgery.inject(made(case), config(case))),
    )
    own = {name for name in wanted if "gralora_" in name}  # biases are held beside the base's own here
    assert {name: found[name] for name in own} == {name: wanted[name] for name in own}
    assert len(found) == len(wanted)


@pytest.mark.parametrize("case", ["llama", "hybrid", "gpt2"])
def test_the_delta_is_that_of_peft_to_its_last_bits_wherever_a_tile_cuts_the_blocks(case: str, tmp_path: Path) -> None:
    model = made(case)
    theirs = by_peft(model, case)
    theirs.save_pretrained(tmp_path)
    ours, name = (
        surgery.load(model, tmp_path),
        "transformer.h.0.attn.c_attn" if case == "gpt2" else ("model.layers.0.mlp.down_proj"),
    )
    layer = ours.get_submodule(name)
    fitted, stored = layer.fitted["default"], theirs.base_model.model.get_submodule(name).get_delta_weight("default")
    p, wanted = fitted.method.matrices(fitted.params, layer.site), layer.op.matrix(stored.detach().double())
    whole = fitted.method.delta(p, WHOLE, exact_product)
    assert bool(((whole - wanted).abs() <= fitted.method.spread(p, WHOLE)).all())
    for tile in ((slice(3, 29), slice(None)), (slice(None), slice(15, 17)), (slice(8, 16), slice(1, 31))):
        assert torch.equal(fitted.method.delta(p, tile, exact_product), whole[tile])


def test_inputs_of_any_number_of_axes_are_taken_where_peft_takes_two_or_three(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12))
    theirs = trained(peft.get_peft_model(copy.deepcopy(model), peft.GraloraConfig(r=4, target_modules=["0"])), 1 / 4)
    theirs.save_pretrained(tmp_path)
    ours, x = surgery.load(model, tmp_path), torch.randn(2, 3, 5, 8)
    with pytest.raises(ValueError, match="unpack"):
        theirs(x)
    assert close(ours(x).detach(), torch.stack([theirs(one) for one in x]).detach())
    assert close(ours(x[0, 0, 0]).detach(), theirs(x[0, 0])[0].detach())


def test_what_cannot_be_cut_into_blocks_is_refused_by_name() -> None:
    with pytest.raises(surgery.ConfigError, match="r is 6; it must be a multiple of gralora_k, 4"):
        surgery.GraloraConfig(r=6, gralora_k=4)
    with pytest.raises(surgery.MatchError, match=r"^0: \[12, 9\], which cannot be cut into 2 blocks"):
        surgery.inject(nn.Sequential(nn.Linear(9, 12)), surgery.GraloraConfig(target_modules=["0"]))


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.GraloraConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert surgery.GraloraConfig().to_json() == written
    assert surgery.GraloraConfig.from_json(written) == surgery.GraloraConfig()


@each_merge(["hybrid", "biases", "gpt2"], DTYPES)
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(case, dtype)
    judge_merge_of_peft(model, by_peft(model, case), tmp_path, safe)


@each_dtype
@pytest.mark.parametrize("case", ["hybrid", "gpt2"])
def test_what_is_merged_here_loads_in_transformers_as_the_live_merge_to_the_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(case, dtype)
    merge_for_transformers(model, by_peft(model, case), tmp_path, dtype)


def test_live_and_streaming_merges_are_one_and_the_command_line_takes_it_back(tmp_path: Path) -> None:
    model = made("hybrid")
    by_peft(model, "hybrid").save_pretrained(tmp_path / "adapter")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    changed = merge_live_and_on_files(saved(model, tmp_path / "base"), tmp_path / "adapter", ours, tmp_path)
    assert len(changed) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) // 4
    model.save_pretrained(tmp_path / "whole")
    command_line_merges_and_takes_back(tmp_path / "whole", tmp_path / "adapter", tmp_path)
