"""adapter_names on models of transformers: rows are what they are alone, and what peft makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import surgery
from surgery import StateError, UsageError

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
TOKENS = torch.arange(30).reshape(5, 6)
NAMES = ["a", "__base__", "b", "a", "b"]
CONFIGS = {
    "a": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "b": {"r": 2, "target_modules": ["q_proj", "v_proj", "embed_tokens"]},
}
# Each output has passed 2 layers of 7 linears and 4 norms and products of at most 64 terms, each rounded once or twice.
BOUND = 2 * 2 * 11 * 64 * torch.finfo(torch.float64).eps


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, pad_token_id=0)).eval().double()


def of_peft(folder: Path) -> tuple[peft.PeftModel, PreTrainedModel]:
    """Under two adapters in peft, and the same read from its files."""
    made, ours = None, llama()
    for name, fields in CONFIGS.items():
        config = peft.LoraConfig(**fields, init_lora_weights=False)
        if made is None:
            made = peft.get_peft_model(llama(), config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    assert made is not None
    made.eval().double().save_pretrained(folder)
    for name in CONFIGS:
        surgery.load(ours, folder / name, adapter_name=name)
    return made, ours.double().eval()


def adapted(model: Any = None) -> Any:
    model = llama() if model is None else model
    for name, fields in CONFIGS.items():
        surgery.inject(model, surgery.LoraConfig(**fields, init_lora_weights=False), adapter_name=name)
    return model.double()


def alone(model: Any, row: int, names: Sequence[str] = NAMES) -> Tensor:
    with surgery.set_adapter(model, [] if names[row] == "__base__" else names[row]), torch.no_grad():
        return model(TOKENS[row : row + 1]).logits


def generated(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    found: Tensor = model.generate(tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
    return found


def generated_alone(model: Any, **options: Any) -> Tensor:
    rows = []
    for row, name in enumerate(NAMES):
        with surgery.set_adapter(model, [] if name == "__base__" else name):
            rows.append(generated(model, TOKENS[row : row + 1], **options))
    return torch.cat(rows)


def within(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= BOUND * max(1, wanted.abs().max()))


def test_outputs_are_those_of_peft_and_of_each_row_alone(tmp_path: Path) -> None:
    theirs, ours = of_peft(tmp_path)
    before = alone(ours, 0)
    with torch.no_grad():
        found = ours(input_ids=TOKENS, adapter_names=NAMES).logits
        assert within(found, theirs(input_ids=TOKENS, adapter_names=NAMES).logits)
    assert within(found, torch.cat([alone(ours, row) for row in range(5)]))
    assert not within(found, torch.cat([alone(ours, row, ["a"] * 5) for row in range(5)]))
    assert torch.equal(alone(ours, 0), before)


@pytest.mark.parametrize("field", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 7, 12]}], ids=str)
def test_heads_and_rows_of_each_adapters_own_are_those_of_peft(
    field: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(CONFIGS, "a", CONFIGS["a"] | field)
    monkeypatch.setitem(CONFIGS, "b", {"r": 2, "target_modules": ["v_proj"]} | field)
    theirs, ours = of_peft(tmp_path)
    with torch.no_grad():
        for model in (theirs, ours):
            for name, values in model.named_parameters():
                if "modules_to_save" in name or "trainable_tokens_delta" in name:
                    values.copy_(torch.linspace(-1, 1, values.numel()).view(values.shape) * (1 + (".b" in name)))
        found = ours(input_ids=TOKENS, adapter_names=NAMES).logits
        assert within(found, theirs(input_ids=TOKENS, adapter_names=NAMES).logits)
    assert within(found, torch.cat([alone(ours, row) for row in range(5)]))
    assert not within(found, torch.cat([alone(ours, row, ["a"] * 5) for row in range(5)]))
    options = {"adapter_names": NAMES, "num_beams": 2}
    assert torch.equal(generated(ours, TOKENS, **options), generated_alone(ours, num_beams=2))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_generate_gives_the_tokens_of_peft_and_of_each_row_alone(options: dict[str, int], tmp_path: Path) -> None:
    theirs, ours = of_peft(tmp_path)
    found = ours.generate(TOKENS, adapter_names=NAMES, max_new_tokens=6, do_sample=False, **options)
    wanted = theirs.generate(input_ids=TOKENS, adapter_names=NAMES, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(found, wanted)
    assert torch.equal(generated(ours, TOKENS, adapter_names=NAMES, **options), generated_alone(ours, **options))
    assert not torch.equal(found, generated(ours, TOKENS, **options))


def test_beams_may_be_told_by_the_models_own_config_or_run_in_a_context() -> None:
    ours = adapted()
    ours.generation_config.num_beams = 2
    wanted = generated_alone(ours)
    assert torch.equal(generated(ours, TOKENS, adapter_names=NAMES), wanted)
    rows = torch.cat([alone(ours, row) for row in range(5)])
    with surgery.mixed_batch(ours, NAMES):
        assert torch.equal(generated(ours, TOKENS), wanted)
        assert within(ours(TOKENS).logits, rows)  # no longer one for each beam
    assert torch.equal(generated_alone(ours), wanted)


def test_several_samples_of_a_row_are_all_under_its_adapter() -> None:
    ours = adapted()
    found = ours.generate(
        TOKENS, adapter_names=NAMES, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=2
    )
    assert torch.equal(
        found, ours.generate(TOKENS, adapter_names=NAMES, max_new_tokens=4, do_sample=False).repeat_interleave(2, 0)
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_an_encoder_sees_each_row_once_and_the_decoder_every_beam(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    model: Any = T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)).eval()
    for name in "ab":
        config = surgery.LoraConfig(r=4, lora_alpha=64, target_modules=["q", "v"], init_lora_weights=False)
        surgery.inject(model, config, adapter_name=name)
    model.double()
    found = generated(model, TOKENS, adapter_names=NAMES, **options)
    assert torch.equal(found, generated_alone(model, **options))
    assert not torch.equal(found, generated(model, TOKENS, **options))


def test_each_adapter_is_trained_by_its_own_rows() -> None:
    ours = adapted().train()
    ours.set_adapter(["a", "b"])
    ours(input_ids=TOKENS[:2], labels=TOKENS[:2], adapter_names=["a", "__base__"]).loss.backward()
    had = {name for name, values in ours.named_parameters() if values.grad is not None}
    assert had == {name for name, _ in ours.named_parameters() if ".a." in name}


def test_with_gradient_checkpointing_the_call_is_refused_and_the_context_trains() -> None:
    ours = adapted().train()
    ours.set_adapter(["a", "b"])
    options = {"input_ids": TOKENS, "labels": TOKENS}
    ours(**options, adapter_names=NAMES).loss.backward()
    wanted = {name: values.grad for name, values in ours.named_parameters() if values.grad is not None}
    ours.zero_grad()
    ours.gradient_checkpointing_enable()
    with pytest.raises(UsageError, match="around both"):
        ours(**options, adapter_names=NAMES)
    with surgery.mixed_batch(ours, NAMES):
        ours(**options).loss.backward()
    found = {name: values.grad for name, values in ours.named_parameters() if values.grad is not None}
    assert found.keys() == wanted.keys()
    assert all(within(found[name], one) for name, one in wanted.items())


@pytest.mark.parametrize("names", [["a"], [*NAMES, "a"]], ids=str)
def test_a_number_of_names_unlike_the_batch_is_refused(names: list[str]) -> None:
    ours = adapted()
    wanted = alone(ours, 0)
    with pytest.raises(UsageError, match=f"{len(names)} adapter_names"):
        ours(TOKENS, adapter_names=names)
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(UsageError, match="adapter_names"):
            generated(ours, TOKENS, adapter_names=names, **options)
    assert torch.equal(alone(ours, 0), wanted)


def test_an_unknown_adapter_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(StateError, match="there are: a, b"):
        adapted()(TOKENS, adapter_names=["a", "b", "c", "a", "a"])
    with pytest.raises(StateError, match="there are: a, b"):
        generated(adapted(), TOKENS, adapter_names=["a", "b", "c", "a", "a"])


def test_a_model_that_does_not_generate_gets_no_generate() -> None:
    model: Any = BertModel(BertConfig(**SMALL))
    surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["query"]), adapter_name="a")
    assert "generate" not in dir(model)
    assert model.eval()(TOKENS, adapter_names=["a", *["__base__"] * 4])[0].shape == (5, 6, 32)


def test_ejected_the_model_has_its_own_generate() -> None:
    ours = adapted()
    generated(ours, TOKENS, adapter_names=NAMES)
    surgery.eject(ours)
    assert type(ours) is LlamaForCausalLM
    with pytest.raises(ValueError, match="adapter_names"):
        generated(ours, TOKENS, adapter_names=NAMES)
