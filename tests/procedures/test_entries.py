"""How a new config names modules: dots as dots, globs, `re:`; and what is saved of it, which peft reads the same."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery import ConfigError, LoraConfig, MatchError

LAYERS = 3


def made() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 13}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=LAYERS))


def ranks(model: nn.Module) -> dict[str, tuple[int, float]]:
    """r and scaling of each adapted module, without the words that all have."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            found[name.removeprefix("base_model.model.")] = module.r["default"], module.scaling["default"]
        elif hasattr(module, "fitted"):
            one = module.fitted["default"]
            found[name] = one.params["A"].shape[0], one.method.scaling
    return {name.replace("model.layers.", ""): told for name, told in found.items()}


ALL = {f"{i}.self_attn.{one}_proj" for i in range(LAYERS) for one in "qkvo"}
ALL |= {f"{i}.mlp.{one}_proj" for i in range(LAYERS) for one in ("gate", "up", "down")}
CHOICES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a glob": ({"target_modules": ["1.*.q_proj"]}, {"1.self_attn.q_proj"}),
    "a glob within a part": ({"target_modules": ["mlp.*_proj"]}, {one for one in ALL if "mlp" in one}),
    "a glob of any parts": ({"target_modules": ["layers.0.**_proj"]}, {one for one in ALL if one[0] == "0"}),
    "one character": ({"target_modules": ["layers.?.mlp.up_proj"]}, {f"{i}.mlp.up_proj" for i in range(LAYERS)}),
    "an expression": ({"target_modules": [r"re:.*\.[02]\.mlp\.(up|gate)_proj", "1.mlp.up_proj"]},
                      {"0.mlp.up_proj", "0.mlp.gate_proj", "2.mlp.up_proj", "2.mlp.gate_proj", "1.mlp.up_proj"}),
    "one expression": ({"target_modules": r"re:.*\.1\.mlp\.up_proj"}, {"1.mlp.up_proj"}),
    "one of peft's": ({"target_modules": r".*\.1\.mlp\.up_proj"}, {"1.mlp.up_proj"}),
    "one name": ({"target_modules": "model.layers.1.mlp.up_proj"}, {"1.mlp.up_proj"}),
    "a glob in chosen layers": ({"target_modules": ["*.mlp.up_proj"], "layers_to_transform": 0}, {"0.mlp.up_proj"}),
    "an expression in chosen layers": ({"target_modules": ["re:.*up_proj"], "layers_to_transform": [0, 2],
                                        "layers_pattern": "layers"}, {"0.mlp.up_proj", "2.mlp.up_proj"}),
    "exclusion": ({"target_modules": ["up_proj"], "exclude_modules": ["0.mlp.*"]},
                  {"1.mlp.up_proj", "2.mlp.up_proj"}),
}  # fmt: skip
each_choice = pytest.mark.parametrize(("fields", "wanted"), CHOICES.values(), ids=CHOICES.keys())


@each_choice
def test_entries_choose_what_they_say_and_peft_reads_what_is_saved_the_same(
    fields: dict[str, Any], wanted: set[str], tmp_path: Path
) -> None:
    model = surgery.inject(made(), LoraConfig(r=2, **fields))
    assert ranks(model).keys() == wanted
    surgery.save(model, tmp_path)
    assert ranks(peft.PeftModel.from_pretrained(made(), tmp_path)) == ranks(model)


KEYS: dict[str, tuple[str, set[str]]] = {
    "the end of a name": ("0.mlp.up_proj", {"0.mlp.up_proj"}),
    "a glob": ("1.*.up_proj", {"1.mlp.up_proj"}),
    "a glob at the start": ("*_proj", {f"{i}.mlp.up_proj" for i in range(LAYERS)}),
    "an expression": (r"re:[12]\.mlp\.up_proj", {"1.mlp.up_proj", "2.mlp.up_proj"}),
    "one of peft's": (r"(0|2)\.mlp\.up_proj", {"0.mlp.up_proj", "2.mlp.up_proj"}),
}


@pytest.mark.parametrize(("key", "hit"), KEYS.values(), ids=KEYS.keys())
def test_keys_of_patterns_are_entries_too(key: str, hit: set[str], tmp_path: Path) -> None:
    fields = {"r": 2, "lora_alpha": 4, "rank_pattern": {key: 3}, "alpha_pattern": {key: 9}}
    model = surgery.inject(made(), LoraConfig(target_modules=["up_proj"], **fields))
    assert {name for name, told in ranks(model).items() if told == (3, 3.0)} == hit
    assert {name for name, told in ranks(model).items() if told == (2, 2.0)} == ranks(model).keys() - hit
    surgery.save(model, tmp_path)
    assert ranks(peft.PeftModel.from_pretrained(made(), tmp_path)) == ranks(model)


class Dotted(nn.Module):
    """Two layers that a pattern of peft cannot tell apart: a dot of it is any character."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"b": nn.Linear(4, 4)})
        self.aXb = nn.Linear(4, 4)


def test_a_dot_is_a_dot_unless_peft_is_followed() -> None:
    fields = {"r": 2, "target_modules": ["b", "aXb"], "rank_pattern": {"a.b": 3}}
    assert {name: r for name, (r, _) in ranks(surgery.inject(Dotted(), LoraConfig(**fields))).items()} == {
        "a.b": 3,
        "aXb": 2,
    }
    theirs = peft.get_peft_model(Dotted(), peft.LoraConfig(**fields))
    followed = [
        surgery.inject(Dotted(), LoraConfig(**fields), matching="peft"),
        surgery.inject(Dotted(), peft.LoraConfig(**fields)),
    ]
    for ours in followed:
        assert ranks(ours) == ranks(theirs) == {"a.b": (3, 8 / 3), "aXb": (3, 8 / 3)}
    one = {"r": 2, "target_modules": "a.b"}
    assert ranks(surgery.inject(Dotted(), LoraConfig(**one))).keys() == {"a.b"}
    assert ranks(surgery.inject(Dotted(), LoraConfig(**one), matching="peft")).keys() == {"a.b", "aXb"}


MISSES: dict[str, dict[str, Any]] = {
    "target_modules: nothing matches 'layers.7.*'": {"target_modules": ["q_proj", "layers.7.*"]},
    "target_modules: nothing matches 're:mlp.*'": {"target_modules": ["q_proj", "re:mlp.*"]},
    "exclude_modules: nothing matches 'k_prj'": {"target_modules": ["q_proj"], "exclude_modules": ["k_prj"]},
    "modules_to_save: nothing matches '*_heads'": {"target_modules": ["q_proj"], "modules_to_save": ["*_heads"]},
    "rank_pattern: nothing matches '7.*.q_proj'": {"target_modules": ["q_proj"], "rank_pattern": {"7.*.q_proj": 4}},
    "alpha_pattern: nothing matches 're:.*up'": {"target_modules": ["q_proj"], "alpha_pattern": {"re:.*up": 4}},
}


@pytest.mark.parametrize(("told", "fields"), MISSES.items(), ids=MISSES.keys())
def test_an_entry_that_hits_nothing_is_refused_as_it_was_spelled(told: str, fields: dict[str, Any]) -> None:
    model = made()
    with pytest.raises(MatchError) as caught:
        surgery.inject(model, LoraConfig(**fields))
    assert str(caught.value).startswith(told)
    assert not any(hasattr(module, "fitted") for module in model.modules())


def test_where_peft_is_followed_only_a_config_that_hits_nothing_is_refused() -> None:
    loose = LoraConfig(target_modules=["q_proj", "nowhere"], exclude_modules=["k_prj"], rank_pattern={"w": 3})
    assert ranks(surgery.inject(made(), loose, matching="peft")).keys() == {f"{i}.self_attn.q_proj" for i in range(3)}
    with pytest.raises(MatchError, match="nothing matches 'nowhere'"):
        surgery.inject(made(), LoraConfig(target_modules=["nowhere"]), matching="peft")
    with pytest.raises(surgery.UsageError, match="strict or peft is wanted"):
        surgery.inject(made(), loose, matching="loose")


def test_an_expression_is_bounded_in_time_and_one_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        surgery.inject(made(), LoraConfig(target_modules=["re:(q_proj"]))
    long = nn.Sequential()
    long.add_module("a" * 60, nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="patterns take more than"):
        surgery.inject(long, LoraConfig(target_modules=["re:(a|aa)+!"]))


class Nested(nn.Module):
    """A module whose whole name ends that of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.inner = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})


def test_a_name_that_ends_another_is_saved_so_that_peft_adapts_that_one_alone(tmp_path: Path) -> None:
    model = surgery.inject(Nested(), LoraConfig(r=2, target_modules="re:fc"))
    assert ranks(model).keys() == {"fc"}
    surgery.save(model, tmp_path)
    assert ranks(peft.PeftModel.from_pretrained(Nested(), tmp_path)) == ranks(model)
    assert ranks(surgery.load(Nested(), tmp_path)) == ranks(model)
