"""TinyLoRA to peft and from it: parts of the weights, groups, outputs, gradients, files, merges."""

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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.layers.adapted import Adapted

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
}
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "u": 6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", TARGETS),
    "some tied": ("llama", {**TARGETS, "weight_tying": 0.45, "r": 3}),
    "all tied": ("llama", {"target_modules": "all-linear", "weight_tying": 1.0}),
    "drawn": ("llama", {**TARGETS, "save_projection": False}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "mlp.c_fc"], "fan_in_fan_out": True, "projection_seed": 7}),
    "full rank and more": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "r": 40, "u": 3}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "u": 6, "r": 3}),
    "biases": ("llama", {**TARGETS, "bias": "tinylora_only"}),
    "output head": ("llama", {**TARGETS, "modules_to_save": ["lm_head"]}),
}
ON_FILES = [name for name in CASES if name != "drawn"]
DTYPES = (torch.float32, torch.bfloat16)
EPS = torch.finfo(torch.float32).eps
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not"),
    pytest.mark.filterwarnings("ignore:.*dealt over the model's modules"),
]


def made(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[CASES[case][0]]().to(dtype).eval()


def config(case: str) -> peft.TinyLoraConfig:
    return peft.TinyLoraConfig(**copy.deepcopy(CASES[case][1]))


def by_peft(model: nn.Module, case: str) -> Any:
    return trained(peft.get_peft_model(copy.deepcopy(model), config(case)), 1)


@each_dtype
@each_case
def test_a_fresh_one_has_the_parts_and_projections_of_peft_and_no_effect(case: str, dtype: torch.dtype) -> None:
    model = made(case, dtype)
    theirs = peft.get_peft_model(copy.deepcopy(model), config(case))
    ours = surgery.inject(copy.deepcopy(model), config(case))
    names = [name for name, _ in ours.named_buffers() if "tinylora_" in name and "group" not in name]
    assert len(names) % 3 == 0
    for name in names:
        held = theirs.base_model.model.get_submodule(name.rpartition(".")[0])["default"]
        assert torch.equal(ours.get_buffer(name), held)
    assert any("tinylora_P" in name for name in names)
    assert torch.equal(outputs(ours), outputs(model))


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
    held = {
        name: values for name, values in held.items() if "base_layer.weight" not in name
    }  # a copy of the base's own
    assert found.keys() == held.keys()
    assert all(found[name].dtype == held[name].dtype and torch.equal(found[name], held[name]) for name in held)
    assert any(name.endswith("tinylora_P") for name in held) == (case != "drawn")


@each_case
def test_gradients_are_those_of_peft_within_the_rounding_of_a_sum(case: str, tmp_path: Path) -> None:
    model = made(case)
    theirs = by_peft(model, case)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(model, tmp_path, trainable=True)
    for one in (theirs, ours):
        one(torch.arange(12)[None])[0].square().sum().backward()
    v = theirs.base_model.tinylora_v["default"]
    wanted = torch.stack([v[str(at)].grad for at in range(len(v))])
    found = next(values.grad for name, values in ours.named_parameters() if "tinylora_v" in name)
    # Of some 20 layers an ulp each, which a gradient is made of twice, and sums over 12 tokens.
    assert float((found - wanted).abs().max()) <= 40 * 12 * EPS * float(wanted.abs().max())
    assert bool(wanted.any())


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    peft.TinyLoraConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert surgery.TinyLoraConfig().to_json() == written
    assert surgery.TinyLoraConfig.from_json(written) == surgery.TinyLoraConfig()


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
@each_dtype
@pytest.mark.parametrize("case", [name for name in ON_FILES if name != "biases"])  # which its merge leaves trained
def test_a_merge_by_peft_passes_verify_and_one_that_forgot_a_tensor_does_not(
    case: str, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    model = made(case, dtype)
    judge_merge_of_peft(model, by_peft(model, case), tmp_path, safe)


@each_dtype
@pytest.mark.parametrize("case", ON_FILES)
def test_a_merge_is_the_same_live_and_on_files_and_is_undone_to_the_bit(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(case, dtype)
    by_peft(model, case).save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    read = type(model).from_pretrained(tmp_path / "base", dtype=dtype).eval()
    ours = surgery.load(read, tmp_path / "adapter")
    if case in {"llama", "some tied", "all tied", "embedding"}:
        assert merge_live_and_on_files(tmp_path / "base", tmp_path / "adapter", ours, tmp_path)
        return
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", reversible=True)
    surgery.unmerge_checkpoint(tmp_path / "merged", tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()


@pytest.mark.parametrize("case", ["some tied", "gpt2"])
def test_what_is_merged_here_loads_in_transformers_as_the_live_merge_to_the_bit(case: str, tmp_path: Path) -> None:
    model = made(case)
    merge_for_transformers(model, by_peft(model, case), tmp_path, torch.float32)


def test_one_whose_files_tell_no_order_is_merged_in_memory_and_refused_on_files(tmp_path: Path) -> None:
    model = made("drawn")
    theirs = by_peft(model, "drawn")
    theirs.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(surgery.InputError, match="nothing in it tells the order of its modules"):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.warns(UserWarning, match="dealt over the model's modules in their order"):
        ours = surgery.load(copy.deepcopy(model), tmp_path / "adapter")
    surgery.merge(ours)
    assert within_noise(outputs(ours), outputs(theirs), noise(theirs))
    back = surgery.eject(ours).state_dict()
    assert all(torch.equal(back[name], values) for name, values in model.state_dict().items())


DAMAGES = {
    "a vector is missing": ({"base_model.tinylora_v.2": None}, "parts 0, 1, 3, 4, 5 of v are in it; all from 0 on"),
    "the last is missing": ({"base_model.tinylora_v.5": None}, "v has 5 vectors, and 6 are wanted by its 6 modules"),
    "one too many": ({"base_model.tinylora_v.6": torch.ones(6)}, "v has 7 vectors, and 6 are wanted by its 6 modules"),
    "another shape": ({"base_model.tinylora_v.1": torch.ones(5)}, "all from 0 on, in one shape, are wanted"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_vectors_that_are_not_those_of_its_modules_are_refused(damage: str, tmp_path: Path) -> None:
    changed, told = DAMAGES[damage]
    model = made("llama")
    by_peft(model, "llama").save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = load_file(file) | changed
    save_file({name: values for name, values in held.items() if values is not None}, file)
    with pytest.raises(surgery.InputError, match=told):
        surgery.load(model, tmp_path / "adapter")
    with pytest.raises(surgery.InputError, match=told):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_what_cannot_begin_is_refused_by_name() -> None:
    with pytest.raises(surgery.ConfigError, match="v begins as whatever lies in memory; start with True or 'uniform'"):
        surgery.inject(made("llama"), surgery.TinyLoraConfig(init_weights=False, target_modules=["q_proj"]))
    with torch.device("meta"):
        model = MODELS["llama"]()
    with pytest.raises(surgery.StateError, match="it is on the meta device, and TinyLoRA begins with parts of its"):
        surgery.inject(model, surgery.TinyLoraConfig(target_modules=["q_proj"]))


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        self.numbers = max([self.numbers, *(one.numel() for one in tree_leaves(found) if torch.is_tensor(one))])
        return found


def test_its_matrices_take_no_more_than_they_have_numbers_each() -> None:
    model = surgery.inject(nn.Sequential(nn.Linear(48, 64)), surgery.TinyLoraConfig(r=16, u=8, target_modules=["0"]))
    layer = next(one for one in model.modules() if isinstance(one, Adapted))
    fitted = layer.fitted["default"]
    params = fitted.params
    with Largest() as largest:
        found = fitted.method.matrices(params, layer.site)
    assert largest.numbers == found["left"].numel() == 64 * 16


def test_the_command_line_takes_it_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made("some tied")
    model.save_pretrained(tmp_path / "base")
    by_peft(model, "some tied").save_pretrained(tmp_path / "adapter")
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
    assert "TinyLoRA" in found[0].out + found[0].err
    assert (tmp_path / "back" / FILE).read_bytes() == (tmp_path / "base" / FILE).read_bytes()
