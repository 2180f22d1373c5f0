"""Which modules a config selects, and what is refused because it would select nothing, or nothing of ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import surgery
from surgery import ConfigError, LoraConfig, MatchError, UsageError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LAYERS = 3


@pytest.fixture(scope="module")
def tiny() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=13,
        pad_token_id=0,
        num_labels=3,
    )


@pytest.fixture
def model(tiny: LlamaConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny)


def _adapted(model: nn.Module, **fields: object) -> set[str]:
    surgery.inject(model, LoraConfig(**fields))
    return {name for name, module in model.named_modules() if hasattr(module, "fitted")}


def _named(*ends: str, layers: tuple[int, ...] = tuple(range(LAYERS))) -> set[str]:
    blocks = {"self_attn": ATTENTION, "mlp": MLP}
    return {f"model.layers.{i}.{b}.{end}" for i in layers for b, own in blocks.items() for end in own if end in ends}


def test_a_list_selects_by_suffix(model: nn.Module) -> None:
    assert _adapted(model, target_modules=["q_proj", "mlp.up_proj"]) == _named("q_proj", "up_proj")


def test_an_entry_matches_whole_parts_of_a_name_only(model: nn.Module) -> None:
    assert _adapted(model, target_modules=["1.self_attn.q_proj"]) == _named("q_proj", layers=(1,))
    with pytest.raises(MatchError):
        surgery.inject(model, LoraConfig(target_modules=["proj"]), adapter_name="other")


def test_a_string_is_one_regex_over_the_whole_name(model: nn.Module) -> None:
    assert _adapted(model, target_modules=r".*\.[02]\.mlp\.(up|gate)_proj") == _named(
        "up_proj", "gate_proj", layers=(0, 2)
    )


def test_a_regex_that_is_none_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="regular expression"):
        _adapted(model, target_modules="(q_proj")


def test_all_linear_leaves_out_the_output_head(model: nn.Module) -> None:
    assert _adapted(model, target_modules="all-linear") == _named(*ATTENTION, *MLP)


def test_all_linear_of_a_plain_module_is_every_linear_layer() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Embedding(3, 2), nn.Sequential(nn.Linear(2, 5)))
    assert _adapted(net, target_modules="all-linear") == {"0", "3.0"}


@pytest.mark.parametrize("exclude", [["v_proj", "2.self_attn.q_proj"], r".*v_proj|model\.layers\.2\.self_attn\.q_proj"])
def test_exclude_modules_wins(exclude: object, model: nn.Module) -> None:
    wanted = _named("q_proj", layers=(0, 1)) | _named("o_proj")
    targets = r".*\.(q|v|o)_proj"
    assert _adapted(model, target_modules=targets, exclude_modules=exclude) == wanted


def test_an_entry_that_is_wholly_excluded_is_refused_for_that_reason(model: nn.Module) -> None:
    with pytest.raises(MatchError, match=r"'v_proj'.*exclude"):
        _adapted(model, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])


@pytest.mark.parametrize(("layers", "wanted"), [(1, (1,)), ([0, 2], (0, 2))])
@pytest.mark.parametrize("pattern", [None, "layers", ["blocks", "layers"]])
def test_layers_to_transform_chooses_by_number(
    layers: object, wanted: tuple[int, ...], pattern: object, model: nn.Module
) -> None:
    found = _adapted(model, target_modules=["q_proj"], layers_to_transform=layers, layers_pattern=pattern)
    assert found == _named("q_proj", layers=wanted)


def test_patterns_give_ranks_and_scalings_of_their_own(model: nn.Module) -> None:
    fields = {"rank_pattern": {r"0\.self_attn\.q_proj": 3, "v_proj": 5}, "alpha_pattern": {"v_proj": 20}}
    _adapted(model, target_modules=["q_proj", "v_proj"], r=2, lora_alpha=8, **fields)
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "fitted"):
            one = module.fitted["default"]
            rank = one.params["A"].shape[0]
            assert one.params["B"].shape[1] == rank
            found[name.removeprefix("model.layers.")] = rank, one.method.scaling
    wanted = {f"{i}.self_attn.v_proj": (5, 4.0) for i in range(LAYERS)}
    wanted |= {f"{i}.self_attn.q_proj": (2, 4.0) for i in (1, 2)} | {"0.self_attn.q_proj": (3, 8 / 3)}
    assert found == wanted


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_the_first_pattern_that_hits_is_the_first_in_the_file_too(
    field: str, tiny: LlamaConfig, model: nn.Module, tmp_path: Path
) -> None:
    patterns, tokens = {"q_proj": 3, "1.self_attn.q_proj": 2}, torch.arange(5)[None]  # no sorted order
    surgery.inject(model, LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False, **{field: patterns}))
    surgery.save(model, tmp_path)
    torch.manual_seed(0)
    again = surgery.load(LlamaForCausalLM(tiny), tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    told = getattr(LoraConfig.from_pretrained(tmp_path), field)
    assert [*told.values()] == [*getattr(peft.LoraConfig.from_pretrained(tmp_path), field).values()] == [3, 2]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_hits_no_adapted_module_is_refused_by_its_key(field: str, model: nn.Module) -> None:
    with pytest.raises(MatchError, match=f"{field}: nothing matches 'v_proj'"):
        _adapted(model, target_modules=["q_proj"], **{field: {"q_proj": 4, "v_proj": 2}})
    assert not any(hasattr(module, "fitted") for module in model.modules())
    assert _adapted(model, target_modules=["q_proj"], **{field: {"q_proj": 4, "self_attn.q_proj": 2}})  # shadowed


def test_fields_that_are_not_served_may_be_given_as_peft_has_them_by_default() -> None:
    config = LoraConfig(target_modules=["q_proj"], bias="none", kasa_config=None, megatron_config=None)
    assert config == LoraConfig(target_modules=["q_proj"])
    with pytest.raises(TypeError, match="biases"):
        LoraConfig(target_modules=["q_proj"], biases="all")


def test_modules_to_save_are_trained_whole_and_not_adapted(model: nn.Module) -> None:
    found = _adapted(model, target_modules=["up_proj", "q_proj"], modules_to_save=["lm_head", "2.mlp"])
    assert found == _named("q_proj") | _named("up_proj", layers=(0, 1))
    trained = {name for name, values in model.named_parameters() if values.requires_grad and "lora_" not in name}
    saved = [f"model.layers.2.mlp.modules_to_save.default.{end}.weight" for end in MLP]
    assert trained == {"lm_head.modules_to_save.default.weight", *saved}


@pytest.mark.parametrize(
    ("entry", "near"),
    [
        ("qproj", {"q_proj", "o_proj", "k_proj"}),
        ("model.layers.0.self_attn.w_proj", {f"model.layers.0.self_attn.{end}" for end in ATTENTION}),
    ],
)
@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_an_entry_that_hits_nothing_is_refused_with_three_near_names(
    field: str, entry: str, near: set[str], model: nn.Module
) -> None:
    fields = {"target_modules": ["q_proj"]}
    with pytest.raises(MatchError, match=field) as caught:
        _adapted(model, **fields | {field: ["up_proj", entry]})
    told = str(caught.value).partition("nearest: ")[2].partition(")")[0].split(", ")
    assert repr(entry) in str(caught.value)
    assert "up_proj'" not in str(caught.value)  # the entry that does match is not blamed
    assert len(told) == 3
    assert len(near & set(told)) >= 2
    assert not any(hasattr(module, "fitted") for module in model.modules())


def test_a_config_without_targets_is_refused_where_nothing_tells_them() -> None:
    with pytest.raises(MatchError, match="target_modules is not given"):
        _adapted(nn.Sequential(nn.Linear(2, 2)), target_modules=None)


@pytest.mark.parametrize("targets", ["nothing.*", ["lm_head_"], []])
def test_a_config_that_selects_nothing_is_refused(targets: object, model: nn.Module) -> None:
    before = {name: values.requires_grad for name, values in model.named_parameters()}
    with pytest.raises(MatchError, match="target_modules"):
        _adapted(model, target_modules=targets)
    assert {name: values.requires_grad for name, values in model.named_parameters()} == before


def test_heads_that_a_task_may_have_need_not_be_there(tiny: LlamaConfig) -> None:
    model = LlamaForSequenceClassification(tiny)
    _adapted(model, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    assert "score.modules_to_save.default.weight" in dict(model.named_parameters())


def test_the_head_of_a_task_is_saved_though_no_one_names_it(tiny: LlamaConfig) -> None:
    model = LlamaForSequenceClassification(tiny)
    _adapted(model, target_modules="all-linear", task_type="SEQ_CLS")
    assert dict(model.named_parameters())["score.modules_to_save.default.weight"].requires_grad
    assert not any(name.startswith("score.lora_") for name, _ in model.named_parameters())


def test_heads_of_a_task_are_needed_without_the_task(tiny: LlamaConfig) -> None:
    with pytest.raises(MatchError, match="classifier"):
        _adapted(LlamaForSequenceClassification(tiny), target_modules=["q_proj"], modules_to_save=["classifier"])


class Doubled(nn.Linear):
    """A Linear that computes otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A Linear that computes as one."""


@pytest.mark.parametrize(
    "module",
    [nn.ConvTranspose2d(2, 2, 1), Doubled(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.LayerNorm(2)],
    ids=lambda m: type(m).__name__,
)
def test_a_module_that_is_none_of_ours_is_refused_and_nothing_changes(module: nn.Module) -> None:
    net = nn.ModuleDict({"good": nn.Linear(2, 2), "bad": module})
    keys, flags = list(net.state_dict()), [values.requires_grad for values in net.parameters()]
    with pytest.raises(MatchError, match=f"bad.*{type(module).__name__}"):
        _adapted(net, target_modules=["good", "bad"])
    assert list(net.state_dict()) == keys
    assert [values.requires_grad for values in net.parameters()] == flags
    assert net["bad"] is module


def test_a_subclass_that_computes_as_its_parent_is_adapted() -> None:
    assert _adapted(nn.Sequential(Renamed(2, 2)), target_modules=["0"]) == {"0"}


@pytest.mark.parametrize("sizes", [(0, 6), (6, 0)], ids=["inputs", "outputs"])
@pytest.mark.parametrize("fields", [{}, {"init_lora_weights": False}, {"use_qalora": True, "qalora_group_size": 2}])
def test_a_layer_without_inputs_or_outputs_is_adapted_as_others_are(
    sizes: tuple[int, int], fields: dict[str, Any]
) -> None:
    net, x = nn.Sequential(nn.Linear(*sizes)), torch.zeros(2, sizes[0])
    plain = net(x)
    assert _adapted(net, r=2, target_modules=["0"], **fields) == {"0"}
    assert torch.equal(net(x), plain)


FIELDS = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "target_modules": ["q_proj", "up_proj"], "use_rslora": True}
FIELDS |= {"modules_to_save": ["lm_head"], "init_lora_weights": False, "rank_pattern": {"up_proj": 2}}


def _spelled(kind: str, model: nn.Module, folder: Path) -> object:
    if kind == "dict":
        return {"peft_type": "LORA", **FIELDS}
    if kind == "peft":
        return peft.LoraConfig(**FIELDS, task_type="CAUSAL_LM")
    if kind == "folder of peft":
        peft.get_peft_model(model, peft.LoraConfig(**FIELDS)).save_pretrained(folder)
        return folder
    surgery.save(surgery.inject(model, LoraConfig(**FIELDS)), folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["dict", "folder", "folder of peft", "peft"])
def test_a_config_may_come_in_any_spelling(kind: str, tiny: LlamaConfig, tmp_path: Path) -> None:
    results = []
    for config in (LoraConfig(**FIELDS), _spelled(kind, LlamaForCausalLM(tiny), tmp_path)):
        torch.manual_seed(1)
        model = LlamaForCausalLM(tiny)
        torch.manual_seed(2)
        results.append(surgery.inject(model, config))
    wanted, found = (model.state_dict() for model in results)
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    flags = [[values.requires_grad for values in model.parameters()] for model in results]
    assert flags[0] == flags[1]
    methods = [
        [module.fitted["default"].method for module in model.modules() if hasattr(module, "fitted")]
        for model in results
    ]
    assert methods[0] == methods[1] != []


@pytest.mark.parametrize("config", [3, ["q_proj"], None, nn.Linear])
def test_what_is_no_config_is_refused(config: object, model: nn.Module) -> None:
    with pytest.raises(UsageError):
        surgery.inject(model, config)


def _parametrized() -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (_parametrized, "remove the parametrization"),
        (lambda: nn.LazyLinear(3), "call the model once"),
        (lambda: nn.Embedding(5, 3, max_norm=1.0), "max_norm"),
        (lambda: nn.LayerNorm(3), "LayerNorm"),
    ],
)
def test_a_module_whose_weight_cannot_be_adapted_is_refused_with_the_reason(
    module: Callable[[], nn.Module], why: str
) -> None:
    model = nn.Sequential(module())
    before = [*model.state_dict()], [values.requires_grad for values in model.parameters()]
    with pytest.raises(MatchError, match=why):
        surgery.inject(model, LoraConfig(r=2, target_modules=["0"]))
    assert ([*model.state_dict()], [values.requires_grad for values in model.parameters()]) == before


def test_a_model_that_is_one_layer_is_told_to_be_wrapped() -> None:
    with pytest.raises(MatchError, match="wrap it"):
        surgery.inject(nn.Linear(3, 3), LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "target_modules is not given; a list .* 'all-linear' is wanted"),
        ({"target_modules": ["fc"], "rank_pattern": {"fd": 4}}, "rank_pattern: nothing matches 'fd' .*nearest: fc"),
        ({"target_modules": ["fc"], "alpha_pattern": {"fc": 4, "0.x": 2}}, "alpha_pattern: nothing matches '0.x'"),
    ],
)
def test_a_choice_that_chooses_nothing_is_refused(fields: dict[str, Any], words: str) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    with pytest.raises(surgery.SurgeryError, match=words):
        surgery.inject(model, surgery.LoraConfig(**fields))
    assert type(model["fc"]) is nn.Linear


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("bias", "some", "bias is 'some'; 'none', 'all' or 'lora_only' is wanted"),
        ("kasa_config", {"svd_rank": 2}, "kasa_config: KaSA first cuts the base down"),
    ],
)
def test_a_field_of_peft_that_is_not_served_is_refused_with_the_reason(field: str, value: object, words: str) -> None:
    with pytest.raises(surgery.ConfigError, match=words):
        surgery.LoraConfig(target_modules=["fc"], **{field: value})
    assert surgery.LoraConfig(target_modules=["fc"], bias="none").bias == "none"  # as every tutorial writes
