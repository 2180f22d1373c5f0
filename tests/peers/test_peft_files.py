"""Configs and adapter folders of peft are read here, and ours there, with equal outputs to the bit.

The scalings are powers of two: there peft's product and sum round as the one operation here does.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from pairs import outputs, trainable, trained
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import surgery
from surgery.methods import METHODS

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)),
}
PATTERNS = {
    "lora_alpha": 8,
    "use_rslora": True,  # alpha / sqrt(r): every rank below is a power of four
    "rank_pattern": {"q_proj": 16, "layers.1.mlp.down_proj": 1},
    "alpha_pattern": {"down_proj": 16, r"layers\.0\..*v_proj": 2},
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}
CASES = {
    "patterns": ("llama", PATTERNS),
    "fan_in_fan_out": ("gpt2", {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]}),
    "exclude_modules": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]}),
    "exclude_regex": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*v_proj"}),
    "regex": ("llama", {"target_modules": r".*\.layers\.1\.(self_attn\.q_proj|mlp\..*_proj)"}),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "one_layer": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0}),
    "layers_of_patterns": (
        "gpt2",
        {
            "fan_in_fan_out": True,
            "target_modules": ["c_fc"],
            "layers_to_transform": [1],
            "layers_pattern": ["layers", "h"],
        },
    ),
    "a_full_name_beside_layers": ("llama", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}),
    "all_linear": ("llama", {"target_modules": "all-linear"}),
    "all_linear_of_a_classifier": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "task_head": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "modules_to_save": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}),
    "output_head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}
DTYPES = (torch.float32, torch.bfloat16)
Case = tuple[nn.Module, peft.LoraConfig]


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    kind, options = CASES[request.param]
    return made(kind), peft.LoraConfig(r=4, init_lora_weights=False, **options)


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def as_json(config: peft.LoraConfig, folder: Path) -> dict[str, object]:
    """The file that peft writes, but for the order of its sets, which is arbitrary."""
    config.save_pretrained(folder)
    fields = json.loads((folder / "adapter_config.json").read_text())
    sets = [name for name in ("target_modules", "exclude_modules") if isinstance(fields[name], list)]
    return fields | {name: sorted(fields[name]) for name in sets}


def test_a_config_is_hit_by_the_same_modules_as_in_peft(case: Case) -> None:
    model, config = case
    theirs = trainable(peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config)))  # it resolves its config
    assert trainable(surgery.inject(model, config)) == theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_peft_saves_gives_equal_outputs_here(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    model, config = case[0].to(dtype), case[1]
    before = outputs(model)
    theirs = trained(peft.get_peft_model(copy.deepcopy(model), config), 1 / 8)
    theirs.save_pretrained(tmp_path)
    ours = surgery.load(model, tmp_path)
    assert torch.equal(outputs(ours), outputs(theirs))
    assert not torch.equal(outputs(ours), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_saved_here_gives_equal_outputs_in_peft(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    model, config = case[0].to(dtype), case[1]
    before, other = outputs(model), copy.deepcopy(model)
    ours = trained(surgery.inject(model, config), 1 / 8)
    surgery.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    assert torch.equal(outputs(theirs), outputs(ours))
    assert not torch.equal(outputs(theirs), before)


def test_the_layout_of_the_weights_is_told_to_peft(case: Case, tmp_path: Path) -> None:
    model, config = case
    transposed = config.fan_in_fan_out
    config.fan_in_fan_out = False
    surgery.save(surgery.inject(model, config), tmp_path)
    assert peft.LoraConfig.from_pretrained(tmp_path).fan_in_fan_out == transposed


def test_a_folder_keeps_its_meaning_through_both_tools(case: Case, tmp_path: Path) -> None:
    model, config = case
    theirs = trained(peft.get_peft_model(copy.deepcopy(model), config), 1 / 8)
    theirs.save_pretrained(tmp_path / "theirs")
    surgery.save(surgery.load(copy.deepcopy(model), tmp_path / "theirs"), tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours")
    wanted, found = (peft.get_peft_model_state_dict(one) for one in (theirs, again))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_adapters_in_sub_folders_are_each_loaded_by_name(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(made("llama"), config)
    theirs.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    theirs.eval().save_pretrained(tmp_path)
    ours = surgery.load(made("llama"), tmp_path)
    surgery.load(ours, tmp_path / "other", adapter_name="other")
    seen = []
    for chosen in (["default"], ["other"], ["default", "other"]):
        theirs.base_model.set_adapter(chosen)
        surgery.set_adapter(ours, chosen)
        assert torch.equal(outputs(ours), outputs(theirs))
        seen.append(outputs(ours))
    assert not any(torch.equal(one, other) for one, other in zip(seen, seen[1:] + seen[:1], strict=True))


def test_a_named_adapter_saved_here_is_loaded_by_peft_under_its_name(tmp_path: Path) -> None:
    ours = made("llama")
    for name, targets in (("default", ["q_proj", "up_proj"]), ("other", ["up_proj"])):
        config = surgery.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        surgery.inject(ours, config, adapter_name=name)
    surgery.save(ours, tmp_path)
    surgery.save(ours, tmp_path / "alone", adapter_name="other")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["other"]
    theirs = peft.PeftModel.from_pretrained(made("llama"), tmp_path)
    theirs.load_adapter(tmp_path / "alone" / "other", "other")
    for chosen in ("default", "other"):
        theirs.set_adapter(chosen)
        surgery.set_adapter(ours, chosen)
        assert torch.equal(outputs(theirs.eval()), outputs(ours))


def test_every_field_that_peft_writes_is_read_and_written_again(tmp_path: Path) -> None:
    written = as_json(peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    ours = surgery.LoraConfig.from_json(written)
    assert ours == surgery.LoraConfig(r=4, target_modules=["q_proj"])
    assert ours.to_json() == written


def test_our_defaults_are_those_of_peft(tmp_path: Path) -> None:
    assert surgery.LoraConfig().to_json() == as_json(peft.LoraConfig(), tmp_path)


def test_a_config_written_here_is_the_same_config_in_peft(case: Case, tmp_path: Path) -> None:
    _, config = case
    written = as_json(config, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(surgery.LoraConfig.from_json(written).to_json()))
    assert as_json(peft.LoraConfig.from_pretrained(tmp_path), tmp_path / "again") == written


@pytest.mark.parametrize("spelled", ["peft object", "dict", "folder", "path as text"])
def test_inject_takes_a_config_however_it_is_spelled(spelled: str, tmp_path: Path) -> None:
    theirs = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2})
    fields = as_json(theirs, tmp_path)
    config = {"peft object": theirs, "dict": fields, "folder": tmp_path, "path as text": str(tmp_path)}[spelled]
    ours = surgery.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2})
    wanted, found = (surgery.inject(made("llama"), one).state_dict() for one in (ours, config))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


REFUSED = {
    "alora_invocation_tokens": ([1], "aLoRA"),
    "arrow_config": (peft.ArrowConfig(), "Arrow"),
    "init_lora_weights": ("mica", "trains A alone"),
    "kasa_config": (KasaConfig(), "KaSA"),
    "megatron_config": ({"x": 1}, "Megatron"),
    "megatron_core": ("other", "Megatron"),
    "monteclora_config": (MontecloraConfig(), "MonteCLoRA"),
    "velora_config": (VeloraConfig(), "VeLoRA"),
}


def test_every_field_that_is_not_served_stands_in_the_table() -> None:
    assert REFUSED.keys() == {*surgery.LoraConfig.neutral, "init_lora_weights"}


@pytest.mark.parametrize("field", REFUSED)
def test_a_setting_of_peft_that_is_not_served_is_refused_with_the_reason_and_the_next_step(field: str) -> None:
    model, (value, why) = made("llama"), REFUSED[field]
    before = dict(model.named_modules())
    with pytest.raises(surgery.SurgeryError, match=f"{field} is .*{why}.*; .*(PEFT|train)"):
        surgery.inject(model, peft.LoraConfig(target_modules=["q_proj"]).to_dict() | {field: value})
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("kind", [kind.value for kind in peft.PeftType if kind.value not in METHODS])
def test_a_method_of_peft_that_is_not_served_is_refused_by_name(kind: str) -> None:
    with pytest.raises(
        surgery.FormatError, match=f"peft_type is '{kind}'; .*; (run it in PEFT|see whether PEFT|merge it in PEFT)"
    ):
        surgery.inject(made("llama"), {"peft_type": kind, "target_modules": ["q_proj"]})


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
    ],
    ids=["pattern alone", "one pattern as target"],
)
def test_layers_that_would_go_unheard_are_refused_as_in_peft(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="layers_"):
        peft.LoraConfig(**fields)
    with pytest.raises(surgery.ConfigError, match="layers_"):
        surgery.inject(made("llama"), surgery.LoraConfig(**fields))


def test_a_config_without_peft_type_says_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(surgery.FormatError, match=r"adapter_config.json: it has no peft_type, .* one of LORA"):
        surgery.load(nn.Sequential(), tmp_path)
