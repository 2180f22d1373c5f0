"""Modules that are trained whole, PEFT's LN_TUNING, to peft and from it: outputs, gradients, files and merges."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from pairs import (
    gradients,
    judge_merge_of_peft,
    merge_for_transformers,
    merge_live_and_on_files,
    outputs,
    trainable,
    trained,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery
from surgery import ConfigError, FormatError, LNTuningConfig, LoraConfig, MatchError, StateError, UsageError
from surgery.cli import surgery as command

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)),
    "bert": lambda: BertModel(BertConfig(**SMALL)),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "norms": ("llama", {"target_modules": ["input_layernorm", "norm"]}),
    "a pattern": ("llama", {"target_modules": r".*post_attention_layernorm"}),
    "one left out": ("llama", {"target_modules": ["input_layernorm"], "exclude_modules": ["layers.0.input_layernorm"]}),
    "a linear layer": ("llama", {"target_modules": ["q_proj", "norm"]}),
    "a head besides": ("llama", {"target_modules": ["norm"], "modules_to_save": ["lm_head"]}),
    "norms with biases": ("gpt2", {"target_modules": ["ln_1", "ln_f"]}),
    "norms of bert": ("bert", {"target_modules": ["LayerNorm"]}),
    "norms by default": ("gpt2", {}),
}
NESTED = ("llama", {"target_modules": ["mlp"]})
FILE, TENSORS = "model.safetensors", "adapter_model.safetensors"
DTYPES = (torch.float32, torch.bfloat16)
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]().to(dtype).eval()


def by_peft(model: nn.Module, fields: dict[str, Any]) -> nn.Module:
    config = peft.LNTuningConfig(**copy.deepcopy(fields))
    return trained(peft.get_peft_model(copy.deepcopy(model), config), 1 / 2)


def same_files(one: Path, other: Path) -> bool:
    found, wanted = (load_file(folder / TENSORS) for folder in (one, other))
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


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
    with surgery.disable_adapters(ours):
        assert torch.equal(outputs(ours), outputs(model))
    surgery.save(ours, tmp_path / "ours")
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    assert torch.equal(outputs(again), outputs(theirs))


@each_case
def test_a_fresh_one_hits_the_same_modules_changes_nothing_and_trains_as_in_peft(case: str) -> None:
    kind, fields = CASES[case]
    theirs = peft.get_peft_model(made(kind), peft.LNTuningConfig(**copy.deepcopy(fields))).eval()
    ours = surgery.inject(made(kind), LNTuningConfig(**fields))
    assert trainable(ours) == trainable(theirs)
    assert torch.equal(outputs(ours), outputs(made(kind)))
    found = []
    for one in (ours, theirs):
        one(torch.arange(12)[None])[0].square().sum().backward()
        found.append(gradients(one))
    assert found[0].keys() == found[1].keys() != set()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@pytest.mark.parametrize("case", [name for name in CASES if name != "a head besides"])
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, safe: bool, tmp_path: Path
) -> None:
    kind, fields = CASES[case]
    model = made(kind)
    judge_merge_of_peft(model, by_peft(model, fields), tmp_path, safe)


def test_a_merge_by_peft_that_leaves_a_saved_module_wrapped_is_told_by_verify(tmp_path: Path) -> None:
    kind, fields = CASES["a head besides"]
    model = made(kind)
    theirs = by_peft(model, fields)
    model.save_pretrained(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "adapter")
    theirs.merge_and_unload().save_pretrained(tmp_path / "out")
    report = surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.tensors["model.norm.weight"].grade == "bits"
    assert report.tensors["lm_head.weight"].why == "it is missing"


@each_dtype
@each_case
def test_merges_live_and_on_files_agree_and_come_back(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    model = made(kind, dtype)
    by_peft(model, fields).save_pretrained(tmp_path / "adapter")
    base = tmp_path / "base"
    base.mkdir()
    save_file({name: v.clone() for name, v in model.state_dict().items()}, base / FILE, {"format": "pt"})
    ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    changed = merge_live_and_on_files(base, tmp_path / "adapter", ours, tmp_path)
    report = surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert report.counts["bits"] == len(changed) > 0


@pytest.mark.parametrize("case", ["norms", "a head besides"])
def test_what_is_merged_here_loads_in_transformers_as_the_live_merge_to_the_bit(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    model = made(kind)
    merge_for_transformers(model, by_peft(model, fields), tmp_path, torch.float32)


def test_modules_that_hold_others_are_copied_with_all_that_they_hold(tmp_path: Path) -> None:
    model = made(NESTED[0])
    theirs = by_peft(model, NESTED[1])
    theirs.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "base")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs")
    assert torch.equal(outputs(ours), outputs(theirs))
    surgery.save(ours, tmp_path / "ours")
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert torch.equal(outputs(again), outputs(theirs))
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "theirs", tmp_path / "out")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(merged), outputs(theirs))
    with pytest.raises(AttributeError):  # peft looks for a weight of the module itself
        theirs.merge_and_unload()


def test_another_name_of_the_adapter_is_no_matter_here_and_peft_then_loads_nothing(tmp_path: Path) -> None:
    model = made(NESTED[0])
    theirs = by_peft(model, NESTED[1])
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(copy.deepcopy(model), tmp_path, adapter_name="other")
    assert torch.equal(outputs(ours), outputs(theirs))
    lost = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, adapter_name="other").eval()
    assert torch.equal(outputs(lost), outputs(model))


def test_buffers_are_copied_too() -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    model = surgery.inject(net(), LNTuningConfig(target_modules=["1"]))
    model.train()(torch.randn(8, 4))
    with surgery.disable_adapters(model):
        assert all(torch.equal(a, b) for a, b in zip(model[1].running.buffers(), net()[1].buffers(), strict=True))
    assert not torch.equal(model[1].running_mean, net()[1].running_mean)
    x = torch.randn(3, 4)
    merged = surgery.eject(surgery.merge(copy.deepcopy(model.eval())), keep_merged=True)
    assert type(merged[1]) is nn.BatchNorm1d
    assert torch.equal(merged(x), model(x))


def test_a_merge_is_a_state_of_the_model_as_any_other(tmp_path: Path) -> None:
    model = surgery.inject(made("llama"), LNTuningConfig(target_modules=["norm"]))
    trained(model, 1.0)
    wanted = outputs(model)
    surgery.merge(model)
    assert torch.equal(outputs(model), wanted)
    with pytest.raises(StateError, match="while adapters are merged"):
        surgery.disable_adapters(model)
    with pytest.raises(StateError, match="while adapters are merged"):
        surgery.merge(model)
    surgery.unmerge(model)
    with pytest.raises(StateError, match="nothing is merged"):
        surgery.unmerge(model)
    with surgery.disable_adapters(model), pytest.raises(StateError, match="no active adapter"):
        surgery.merge(model)
    surgery.save_merged(model, tmp_path / "out")
    assert torch.equal(outputs(LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()), wanted)
    assert torch.equal(outputs(surgery.eject(model)), outputs(made("llama")))
    assert all(values.requires_grad for values in model.parameters())


def test_copies_and_pickles_have_the_same_outputs_and_names() -> None:
    model = trained(surgery.inject(made("llama"), LNTuningConfig(target_modules=["norm"])), 1.0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other), outputs(model))
        assert other.state_dict().keys() == model.state_dict().keys()
    assert "model.norm.base_layer.weight" in model.state_dict()


def test_it_is_compiled_to_one_graph_and_exported_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model = trained(surgery.inject(net, LNTuningConfig(target_modules=["1"])), 1.0)
    x = torch.randn(3, 4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))
    surgery.export_onnx(model, None, tmp_path / "out", inputs=x)  # which compares the outputs, and refuses others


def test_beside_lora_and_another_of_its_kind(tmp_path: Path) -> None:
    model = surgery.inject(made("llama"), LNTuningConfig(target_modules=["norm"]), adapter_name="a")
    surgery.inject(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name="b")
    surgery.inject(model, LNTuningConfig(target_modules=["norm", "input_layernorm"]), adapter_name="c")
    trained(model, 1.0)
    surgery.set_adapter(model, "a")
    alone = outputs(model)
    surgery.set_adapter(model, ["a", "b"])
    assert not torch.equal(outputs(model), alone)
    with pytest.raises(UsageError, match="a and c both replace"):
        surgery.set_adapter(model, ["a", "c"])
    for name in "abc":
        surgery.save(model, tmp_path, adapter_name=name)
    made("llama").save_pretrained(tmp_path / "base")
    surgery.merge_checkpoint(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(merged), outputs(surgery.eject(surgery.merge(model), keep_merged=True)))


def test_a_model_without_its_head_has_the_same_modules_by_other_paths(tmp_path: Path) -> None:
    whole = made("llama")
    by_peft(whole, CASES["norms"][1]).save_pretrained(tmp_path / "adapter")
    whole.model.save_pretrained(tmp_path / "base")
    ours = surgery.load(whole.model, tmp_path / "adapter")
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = type(whole.model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(merged), outputs(ours))
    surgery.save(ours, tmp_path / "again")
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "again" / TENSORS)}
    found = {name.removeprefix("base_model.model.model.") for name in load_file(tmp_path / "adapter" / TENSORS)}
    assert names == found


def test_a_model_of_transformers_saves_loads_and_swaps_it_by_its_own_methods(tmp_path: Path) -> None:
    model = trained(surgery.inject(made("llama"), LNTuningConfig(target_modules=["norm"])), 1.0)
    wanted, held = outputs(model), dict(model.named_parameters())
    model.save_pretrained(tmp_path / "first")
    trained(model, 2.0)
    assert not torch.equal(outputs(model), wanted)
    model.load_adapter(str(tmp_path / "first"), "default", hotswap=True)
    assert torch.equal(outputs(model), wanted)
    assert all(values is held[name] for name, values in model.named_parameters())
    assert torch.equal(outputs(surgery.load(made("llama"), tmp_path / "first")), wanted)
    assert [*model.get_adapter_state_dict("default")] == ["model.norm.ln_tuning_layers.weight"]
    model.delete_adapter("default")
    assert torch.equal(outputs(model), outputs(made("llama")))


def test_what_cannot_be_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str, config: object, model: nn.Module, **options: Any) -> None:
        before = dict(model.named_modules())
        with pytest.raises(error, match=words):
            surgery.inject(model, config, adapter_name="new", **options)
        assert dict(model.named_modules()) == before

    norm = LNTuningConfig(target_modules=["norm"])
    refused(MatchError, "nothing matches 'normal'", LNTuningConfig(target_modules=["normal"]), made("llama"))
    refused(UsageError, "quantization_aware is given, and LN_TUNING", norm, made("llama"), quantization_aware="nf4")
    refused(UsageError, "examples is given, and LN_TUNING", norm, made("llama"), examples=[torch.arange(3)])
    both = LNTuningConfig(target_modules=["mlp", "down_proj"])
    refused(MatchError, r"down_proj: it lies in .*\.mlp, which is copied too", both, made("llama"))
    model = surgery.inject(made("llama"), LoraConfig(r=2, target_modules=["down_proj"]))
    for target in ("mlp", "down_proj"):
        refused(MatchError, "an adapter lies over it or within it", LNTuningConfig(target_modules=[target]), model)
        besides = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[target])
        refused(MatchError, "an adapter lies over it or within it", besides, model)
    model = surgery.inject(made("llama"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"]))
    refused(MatchError, "another adapter trains copies of it", LoraConfig(r=2, target_modules=["down_proj"]), model)
    by_peft(made("llama"), CASES["norms"][1]).save_pretrained(tmp_path / "adapter")
    made("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"adapter: its weight is 0\.5; target_modules of it"):
        surgery.merge_checkpoint(tmp_path / "base", [(tmp_path / "adapter", 0.5)], tmp_path / "out")
    with pytest.raises(MatchError, match=r"model.layers.0.input_layernorm is not in the model"):
        surgery.load(made("bert"), tmp_path / "adapter")
    torch.manual_seed(5)
    other = made("llama")
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    surgery.save(surgery.load(made("llama"), tmp_path / "adapter"), tmp_path / "ours")
    with pytest.raises(MatchError, match="trained on another base"):
        surgery.load(other, tmp_path / "ours")


def test_a_file_that_lacks_a_tensor_or_has_another_is_refused(tmp_path: Path) -> None:
    model = made("gpt2")
    by_peft(model, CASES["norms with biases"][1]).save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "adapter" / TENSORS
    whole = load_file(file)
    name = "base_model.model.transformer.ln_f.ln_tuning_layers.bias"
    save_file({key: values for key, values in whole.items() if key != name}, file)
    with pytest.raises(
        MatchError, match=r"transformer.ln_f of target_modules holds weight \[32\], and the model's bias"
    ):
        surgery.load(made("gpt2"), tmp_path / "adapter")
    save_file(whole | {name.replace("ln_f", "ln_9"): whole[name].clone()}, file)
    with pytest.raises(MatchError, match=r"transformer.ln_9.bias of target_modules is not in the base"):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    save_file(whole | {"base_model.model.transformer.ln_f.lora_A.weight": whole[name].clone()}, file)
    with pytest.raises(FormatError, match="LN_TUNING tensors lie in ln_tuning_layers; was it renamed"):
        surgery.load(made("gpt2"), tmp_path / "adapter")
    save_file({}, file)
    with pytest.raises(FormatError, match="no LN_TUNING tensor in it"):
        surgery.load(made("gpt2"), tmp_path / "adapter")


def test_the_command_line_inspects_plans_merges_verifies_and_unmerges(tmp_path: Path) -> None:
    model = made("llama")
    model.save_pretrained(tmp_path / "base")
    by_peft(model, CASES["norms"][1]).save_pretrained(tmp_path / "adapter")
    base, adapter, out = (str(tmp_path / name) for name in ("base", "adapter", "out"))
    calls = {
        "adapter: LN tuning; ": ["inspect", adapter],
        "3 to replace": ["plan", base, adapter],
        "": ["merge", base, adapter, out, "--reversible"],
        "bits": ["verify", base, adapter, out],
        " ": ["unmerge", out, str(tmp_path / "back")],
    }
    for told, call in calls.items():
        done = CliRunner().invoke(command, call)
        assert done.exit_code == 0, done.output
        assert told in done.output
    assert (tmp_path / "back" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.LNTuningConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert LNTuningConfig().to_json() == written
    assert LNTuningConfig.from_json(written) == LNTuningConfig()
