"""DoRA to peft and from it: files, outputs, gradients and merges, within what float32 may round."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from pairs import each_merge, gradients, judge_merge_of_peft, merge_for_transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
SMALL |= {"initializer_range": 0.3}  # else an adapter would do little
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}
GPT2 |= {"initializer_range": 0.3, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
BERT = SMALL | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "bert": lambda: BertModel(BertConfig(**BERT)),
}
CASES = {
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3}),
    "patterns": ("llama", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "use_rslora": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "biases": ("bert", {"target_modules": ["query", "dense", "word_embeddings"]}),
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


def config(case: str, **fields: object) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "use_dora": True} | copy.deepcopy(CASES[case][1]) | fields)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None])[0].float()


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_(torch.randn_like(values) * values.float().std().clamp(min=0.3).to(values.dtype) / 2)
    return model.eval()


def by_peft(model: nn.Module, case: str, **fields: object) -> peft.PeftModel:
    return trained(peft.get_peft_model(copy.deepcopy(model), config(case, **fields)))


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Within what two orders of the same roundings may lead apart: per layer some 8 of them, of sums of up to 64
    terms, two layers of 7 linears deep; each counts as an eps of the largest output."""
    room = 2 * 7 * 8 * torch.finfo(dtype).eps * float(wanted.abs().max())
    return apart(found, wanted) <= room


@each_dtype
@each_case
def test_what_peft_saves_gives_its_outputs_here_and_back_again(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(case, dtype)
    before, theirs = outputs(model), by_peft(model, case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs")
    assert near(outputs(ours), outputs(theirs), dtype)
    assert apart(before, outputs(theirs)) > 4 * apart(outputs(ours), outputs(theirs))
    surgery.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    assert torch.equal(outputs(again), outputs(theirs))
    found, wanted = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert {name for name in wanted if "lora" in name} == {name for name in found if "lora" in name}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if "lora" in name)


@each_case
def test_a_fresh_one_has_the_tensors_of_peft_by_name_shape_and_magnitude(case: str) -> None:
    theirs = peft.get_peft_model(made(case), config(case))
    ours = surgery.inject(made(case), config(case))
    wanted = {n.removeprefix("base_model.model."): v for n, v in theirs.named_parameters() if v.requires_grad}
    found = {name: values for name, values in ours.named_parameters() if values.requires_grad}
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in wanted.items()}
    for name, values in found.items():
        if "magnitude" in name:  # a norm of at most 99 numbers, in float32 there
            bound = (99 / 2 + 2) * torch.finfo(torch.float32).eps * values
            assert bool(((values - wanted[name]).abs() <= bound).all())
    assert torch.equal(outputs(ours), outputs(made(case)))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@each_case
def test_gradients_are_those_of_peft(case: str, dropout: float, tmp_path: Path) -> None:
    # Not of the token that pads, 0: there peft gives an embedding's A none.
    model = made(case)
    theirs = by_peft(model, case, lora_dropout=dropout)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(model, tmp_path, trainable=True)
    found = []
    for one in (theirs, ours):
        torch.manual_seed(2)
        one.train(dropout > 0)
        one(torch.arange(1, 13)[None])[0].square().mean().backward()
        found.append(gradients(one))
    assert found[0].keys() == found[1].keys()
    assert all(near(found[1][name], found[0][name], torch.float32) for name in found[0])


@each_dtype
def test_several_give_the_outputs_of_peft_in_either_order(dtype: torch.dtype, tmp_path: Path) -> None:
    model = made("biases", dtype)
    theirs = peft.get_peft_model(copy.deepcopy(model), config("biases"))
    theirs.add_adapter("other", config("biases", r=2))
    theirs.add_adapter("plain", config("biases", use_dora=False, init_lora_weights=False))
    theirs.base_model.set_adapter(["default", "other", "plain"])
    trained(theirs).save_pretrained(tmp_path)
    ours = surgery.load(model, tmp_path)
    for name in ("other", "plain"):
        surgery.load(ours, tmp_path / name, adapter_name=name)
    seen = []
    for chosen in (["default", "other", "plain"], ["plain", "other", "default"]):
        theirs.base_model.set_adapter(chosen)
        surgery.set_adapter(ours, chosen)
        seen.append(outputs(ours))
        assert near(seen[-1], outputs(theirs), dtype)
    assert apart(*seen) > 4 * apart(seen[-1], outputs(theirs))


@each_merge(CASES, DTYPES)
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(case, dtype)
    if case == "embedding":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    judge_merge_of_peft(model, by_peft(model, case), tmp_path, safe)


@each_dtype
def test_adapters_that_stay_in_half_precision_merged_by_peft_pass_verify(dtype: torch.dtype, tmp_path: Path) -> None:
    model = made("llama", dtype)
    model.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(copy.deepcopy(model), config("llama"), autocast_adapter_dtype=False)
    trained(theirs).save_pretrained(tmp_path / "adapter")
    theirs.merge_and_unload().save_pretrained(tmp_path / "out")
    surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").require()


@each_dtype
@each_case
def test_what_is_merged_here_loads_in_transformers_as_the_live_merge_to_the_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(case, dtype)
    merge_for_transformers(model, by_peft(model, case), tmp_path, dtype)
