"""Starts that examples give: what peft finds in them is found here, the base stays, and files are plain LoRA."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import initialize_lora_eva_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import surgery
from surgery.errors import ConfigError, MatchError, UsageError
from surgery.testing import assert_equivalent

EPS = torch.finfo(torch.float32).eps
FIELDS: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["0", "2"]}
EVA: dict[str, Any] = FIELDS | {"init_lora_weights": "eva"}
ROWS, BATCHES = 40, 4


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))


def batches(rows: int = ROWS, number: int = BATCHES) -> list[Tensor]:
    """Of inputs whose variance falls from one direction to the next, so that all of them are well apart."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q * torch.logspace(0, -2, 16).unsqueeze(1)
    return [torch.randn(rows, 16, generator=generator) @ mixed for _ in range(number)]


def eva_of_peft(model: nn.Module, examples: Any, fields: dict[str, Any], **given: Any) -> Any:
    settings = fields.pop("eva_config", {})
    theirs = peft.get_peft_model(model, peft.LoraConfig(**fields, eva_config=peft.EvaConfig(**settings)))
    initialize_lora_eva_weights(theirs, examples, show_progress_bar=False, **given)
    return theirs


PLAIN: dict[str, Any] = {
    "forward_fn": lambda model, x: model(x),
    "prepare_model_inputs_fn": None,
    "prepare_layer_inputs_fn": None,
}


def turned(x: Tensor, rank: int, updates: int) -> float:
    """How far rounding may turn one of the first principal directions of `x`: by its error over their distances."""
    S = torch.linalg.svdvals(x.double() - x.double().mean(0))
    apart = (S[:-1] - S[1:])[:rank].min()
    return float(updates * max(x.shape) * EPS * S[0] / apart)


@pytest.mark.parametrize(
    "settings",
    [{}, {"rho": 1.0}, {"whiten": True}, {"rho": 3, "adjust_scaling_factors": False}, {"tau": 0.9}],
    ids=str,
)
def test_eva_finds_the_directions_and_ranks_that_peft_finds(settings: dict[str, Any]) -> None:
    fields = EVA | {"eva_config": settings, "rank_pattern": {"2": 2}}
    theirs = eva_of_peft(made(), batches(), dict(fields), **PLAIN)
    model = made()
    ours = surgery.inject(model, surgery.LoraConfig(**fields), examples=batches())
    assert torch.equal(ours(batches()[0]), made()(batches()[0]))
    inner = theirs.base_model.model
    ranks = {name: inner[int(name)].lora_A.default.weight.shape[0] for name in ("0", "2")}
    assert (ranks != {"0": 3, "2": 2}) == (settings.get("rho") != 1.0)
    x = torch.cat(batches())
    for name, given in (("0", x), ("2", torch.tanh(made()[0](x)).detach())):
        mine, wanted = ours[int(name)], inner[int(name)]
        A, B = (wanted.lora_A.default.weight.detach(), wanted.lora_B.default.weight.detach())
        atol = turned(given, ranks[name], 3 * BATCHES) * float(A.abs().max())
        torch.testing.assert_close(mine.lora_A.default.weight.detach(), A, rtol=0.0, atol=atol)
        assert torch.equal(mine.lora_B.default.weight, B)
        assert mine.fitted["default"].method.scaling == wanted.scaling["default"]


class Tokens(nn.Module):
    """What takes tokens, a mask and labels, as a language model does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(32, 16), Conv1D(24, 16), nn.Linear(24, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        del attention_mask, labels
        found: Tensor = self.down(torch.relu(self.up(self.embed(input_ids))))
        return found


def tokens() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(BATCHES):
        ids = torch.randint(0, 32, (8, 12), generator=generator)
        mask = (torch.arange(12) < torch.randint(6, 13, (8, 1), generator=generator)).long()
        labels = torch.where(torch.arange(12) < 2, -100, ids)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@pytest.mark.parametrize("masked", [True, False], ids=["labels count", "labels do not"])
def test_padding_and_what_has_no_label_is_left_out_as_in_peft(masked: bool) -> None:
    fields = EVA | {"target_modules": ["up", "down"], "eva_config": {"use_label_mask": masked}}
    theirs = eva_of_peft(Tokens(), tokens(), dict(fields) | {"fan_in_fan_out": True})
    ours = surgery.inject(Tokens(), surgery.LoraConfig(**fields), examples=tokens())
    kept = [one["attention_mask"].bool() & ((one["labels"] != -100) | (not masked)) for one in tokens()]
    model = Tokens()
    embedded = torch.cat([model.embed(one["input_ids"])[mask] for one, mask in zip(tokens(), kept, strict=True)])
    for name, given in (("up", embedded), ("down", torch.relu(model.up(embedded)))):
        wanted = getattr(theirs.base_model.model, name).lora_A.default.weight.detach()
        atol = turned(given.detach(), len(wanted), 3 * BATCHES)
        torch.testing.assert_close(getattr(ours, name).lora_A.default.weight.detach(), wanted, rtol=0.0, atol=atol)


def test_eva_of_a_model_of_transformers_is_trained_and_its_file_gives_the_same_outputs_in_peft(tmp_path: Path) -> None:
    def llama() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()

    fields = {"r": 2, "target_modules": "all-linear", "init_lora_weights": "eva"}
    ours = surgery.inject(llama(), surgery.LoraConfig(**fields), examples=tokens())
    given = {"input_ids": tokens()[0]["input_ids"]}
    with torch.no_grad():
        assert torch.equal(ours(**given).logits, llama()(**given).logits)
    ranks = {name: len(one) for name, one in ours.named_parameters() if "lora_A" in name}
    assert len(set(ranks.values())) > 1
    assert sum(ranks.values()) == 2 * 14
    for name, values in ours.named_parameters():
        if "lora_B" in name:
            values.data.normal_()
    ours.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["init_lora_weights"] == "eva"
    assert len(told["target_modules"]) == len(ranks)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_equivalent(ours, theirs, given, base=llama())
    assert_equivalent(surgery.load(llama(), tmp_path), theirs, given, base=llama())


def test_a_layer_in_which_little_varies_gets_no_rank_and_no_adapter(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.narrow, self.wide = nn.Linear(16, 4), nn.Linear(64, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            found: Tensor = self.narrow(x) + self.wide(y)
            return found

    generator = torch.Generator().manual_seed(1)
    examples = [(one, torch.randn(80, 64, generator=generator)) for one in batches(80)]
    fields = {"r": 1, "target_modules": ["narrow", "wide"], "init_lora_weights": "eva"}
    ours = surgery.inject(Two(), surgery.LoraConfig(**fields), examples=examples)
    assert type(ours.wide) is nn.Linear
    assert ours.narrow.lora_A.default.weight.shape == (2, 16)
    surgery.save(ours, tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (told["target_modules"], told["rank_pattern"], told["alpha_pattern"]) == (
        ["narrow"],
        {"narrow": 2},
        {"narrow": 16.0},
    )


def test_what_peft_has_trained_from_eva_is_read_as_the_lora_that_it_is(tmp_path: Path) -> None:
    theirs = eva_of_peft(made(), batches(), EVA | {"eva_config": {"rho": 2.0}}, **PLAIN).eval()
    for name, values in theirs.named_parameters():
        if "lora_B" in name:
            values.data.normal_()
    theirs.save_pretrained(tmp_path)
    assert_equivalent(surgery.load(made(), tmp_path), theirs, batches()[0], base=made())


def test_examples_run_through_the_base_alone_and_leave_no_trace() -> None:
    wanted = surgery.inject(made(), surgery.LoraConfig(**EVA), examples=batches())
    model = surgery.inject(made(), surgery.LoraConfig(**FIELDS | {"init_lora_weights": False}), adapter_name="other")
    model.train()
    surgery.inject(model, surgery.LoraConfig(**EVA), adapter_name="eva", examples=iter(batches(number=40)))
    again = surgery.inject(made(), surgery.LoraConfig(**EVA), examples=batches(number=40))
    for layer in (0, 2):
        assert torch.equal(model[layer].lora_A.eva.weight, again[layer].lora_A.default.weight)
        assert not model[layer].base_layer._forward_pre_hooks
    assert model.training
    assert model.surgery_state.active == ("other",)
    assert not torch.equal(model(batches()[0]), wanted(batches()[0]))


@pytest.mark.parametrize("aware", [None, "nf4"], ids=["", "aware"])
def test_eva_starts_over_a_quantized_base(aware: str | None) -> None:
    torch.manual_seed(0)
    model = surgery.quantize(nn.Sequential(nn.Linear(64, 64)), "nf4")
    x = torch.randn(80, 64)
    before = model(x).detach()
    config = surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva", eva_config={"tau": 0.5})
    ours = surgery.inject(model, config, examples=[x], quantization_aware=aware)
    with torch.no_grad():
        assert_equivalent(lambda _given: before, ours, x)


@pytest.mark.parametrize(
    ("fields", "examples", "error", "said"),
    [
        ({}, lambda: None, UsageError, "examples: none are given, and init_lora_weights 'eva' starts from"),
        ({"init_lora_weights": True}, batches, UsageError, "examples are given, and this adapter starts without"),
        ({}, list, UsageError, "examples: there are none"),
        ({}, lambda: batches()[0], UsageError, "examples: a Tensor; an iterable of batches"),
        ({}, lambda: iter(batches(number=2)), UsageError, "after 2 batches .* an iterator runs once"),
        ({"eva_config": {"rho": 0.5}}, batches, ConfigError, "eva_config: rho is 0.5; a number from 1"),
        ({"eva_config": {"tau": 2}}, batches, ConfigError, "eva_config: tau is 2; a number from 0 to 1"),
        ({"eva_config": {"roh": 2}}, batches, ConfigError, "eva_config has 'roh'; rho, tau"),
        ({"eva_config": {"whiten": 1}}, batches, ConfigError, "eva_config: whiten is '1'"),
        ({"eva_config": {"label_mask_value": "x"}}, batches, ConfigError, "label_mask_value is 'x'"),
        ({"eva_config": [1]}, batches, ConfigError, "a table of its settings"),
        (
            {"eva_config": {"rho": 1}, "init_lora_weights": True},
            lambda: None,
            ConfigError,
            "init_lora_weights is not 'eva'",
        ),
        ({"lora_bias": True}, batches, ConfigError, "init_lora_weights True or False"),
        ({"target_parameters": ["0.weight"]}, batches, ConfigError, "goes without init_lora_weights 'eva'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_gives_no_start_is_refused_and_nothing_changes(
    fields: dict[str, Any], examples: Any, error: type[Exception], said: str
) -> None:
    model = made()
    with pytest.raises(error, match=said):
        surgery.inject(model, surgery.LoraConfig(**EVA | fields), examples=examples())
    assert [type(one) for one in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert not any(one._forward_pre_hooks for one in model)


def test_layers_that_no_example_reaches_and_others_than_linear_ones_are_refused() -> None:
    class First(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self[0](x)
            return found

    model = First([nn.Linear(16, 4), nn.Linear(16, 4)])
    with pytest.raises(MatchError, match="1: none of the examples came to it, and init_lora_weights 'eva' starts"):
        surgery.inject(model, surgery.LoraConfig(**EVA | {"target_modules": ["0", "1"]}), examples=batches())
    embedding = nn.Sequential(nn.Embedding(16, 4))
    with pytest.raises(MatchError, match="0: its op is embedding; init_lora_weights 'eva' is for Linear and Conv1D"):
        surgery.inject(embedding, surgery.LoraConfig(**EVA | {"target_modules": ["0"]}), examples=[torch.arange(16)])
