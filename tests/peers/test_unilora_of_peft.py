"""Uni-LoRA to peft and from it: places and scales, outputs, gradients, both forms of files, merges."""

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
    trained,
    within_noise,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
}
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**TARGETS, "theta_d_length": 50}),
    "all of it": ("llama", {"target_modules": "all-linear", "r": 3, "proj_seed": 5}),
    "more numbers than places": ("llama", {"target_modules": ["q_proj"], "theta_d_length": 2000, "r": 2}),
    "saved": ("llama", {**TARGETS, "save_indices": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "mlp.c_fc"], "fan_in_fan_out": True}),
    "gpt2, saved": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "save_indices": True}),
    "biases": ("llama", {"target_modules": ["q_proj"], "bias": "unilora_only", "save_indices": True}),
    "output head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "save_indices": True}),
}
SAVED = [name for name, (_, fields) in CASES.items() if fields.get("save_indices")]
DTYPES = (torch.float32, torch.bfloat16)
EPS = torch.finfo(torch.float32).eps
each_case = pytest.mark.parametrize("case", CASES)
pytestmark = pytest.mark.filterwarnings("ignore:.*dealt over the model's modules")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[CASES[case][0]]().to(dtype).eval()


def config(case: str) -> peft.UniLoraConfig:
    return peft.UniLoraConfig(**copy.deepcopy(CASES[case][1]))


def by_peft(model: nn.Module, case: str) -> Any:
    return trained(peft.get_peft_model(copy.deepcopy(model), config(case)), 1)


@each_dtype
@each_case
def test_a_fresh_one_has_the_places_and_scales_of_peft(case: str, dtype: torch.dtype) -> None:
    model = made(case, dtype)
    theirs = peft.get_peft_model(copy.deepcopy(model), config(case))
    ours = surgery.inject(model, config(case))
    places = [name for name, _ in ours.named_buffers() if "unilora_" in name]
    assert len(places) % 4 == 0
    for name in places:
        path, _, _ = name.rpartition(".")
        wanted = theirs.base_model.model.get_submodule(path)["default"]
        found = ours.get_buffer(name)
        assert torch.equal(found.to(wanted.dtype), wanted)  # peft holds scales in the base's dtype
    assert any("unilora_indices_A" in name for name in places)


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
    assert torch.equal(outputs(again), outputs(theirs))
    found, held = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert found.keys() == held.keys()
    assert all(found[name].dtype == held[name].dtype and torch.equal(found[name], held[name]) for name in held)
    assert any(name.endswith("unilora_indices_A") for name in held) == (case in SAVED)


@each_case
def test_gradients_are_those_of_peft_within_the_rounding_of_a_sum(case: str, tmp_path: Path) -> None:
    model = made(case)
    theirs, found = by_peft(model, case), []
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(model, tmp_path, trainable=True)
    for one in (theirs, ours):
        one(torch.arange(12)[None])[0].square().sum().backward()
        found.append(gradients(one))
    names = [{name.rpartition("unilora_")[2] if "unilora_" in name else name for name in one} for one in found]
    assert names[0] == names[1]
    for name, wanted in found[0].items():
        mine = next(values for other, values in found[1].items() if other.endswith(name.rpartition("layers.")[2]))
        # Of some 20 layers an ulp each, which a gradient is made of twice, and sums over 12 tokens.
        assert float((mine - wanted).abs().max()) <= 40 * 12 * EPS * float(wanted.abs().max()), name
        assert bool(wanted.any())


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.UniLoraConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert surgery.UniLoraConfig().to_json() == written
    assert surgery.UniLoraConfig.from_json(written) == surgery.UniLoraConfig()


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@each_dtype
@pytest.mark.parametrize("case", [name for name in SAVED if name != "biases"])  # which its merge leaves trained
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(case, dtype)
    judge_merge_of_peft(model, by_peft(model, case), tmp_path, safe)


@each_dtype
@pytest.mark.parametrize("case", SAVED)
def test_a_merge_is_the_same_live_and_on_files_and_is_undone_to_the_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(case, dtype)
    by_peft(model, case).save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    read = type(model).from_pretrained(tmp_path / "base", dtype=dtype).eval()
    ours = surgery.load(read, tmp_path / "adapter")
    if case == "saved":
        assert merge_live_and_on_files(tmp_path / "base", tmp_path / "adapter", ours, tmp_path)
        return
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", reversible=True)
    surgery.unmerge_checkpoint(tmp_path / "merged", tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()


@pytest.mark.parametrize("case", ["saved", "gpt2, saved"])
def test_what_is_merged_here_loads_in_transformers_as_the_live_merge_to_the_bit(case: str, tmp_path: Path) -> None:
    model = made(case)
    merge_for_transformers(model, by_peft(model, case), tmp_path, torch.float32)


def test_one_that_names_no_weight_is_merged_in_memory_and_refused_on_files(tmp_path: Path) -> None:
    model = made("llama")
    theirs = by_peft(model, "llama")
    theirs.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    assert surgery.inspect(tmp_path / "adapter")
    with pytest.raises(
        surgery.InputError, match="it names no weight: what it holds is dealt out over a model's modules"
    ):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="dealt over the model's modules in their order, from its seed"):
        ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    surgery.merge(ours)
    floor = noise(theirs)
    assert within_noise(outputs(ours), outputs(theirs), floor)
    surgery.unmerge(ours)
    back = surgery.eject(ours).state_dict()
    assert all(torch.equal(back[name], values) for name, values in model.state_dict().items())


def test_a_model_without_such_modules_and_indices_beyond_the_vector_are_refused(tmp_path: Path) -> None:
    by_peft(made("llama"), "llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(surgery.MatchError, match="target_modules hits no module of the model"):
        surgery.load(made("gpt2"), tmp_path / "bare")
    by_peft(made("saved"), "saved").save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_model.safetensors"
    held = load_file(file)
    name = next(name for name in held if name.endswith("indices_B"))
    held[name][0, 0] = 256
    save_file(held, file)
    with pytest.raises(surgery.ValueRangeError, match="indices_B holds indices beyond a vector of 256 numbers"):
        surgery.load(made("saved"), tmp_path / "saved")


def test_the_command_line_takes_it_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made("saved")
    model.save_pretrained(tmp_path / "base")
    by_peft(model, "saved").save_pretrained(tmp_path / "adapter")
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
    assert "Uni-LoRA" in found[0].out + found[0].err
    assert (tmp_path / "back" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()
