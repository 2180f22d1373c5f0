"""GLoRA to peft and from it: outputs, gradients, files and merges, of each kind of its five parts."""

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
from surgery import GloraConfig, LoraConfig, ValueRangeError

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "products": ("bert", {"r": 4, "target_modules": ["query", "intermediate.dense"]}),
    "vectors": (
        "bert",
        {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector", "target_modules": ["query", "value"]},
    ),
    "numbers": ("bert", {"config_A_B": "constant", "config_C": "none", "target_modules": ["intermediate.dense"]}),
    "biases alone": ("bert", {"config_A_B": "none", "target_modules": ["value", "intermediate.dense"], "r": 2}),
    "no bias": ("llama", {"r": 4, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}),
    "by default": ("bert", {"r": 3, "config_D_E": "none"}),
}
FILE, TENSORS = "model.safetensors", "adapter_model.safetensors"
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def made(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL)) if kind == "bert" else LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.dim() > 1:  # of a size at which what is multiplied with it shows
                values.mul_(4)
            elif name.endswith("bias"):  # which are made as zeros
                values.normal_(std=0.5)
    return model.to(dtype).eval()


def by_peft(model: nn.Module, fields: dict[str, Any]) -> nn.Module:
    return trained(peft.get_peft_model(copy.deepcopy(model), peft.GloraConfig(**copy.deepcopy(fields))), 1 / 8)


@each_case
def test_files_go_both_ways_with_equal_outputs_and_gradients(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    model = made(kind)
    theirs = by_peft(model, fields)
    ours = files_go_both_ways(model, theirs, outputs, tmp_path)
    for name, values in ours.named_parameters():
        values.requires_grad_("glora" in name or "modules_to_save" in name)
    gradients_agree(theirs, ours, forward)


@each_case
def test_a_fresh_one_hits_the_same_modules_and_changes_nothing(case: str) -> None:
    kind, fields = CASES[case]
    theirs = peft.get_peft_model(made(kind), peft.GloraConfig(**copy.deepcopy(fields)))
    ours = surgery.inject(made(kind), GloraConfig(**fields))
    assert trainable(ours) == trainable(theirs)
    assert {*ours.state_dict()} == {name.removeprefix("base_model.model.") for name in theirs.state_dict()}
    assert torch.equal(outputs(ours), outputs(made(kind)))


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
    assert {name.rpartition(".")[2] for name in changed} <= ({"bias"} if case == "biases alone" else {"weight", "bias"})
    assert ("bias" in {name.rpartition(".")[2] for name in changed}) == (kind == "bert")
    report = surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert report.counts["bits"] == len(changed)
    assert close(outputs(surgery.merge(again)), before, 256)


def test_what_is_merged_here_loads_in_transformers_as_the_live_merge_to_the_bit(tmp_path: Path) -> None:
    model = made("bert")
    merge_for_transformers(model, by_peft(model, CASES["products"][1]), tmp_path, torch.float32)


@each_dtype
def test_two_that_peft_merges_together_add_to_the_base_each_and_pass_verify(dtype: torch.dtype, tmp_path: Path) -> None:
    model = made("bert", dtype)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.GloraConfig(r=4, target_modules=["query"]))
    theirs.add_adapter("other", peft.GloraConfig(r=2, config_C="vector", config_D_E="vector", target_modules=["query"]))
    theirs.base_model.set_adapter(["default", "other"])
    trained(theirs, 1 / 8).save_pretrained(tmp_path / "both")
    given = [tmp_path / "both", tmp_path / "both" / "other"]
    base = tmp_path / "base"
    model.save_pretrained(base)
    merged = copy.deepcopy(theirs).merge_and_unload()
    merged.save_pretrained(tmp_path / "out")
    surgery.verify_checkpoint(base, given, tmp_path / "out").require()
    assert not surgery.verify_checkpoint(base, given[:1], tmp_path / "out").ok
    ours = copy.deepcopy(model)
    for path, name in zip(given, ("default", "other"), strict=True):
        surgery.load(ours, path, adapter_name=name)
    surgery.set_adapter(ours, ["default", "other"])
    before = outputs(ours)
    surgery.merge_checkpoint(base, given, tmp_path / "ours", reversible=True)
    assert close(outputs(surgery.merge(ours)), before, 256)
    live, streamed = surgery.eject(ours, keep_merged=True).state_dict(), load_file(tmp_path / "ours" / FILE)
    assert all(torch.equal(values, streamed[name]) for name, values in live.items())
    surgery.unmerge_checkpoint(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()


def test_a_weight_of_an_adapter_adds_so_much_of_it_also_over_lora(tmp_path: Path) -> None:
    model = made("bert").double()
    base = saved(model, tmp_path / "base")
    by_peft(model, {"r": 2, "target_modules": ["query"], "config_D_E": "vector"}).save_pretrained(tmp_path / "glora")
    lora = trained(surgery.inject(copy.deepcopy(model), LoraConfig(r=2, lora_bias=True, target_modules=["query"])), 1.0)
    surgery.save(lora, tmp_path / "lora")
    given = [(tmp_path / "lora", 2.0), (tmp_path / "glora", -0.5)]
    surgery.merge_checkpoint(base, given, tmp_path / "out", reversible=True)
    assert surgery.verify_checkpoint(base, given, tmp_path / "out").counts["bits"] == 4
    name, p = "encoder.layer.0.attention.self.query", load_file(tmp_path / "glora" / TENSORS)
    held = {key.split("glora_")[1]: values.double() for key, values in p.items() if name in key}
    W, b = (load_file(base / FILE)[f"{name}.{one}"] for one in ("weight", "bias"))
    part = b * held["D.X"] + held["E.X"] + (W @ held["C.Xd"] @ held["C.Xu"]).squeeze(1)
    B = load_file(tmp_path / "lora" / TENSORS)[f"base_model.model.{name}.lora_B.bias"]
    found = load_file(tmp_path / "out" / FILE)[f"{name}.bias"]
    # The grids: r * 2^-21 of the largest products, of each of 32 inputs; lora_alpha is 8 and r 2.
    room = 2 * 2.0**-21 * float(held["C.Xd"].abs().max() * held["C.Xu"].abs().max() * W.abs().sum(1).max())
    assert float((found - (b + (2.0 * 4) * B - 0.5 * part)).abs().max()) <= room
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()
    for order in ((0, 1), (1, 0)):
        ours, names = copy.deepcopy(model), ["lora", "glora"]
        for at in order:
            surgery.load(ours, tmp_path / names[at], adapter_name=names[at])
        surgery.set_adapter(ours, [names[at] for at in order])
        before, bias = outputs(ours), ours.get_submodule(name).bias
        surgery.merge(ours)
        assert close(outputs(ours), before, 1 << 31)  # of grids of 22 bits
        assert float((bias - ours.get_submodule(name).bias).abs().max()) <= 4 * room


def test_a_bias_is_made_of_the_weight_that_lies_in_another_file(tmp_path: Path) -> None:
    model = made("bert")
    by_peft(model, CASES["products"][1]).save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    tensors, whole = load_file(tmp_path / "base" / FILE), tmp_path / "base"
    apart = tmp_path / "apart"
    apart.mkdir()
    (apart / "config.json").write_bytes((whole / "config.json").read_bytes())
    names = {True: "model-00001-of-00002.safetensors", False: "model-00002-of-00002.safetensors"}
    for biases, file in names.items():
        save_file({n: v for n, v in tensors.items() if n.endswith("bias") == biases}, apart / file, {"format": "pt"})
    listed = {"metadata": {}, "weight_map": {name: names[name.endswith("bias")] for name in tensors}}
    (apart / "model.safetensors.index.json").write_text(json.dumps(listed))
    surgery.merge_checkpoint(whole, tmp_path / "adapter", tmp_path / "one")
    surgery.merge_checkpoint(apart, tmp_path / "adapter", tmp_path / "two", reversible=True)
    one = load_file(tmp_path / "one" / FILE)
    two = {name: values for file in names.values() for name, values in load_file(tmp_path / "two" / file).items()}
    assert all(torch.equal(one[name], two[name]) for name in one)
    surgery.unmerge_checkpoint(tmp_path / "two", tmp_path / "back")
    assert all((tmp_path / "back" / file).read_bytes() == (apart / file).read_bytes() for file in names.values())


@pytest.mark.parametrize("into", ["keep", "nf4"])
def test_over_a_quantized_layer_the_bias_is_made_of_the_weight_that_it_holds(into: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(128, 64))
    if into == "keep":
        surgery.quantize(model, "nf4")
    trained(surgery.inject(model, GloraConfig(r=2, target_modules=["0"])), 1 / 8)
    W, b = (values.double() for values in model[0].dense())
    p = {role: values.detach().double() for role, values in model[0].fitted["default"].params.items()}
    wanted = b + b * p["D"] + p["E"] + (W @ p["Cd"] @ p["Cu"]).squeeze(1)
    surgery.merge(model, into=into, min_retained=0, max_noise=9)
    # The grids, as above, and one rounding.
    room = 2 * 2.0**-21 * float(p["Cd"].abs().max() * p["Cu"].abs().max() * W.abs().sum(1).max())
    room += torch.finfo(torch.float32).eps / 2 * float(wanted.abs().max())
    assert float((model[0].base_layer.bias.double() - wanted).detach().abs().max()) <= room
    surgery.unmerge(model)
    assert torch.equal(model[0].base_layer.bias.double(), b)


def test_over_a_base_that_is_read_from_a_format_the_bias_is_made_of_the_weight_as_it_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(128, 64))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / FILE)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    surgery.save(trained(surgery.inject(copy.deepcopy(model), GloraConfig(r=2, target_modules=["0"])), 1 / 8), adapter)
    surgery.merge_checkpoint(tmp_path / "base", adapter, out, base_as="nf4", compute_dtype="bfloat16")
    held: Any = surgery.load(surgery.quantize(copy.deepcopy(model).bfloat16(), "nf4"), adapter)
    W, b = held[0].dense().weight.double(), model[0].bias.double()
    p = {role: values.detach().double() for role, values in held[0].fitted["default"].params.items()}
    wanted = b + b * p["D"] + p["E"] + (W @ p["Cd"] @ p["Cu"]).squeeze(1)
    # The grids, as above, and one rounding.
    room = 2 * 2.0**-21 * float(p["Cd"].abs().max() * p["Cu"].abs().max() * W.abs().sum(1).max())
    room += torch.finfo(torch.float32).eps / 2 * float(wanted.abs().max())
    assert float((load_file(out / FILE)["0.bias"].double() - wanted).abs().max()) <= room


def test_zeros_that_hold_other_numbers_are_refused(tmp_path: Path) -> None:
    model = made("llama")
    by_peft(model, CASES["no bias"][1]).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    name = next(name for name in tensors if name.endswith("glora_C.zeros"))
    save_file(tensors | {name: tensors[name] + 1}, tmp_path / "adapter" / TENSORS)
    with pytest.raises(ValueRangeError, match=r"q_proj|down_proj"):
        surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    with pytest.raises(ValueRangeError, match=r"glora_C\.zeros holds other numbers"):
        surgery.merge_checkpoint(saved(model, tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")


def test_the_command_line_merges_and_takes_back(tmp_path: Path) -> None:
    model = made("bert")
    by_peft(model, CASES["products"][1]).save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    command_line_merges_and_takes_back(tmp_path / "base", tmp_path / "adapter", tmp_path)


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.GloraConfig(target_modules=["q"], bias="glora_only", config_C="none").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert GloraConfig.from_json(written).to_json() == written
    with pytest.raises(surgery.ConfigError, match=r"config_C is 'constant'; one of 'lora', 'vector', 'none' is wanted"):
        GloraConfig(config_C="constant")
