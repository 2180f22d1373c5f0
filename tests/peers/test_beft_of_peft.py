"""BEFT to peft and from it: outputs, gradients, files and merges."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from pairs import (
    each_merge,
    gradients,
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
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import surgery
from surgery import BeftConfig, LoraConfig, MatchError
from surgery.cli import surgery as command

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)),
    "bert": lambda: BertModel(BertConfig(**SMALL)),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "values": ("llama", {"target_modules": ["v_proj", "down_proj"]}),
    "a pattern": ("bert", {"target_modules": r".*\.(query|dense)"}),
    "a head besides": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "by default": ("bert", {}),
}
FILE, TENSORS = "model.safetensors", "adapter_model.safetensors"
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def made(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]().to(dtype).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("bias"):  # which are made as zeros
                values.normal_(std=0.1)
    return model


def by_peft(model: nn.Module, fields: dict[str, Any]) -> nn.Module:
    return trained(peft.get_peft_model(copy.deepcopy(model), peft.BeftConfig(**copy.deepcopy(fields))), 1 / 2)


@each_dtype
@each_case
def test_what_peft_saves_gives_equal_outputs_here_and_back_again(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    model = made(kind, dtype)
    theirs = by_peft(model, fields)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs")
    assert torch.equal(outputs(ours), outputs(theirs))
    assert not torch.equal(outputs(ours), outputs(model))
    surgery.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    assert torch.equal(outputs(again), outputs(theirs))
    found, wanted = (load_file(tmp_path / one / TENSORS) for one in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@each_case
def test_a_fresh_one_hits_the_same_modules_changes_nothing_and_trains_as_in_peft(case: str) -> None:
    kind, fields = CASES[case]
    theirs = peft.get_peft_model(made(kind), peft.BeftConfig(**copy.deepcopy(fields))).eval()
    ours = surgery.inject(made(kind), BeftConfig(**fields))
    assert trainable(ours) == trainable(theirs)
    assert torch.equal(outputs(ours), outputs(made(kind)))
    found = []
    for one in (ours, theirs):
        one(torch.arange(12)[None])[0].square().sum().backward()
        found.append(gradients(one))
    assert found[0].keys() == found[1].keys() != set()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@each_merge(CASES, [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    kind, fields = CASES[case]
    model = made(kind, dtype)
    judge_merge_of_peft(model, by_peft(model, fields), tmp_path, safe)


@each_dtype
@each_case
def test_merges_change_biases_alone_agree_and_come_back(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    model = made(kind, dtype)
    theirs = by_peft(model, fields)
    theirs.save_pretrained(tmp_path / "adapter")
    base = saved(model, tmp_path / "base")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    changed = merge_live_and_on_files(base, tmp_path / "adapter", ours, tmp_path)
    assert {name.rpartition(".")[2] for name in changed if name != "lm_head.weight"} == {"bias"}
    report = surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert report.counts["bits"] == len(changed)


@each_dtype
def test_the_bits_of_a_merge_by_peft_are_known(dtype: torch.dtype, tmp_path: Path) -> None:
    kind, fields = CASES["values"]
    model = made(kind, dtype)
    theirs = by_peft(model, fields)
    theirs.save_pretrained(tmp_path / "adapter")
    base = saved(model, tmp_path / "base")
    for safe, arithmetic in ((False, "peft"), (True, "peft-safe")):
        surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / arithmetic, arithmetic=arithmetic)
        found = load_file(tmp_path / arithmetic / FILE)
        wanted = copy.deepcopy(theirs).merge_and_unload(safe_merge=safe).state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in found)


@each_case
def test_what_is_merged_here_loads_in_transformers_as_the_live_merge_to_the_bit(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    model = made(kind)
    merge_for_transformers(model, by_peft(model, fields), tmp_path, torch.float32)


def test_a_weight_of_an_adapter_adds_so_much_of_it_also_beside_lora(tmp_path: Path) -> None:
    model = made("llama")
    base = saved(model, tmp_path / "base")
    by_peft(model, {"target_modules": ["v_proj"]}).save_pretrained(tmp_path / "beft")
    lora = trained(
        surgery.inject(copy.deepcopy(model), LoraConfig(r=2, lora_bias=True, target_modules=["v_proj"])), 1.0
    )
    surgery.save(lora, tmp_path / "lora")
    given = [(tmp_path / "beft", -0.5), (tmp_path / "lora", 2.0)]
    surgery.merge_checkpoint(base, given, tmp_path / "out", reversible=True)
    assert surgery.verify_checkpoint(base, given, tmp_path / "out").ok
    name = "model.layers.0.self_attn.v_proj.bias"
    b = load_file(tmp_path / "beft" / TENSORS)[f"base_model.model.{name.removesuffix('.bias')}.beft_bias"]
    B = load_file(tmp_path / "lora" / TENSORS)[f"base_model.model.{name.removesuffix('.bias')}.lora_B.bias"]
    exact = load_file(base / FILE)[name].double() - 0.5 * b[0].double() + (2.0 * 4) * B.double()  # lora_alpha 8, r 2
    assert torch.equal(load_file(tmp_path / "out" / FILE)[name], exact.float())
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (base / FILE).read_bytes()


def test_without_a_bias_it_runs_as_in_peft_and_is_not_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": nn.Linear(4, 6, bias=False)})
    theirs = trained(peft.get_peft_model(copy.deepcopy(net), peft.BeftConfig(target_modules=["layer"])), 1.0)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, x = surgery.load(copy.deepcopy(net), tmp_path / "adapter"), torch.randn(3, 4)
    assert torch.equal(ours["layer"](x), theirs.base_model.model["layer"](x))
    with pytest.raises(MatchError, match="layer: it has no bias, and BEFT adds to that alone"):
        surgery.merge(ours)
    with pytest.raises(MatchError, match="layer: it has no bias, and BEFT adds to that alone"):
        surgery.merge_checkpoint(saved(net, tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")


def test_what_peft_does_not_adapt_is_refused() -> None:
    for layer, told in (
        (Conv1D(4, 4), "conv1d"),
        (nn.Embedding(4, 4), "embedding"),
        (nn.Conv2d(4, 4, 1), "convolution"),
    ):
        with pytest.raises(MatchError, match=f"layer: its op is {told}; BEFT acts on Linear"):
            surgery.inject(nn.ModuleDict({"layer": layer}), BeftConfig(target_modules=["layer"]))


def test_one_that_is_drawn_begins_as_normal_numbers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 400))
    drawn = surgery.inject(net, BeftConfig(target_modules=["0"], init_weights=False))[0].fitted["default"].params["b"]
    assert abs(float(drawn.mean())) < 5 * 400**-0.5  # five of its standard deviations
    assert abs(float(drawn.var()) - 1) < 5 * (2 / 400) ** 0.5


def test_the_command_line_inspects_plans_merges_verifies_and_unmerges(tmp_path: Path) -> None:
    model = made("llama")
    base, adapter, out = (str(tmp_path / name) for name in ("base", "adapter", "out"))
    saved(model, tmp_path / "base")
    by_peft(model, CASES["values"][1]).save_pretrained(adapter)
    calls = {
        "BEFT": ["inspect", adapter],
        "4 weights to merge": ["plan", base, adapter],
        "": ["merge", base, f"{adapter}=0.5", out, "--reversible"],
        "bits": ["verify", base, f"{adapter}=0.5", out],
        " ": ["unmerge", out, str(tmp_path / "back")],
    }
    for told, call in calls.items():
        done = CliRunner().invoke(command, call)
        assert done.exit_code == 0, done.output
        assert told in done.output
    assert (tmp_path / "back" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.BeftConfig(target_modules=["v", "q"]).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert BeftConfig.from_json(written).to_json() == written | {"target_modules": written["target_modules"]}
    assert BeftConfig.from_json(written) == BeftConfig(target_modules=written["target_modules"])
