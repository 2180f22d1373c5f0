"""VeRA, PVeRA and RandLoRA to peft and from it: projections, outputs, gradients, files and merges."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from outcomes import called
from pairs import (
    FILE,
    each_merge,
    gradients,
    judge_merge_of_peft,
    merge_for_transformers,
    merge_live_and_on_files,
    outputs,
    trained,
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
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "drawn": ("llama", {"r": 5, "target_modules": ["k_proj", "up_proj"], "save_projection": False}),
    "another seed": ("llama", {"r": 3, "target_modules": "all-linear", "projection_prng_key": 11, "d_initial": -0.5}),
    "gpt2": ("gpt2", {"r": 8, "target_modules": ["c_attn", "mlp.c_fc"], "fan_in_fan_out": True}),
    "biases": ("llama", {"r": 8, "target_modules": ["q_proj"], "bias": "vera_only"}),
    "mean": ("llama", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),  # of PVeRA
    "mean, drawn": ("gpt2", {"r": 4, "target_modules": ["c_attn", "mlp.c_fc"], "save_projection": False}),
    "full": ("llama", {"r": 6, "target_modules": ["q_proj", "down_proj", "up_proj"], "randlora_alpha": 12}),  # RandLoRA
    "full, drawn": (
        "gpt2",
        {"r": 8, "target_modules": ["c_attn", "mlp.c_proj"], "save_projection": False, "randlora_alpha": 4},
    ),
    "full, sparse": (
        "llama",
        {"r": 32, "target_modules": ["k_proj", "down_proj"], "sparse": True, "randlora_alpha": 9},
    ),
    "full, very sparse": (
        "llama",
        {"r": 40, "target_modules": ["o_proj", "up_proj"], "very_sparse": True, "randlora_alpha": 3},
    ),
    "output head": ("llama", {"r": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}
DTYPES = (torch.float32, torch.bfloat16)
EPS = torch.finfo(torch.float32).eps
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not"),
    pytest.mark.filterwarnings("ignore:.*drawn from its seed"),
]


def made(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[CASES[case][0]]().to(dtype).eval()


def config(case: str) -> peft.PeftConfig:
    kinds = {"mean": peft.PveraConfig, "full": peft.RandLoraConfig}
    return kinds.get(case[:4], peft.VeraConfig)(**copy.deepcopy(CASES[case][1]))


def by_peft(model: nn.Module, case: str) -> Any:
    return trained(peft.get_peft_model(copy.deepcopy(model), config(case)), 1 / 2)


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    """b * y is added in one operation here and in two there: an ulp of each sum, which some 20 layers pass on."""
    if dtype != torch.float32:
        return torch.equal(found, wanted)
    return float((found - wanted).abs().max()) <= 20 * EPS * float(wanted.abs().max())


@each_dtype
@each_case
def test_a_fresh_one_has_the_projections_of_peft_to_the_bit_and_no_effect(case: str, dtype: torch.dtype) -> None:
    model = made(case, dtype)
    theirs = peft.get_peft_model(copy.deepcopy(model), config(case))
    ours = surgery.inject(copy.deepcopy(model), config(case))
    there, state = (
        theirs.base_model,
        {name: values for name, values in ours.named_buffers() if re.search("(vera|lora)_[AB]", name)},
    )
    assert len(state) == 2
    for name, values in state.items():
        assert torch.equal(values, getattr(there, name.split(".")[-2])["default"])
    found = dict(ours.named_parameters())
    for name, values in theirs.named_parameters():
        if re.search("vera_lambda|randlora", name):  # which peft has rounded to the base's dtype, its 0.1 too
            assert torch.equal(found[name.removeprefix("base_model.model.")].to(dtype).float(), values)
    assert torch.equal(outputs(ours), outputs(model))


@each_dtype
@each_case
def test_what_peft_saves_gives_equal_outputs_here_and_back_again(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(case, dtype)
    before, theirs = outputs(model), by_peft(model, case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs")
    assert close(outputs(ours), outputs(theirs), dtype)
    assert not torch.equal(outputs(ours), before)
    surgery.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert torch.equal(outputs(again), outputs(theirs))
    found, wanted = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(name.endswith(("vera_A", "randlora_A")) for name in found) == ("drawn" not in case)


@each_case
def test_gradients_are_those_of_peft_within_the_rounding_of_a_sum(case: str, tmp_path: Path) -> None:
    model = made(case)
    theirs = by_peft(model, case)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(model, tmp_path, trainable=True)
    found = []
    for one in (theirs, ours):
        one(torch.arange(12)[None])[0].square().sum().backward()
        found.append(gradients(one))
    assert found[0].keys() == found[1].keys()
    for name, wanted in found[0].items():
        # As the outputs, which a gradient is made of twice, and sums over 12 tokens.
        assert float((found[1][name] - wanted).abs().max()) <= 40 * 12 * EPS * float(wanted.abs().max()), name
        assert bool(wanted.any())


@pytest.mark.parametrize("name", ["VeraConfig", "PveraConfig", "RandLoraConfig"])
def test_every_field_that_peft_writes_is_read_and_written_again(name: str, tmp_path: Path) -> None:
    getattr(peft, name)().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert getattr(surgery, name)().to_json() == written
    assert getattr(surgery, name).from_json(written) == getattr(surgery, name)()


def test_the_noise_of_pvera_in_training_is_that_of_peft(tmp_path: Path) -> None:
    model = made("mean")
    theirs = by_peft(model, "mean").train()
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(model, tmp_path, trainable=True).train()
    found = []
    for one in (theirs, ours):
        torch.manual_seed(2)
        found.append(outputs(one))
    assert close(found[1], found[0], torch.float32)
    assert not torch.equal(outputs(ours.eval()), found[1])


def test_pvera_that_samples_where_it_is_merged_is_refused() -> None:
    with pytest.raises(surgery.ConfigError, match="sample_at_inference: it draws another output"):
        surgery.PveraConfig(sample_at_inference=True)
    with pytest.raises(surgery.ConfigError, match="torch's own generator"):
        surgery.inject(made("mean"), surgery.PveraConfig(target_modules=["q_proj"], generator_seed=1))


@each_merge([name for name in CASES if name != "biases"], DTYPES)  # which its merge leaves trained
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(case, dtype)
    judge_merge_of_peft(model, by_peft(model, case), tmp_path, safe)


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
    if case == "llama":
        assert merge_live_and_on_files(tmp_path / "base", tmp_path / "adapter", ours, tmp_path)
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", reversible=True)
    surgery.unmerge_checkpoint(tmp_path / "merged", tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()


@each_dtype
@pytest.mark.parametrize("case", ["llama", "drawn", "gpt2", "mean", "full", "full, drawn"])
def test_what_is_merged_here_loads_in_transformers_as_the_live_merge_to_the_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(case, dtype)
    merge_for_transformers(model, by_peft(model, case), tmp_path, dtype)


def test_the_command_line_takes_it_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made("drawn")
    model.save_pretrained(tmp_path / "base")
    by_peft(model, "drawn").save_pretrained(tmp_path / "adapter")
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
    assert "VeRA" in found[0].out + found[0].err
    assert "drawn from its seed" in found[1].out + found[1].err
    assert (tmp_path / "back" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()


KEPT = {
    "at each layer too, as peft writes them": bool,  # all
    "once": lambda name: not re.search(r"layers.*randlora_[AB]", name),
    "at each layer alone": lambda name: name not in {"base_model.randlora_A", "base_model.randlora_B"},
}


@pytest.mark.parametrize("kept", KEPT)
def test_bases_are_read_wherever_a_file_has_them_and_held_once(kept: str, tmp_path: Path) -> None:
    model = made("full")
    theirs = by_peft(model, "full")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    assert len([name for name in held if name.endswith("randlora_A")]) == 1 + 3 * 2  # peft's copies of one tensor
    save_file({name: values for name, values in held.items() if KEPT[kept](name)}, file)
    ours = surgery.load(copy.deepcopy(model), tmp_path)
    assert close(outputs(ours), outputs(theirs), torch.float32)
    assert len([name for name, _ in ours.named_buffers() if "randlora_A" in name]) == 1
    if kept != "at each layer alone":  # which peft takes for what its own seed gives
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        assert torch.equal(outputs(again), outputs(theirs))


def test_a_layer_whose_bases_are_others_is_refused(tmp_path: Path) -> None:
    by_peft(made("full"), "full").save_pretrained(tmp_path)
    file, name = tmp_path / "adapter_model.safetensors", "base_model.model.model.layers.1.mlp.up_proj.randlora_B"
    held = load_file(file)
    save_file(held | {name: held[name] * 2}, file)
    with pytest.raises(surgery.FormatError, match=f"{name} is another than at other sites"):
        surgery.load(made("full"), tmp_path)
