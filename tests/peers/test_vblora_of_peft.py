"""VB-LoRA to peft and from it: outputs, gradients, both forms of files, merges."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from outcomes import called
from pairs import (
    FILE,
    gradients,
    judge_merge_of_peft,
    merge_for_transformers,
    merge_live_and_on_files,
    noise,
    outputs,
    saved,
    trained,
    within_noise,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.methods.vblora import VBLoRA, _largest, of_top_k

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
}
BANK = {"num_vectors": 20, "vector_length": 8}
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**BANK, **TARGETS}),
    "three of them": ("llama", {**BANK, **TARGETS, "topk": 3, "r": 5}),
    "one of them": ("llama", {**BANK, **TARGETS, "topk": 1, "save_only_topk_weights": True}),
    "top k": ("llama", {**BANK, **TARGETS, "save_only_topk_weights": True}),
    "top k of many": (
        "llama",
        {"num_vectors": 300, "vector_length": 16, "topk": 4, "save_only_topk_weights": True, **TARGETS},
    ),
    "gpt2": ("gpt2", {**BANK, "target_modules": ["c_attn", "mlp.c_fc"], "fan_in_fan_out": True}),
    "gpt2, top k": (
        "gpt2",
        {**BANK, "target_modules": ["c_attn"], "fan_in_fan_out": True, "save_only_topk_weights": True},
    ),
    "biases": ("llama", {**BANK, "target_modules": ["q_proj"], "bias": "vblora_only"}),
    "output head": ("llama", {**BANK, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}
DTYPES = (torch.float32, torch.bfloat16)
EPS = torch.finfo(torch.float32).eps
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[CASES[case][0]]().to(dtype).eval()


def config(case: str) -> peft.VBLoRAConfig:
    return peft.VBLoRAConfig(**copy.deepcopy(CASES[case][1]))


def by_peft(model: nn.Module, case: str) -> Any:
    return trained(peft.get_peft_model(copy.deepcopy(model), config(case)), 1)


def files(case: str) -> bool:
    """Do its files hold logits?"""
    return not CASES[case][1].get("save_only_topk_weights")


@each_dtype
@each_case
def test_what_peft_saves_gives_equal_outputs_here_and_back_again(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(case, dtype)
    before, theirs = outputs(model), by_peft(model, case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs")
    assert within_noise(outputs(ours), outputs(theirs), noise(theirs))
    assert not torch.equal(outputs(ours), before)
    surgery.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    wanted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs").eval()
    assert torch.equal(outputs(again), outputs(wanted))
    found, held = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert found.keys() == held.keys()
    assert all(found[name].dtype == held[name].dtype and torch.equal(found[name], held[name]) for name in held)
    assert any(name.endswith("vblora_logits_A") for name in held) == files(case)


@each_case
def test_gradients_are_those_of_peft_within_the_rounding_of_a_sum(case: str) -> None:
    model = made(case)
    theirs, found = by_peft(model, case), []
    ours = surgery.inject(model, config(case))
    held = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, values in ours.named_parameters():
            if values.requires_grad:
                values.copy_(held[f"base_model.model.{name}"])
    assert within_noise(outputs(ours), outputs(theirs), noise(theirs))
    for one in (theirs, ours):
        one(torch.arange(12)[None])[0].square().sum().backward()
        found.append(gradients(one))
    assert found[0].keys() == found[1].keys()
    for name, wanted in found[0].items():
        # Of some 20 layers an ulp each, which a gradient is made of twice, and sums over 12 tokens.
        assert float((found[1][name] - wanted).abs().max()) <= 40 * 12 * EPS * float(wanted.abs().max()), name
        assert bool(wanted.any()) or case == "one of them"  # whose weight is 1 whatever its logit


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.VBLoRAConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert surgery.VBLoRAConfig().to_json() == written
    assert surgery.VBLoRAConfig.from_json(written) == surgery.VBLoRAConfig()


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@each_dtype
@pytest.mark.parametrize("case", [name for name in CASES if name != "biases"])  # which its merge leaves trained
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(case, dtype)
    judge_merge_of_peft(model, by_peft(model, case), tmp_path, safe)


def test_what_peft_makes_of_a_file_without_logits_passes_verify(tmp_path: Path) -> None:
    model = made("top k of many")
    by_peft(model, "top k of many").save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    read = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")  # of logarithms of the weights
    read.merge_and_unload().save_pretrained(tmp_path / "out")
    surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").require()


@each_dtype
@each_case
def test_a_merge_is_the_same_live_and_on_files_and_is_undone_to_the_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(case, dtype)
    by_peft(model, case).save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    read = type(model).from_pretrained(tmp_path / "base", dtype=dtype).eval()
    ours = surgery.load(read, tmp_path / "adapter")
    if CASES[case][0] == "llama" and case not in {"biases", "output head"}:
        assert merge_live_and_on_files(tmp_path / "base", tmp_path / "adapter", ours, tmp_path)
        return
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", reversible=True)
    surgery.unmerge_checkpoint(tmp_path / "merged", tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt2, top k"])
def test_what_is_merged_here_loads_in_transformers_as_the_live_merge_to_the_bit(case: str, tmp_path: Path) -> None:
    model = made(case)
    merge_for_transformers(model, by_peft(model, case), tmp_path, torch.float32)


def test_one_whose_files_are_to_have_no_logits_is_trained_before_it_is_saved_and_not_after(tmp_path: Path) -> None:
    model = made("top k")
    ours = surgery.inject(copy.deepcopy(model), config("top k"))
    ours(torch.arange(12)[None])[0].square().sum().backward()
    assert all(values.grad is not None for values in ours.parameters() if values.requires_grad)
    surgery.save(trained(ours, 1 / 2), tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert {values.dtype for name, values in held.items() if name.endswith("indices")} == {torch.uint8}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert within_noise(outputs(ours), outputs(theirs), noise(theirs))
    again = surgery.load(copy.deepcopy(model), tmp_path)
    assert not [name for name, values in again.named_parameters() if values.requires_grad]
    with pytest.raises(surgery.ConfigError, match="the file has no logits, so that it is merged and run"):
        surgery.load(copy.deepcopy(model), tmp_path, trainable=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("top_k", [False, True], ids=["logits", "top k"])
def test_of_tensors_in_16_bits_a_merge_passes_verify_and_one_at_nine_tenths_does_not(
    top_k: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """peft's own, which makes float32 of them on a CPU, and all of it in their dtype, as elsewhere."""
    torch.manual_seed(0)
    model, fields = nn.Sequential(nn.Linear(512, 768, bias=False)), {"target_modules": ["0"]}
    nn.init.zeros_(model[0].weight)  # so that no rounding of the outcome hides another
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.VBLoRAConfig(**fields, save_only_topk_weights=top_k))
    theirs.to(dtype).save_pretrained(tmp_path / "adapter")
    torch.set_default_dtype(dtype)  # in which peft makes logits of weights, and reads no others
    try:
        read = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter", autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(torch.float32)
    layer = read.to(dtype).base_model.model[0]
    with torch.no_grad():
        A, B = layer._get_lora_matrices("default")
        deltas = [layer.get_delta_weight("default"), B @ A]
    assert [one.dtype for one in deltas] == [torch.float32, dtype]
    saved(model, tmp_path / "base")
    for at, delta in enumerate(deltas):
        for strength, grade in {1.0: "rounding", 0.9: "different"}.items():
            (tmp_path / f"{at} {strength}").mkdir()
            save_file({"0.weight": strength * delta.float()}, tmp_path / f"{at} {strength}" / FILE)
            found = surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / f"{at} {strength}")
            assert found.tensors["0.weight"].grade == grade


def test_of_equal_logits_the_first_count_on_any_machine() -> None:
    logits = torch.zeros(2, 3, 300)
    logits[..., ::2] = -0.0
    logits[0, 0, [7, 299]] = 1.0
    found = _largest(logits.bfloat16(), 3)
    assert found[0, 0].tolist() == [7, 299, 0]
    assert bool((found.flatten(0, 1)[1:] == torch.arange(3)).all())
    different = torch.randperm(300).float()
    assert torch.equal(_largest(different, 9), different.topk(9).indices)
    ours = VBLoRA(scaling=1.0, r=2, topk=3, num_vectors=300, vector_length=4)
    assert torch.equal(ours.exact_mix({"logits_A": logits}, "A")[0], found)
    assert torch.equal(of_top_k({"logits_A": logits, "logits_B": logits}, 3)["at_B"], found)


def test_indices_beyond_the_bank_are_refused(tmp_path: Path) -> None:
    by_peft(made("top k"), "top k").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    name = next(name for name in held if name.endswith("A_topk_indices"))
    held[name][0, 0, 0] = 20
    save_file(held, file)
    with pytest.raises(surgery.ValueRangeError, match="A_topk_indices holds indices beyond a bank of 20 vectors"):
        surgery.load(made("top k"), tmp_path)


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(surgery.ConfigError, match="topk is 3, and num_vectors 2; choose no more than there are"):
        surgery.VBLoRAConfig(topk=3, num_vectors=2)
    with pytest.raises(surgery.MatchError, match="vector_length is 12, of which its 32 inputs and 32 outputs are no"):
        surgery.inject(made("llama"), surgery.VBLoRAConfig(vector_length=12, target_modules=["q_proj"]))


def test_the_bank_is_one_parameter_that_the_layers_train_together() -> None:
    model = surgery.inject(made("llama"), config("llama"))
    banks = [values for name, values in model.named_parameters(remove_duplicate=False) if "vector_bank" in name]
    assert len(banks) == 6
    assert len({id(one) for one in banks}) == 1
    assert banks[0].requires_grad
    surgery.inject(model, surgery.VBLoRAConfig(**BANK, target_modules=["k_proj"]), adapter_name="other")
    surgery.set_adapter(model, "other")
    other = model.model.layers[0].self_attn.k_proj.vblora_vector_bank["other"]
    assert other is not banks[0]
    assert other.shape == banks[0].shape


def test_the_command_line_takes_it_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made("top k")
    model.save_pretrained(tmp_path / "base")
    by_peft(model, "top k").save_pretrained(tmp_path / "adapter")
    base, adapter, out, back = (str(tmp_path / name) for name in ("base", "adapter", "out", "back"))
    lines = [
        ["inspect", adapter],
        ["plan", base, f"{adapter}=0.5"],
        ["merge", base, f"{adapter}=0.5", out, "--reversible"],
        ["verify", base, f"{adapter}=0.5", out],
        ["unmerge", out, back],
    ]
    found = [called(capsys, *line) for line in lines]
    assert [one.code for one in found] == [0] * len(lines)
    assert "VB-LoRA" in found[0].out + found[0].err
    assert (tmp_path / "back" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()
