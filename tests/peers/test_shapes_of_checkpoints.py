"""Tied heads, grown vocabularies and heads that only the adapter brings: the merged model computes what PEFT's does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoint_folders import file_hashes
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    CTRLConfig,
    CTRLLMHeadModel,
    ElectraConfig,
    ElectraForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Pop2PianoConfig,
    Pop2PianoForConditionalGeneration,
)

import surgery

VOCAB, R = 24, 4
INPUTS = torch.arange(20).reshape(2, 10) % VOCAB
# The grid of the exact arithmetic is off by r * 2^-21 in each product; 16 is the number of adapted matrices, at most.
CLOSE = 16 * R * 2.0**-21


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def shuffled(model: nn.Module) -> nn.Module:
    """All that is trained is random, so that nothing an adapter does is nothing."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def adapter_of(base: nn.Module, folder: Path, targets: list[str], save: bool = False, **fields: Any) -> Tensor:
    """An adapter made by PEFT, in `folder`; returns the adapted model's logits."""
    config = peft.LoraConfig(r=R, lora_alpha=8, target_modules=targets, **fields)
    model = shuffled(peft.get_peft_model(base, config))
    logits = model(INPUTS).logits.detach()
    model.save_pretrained(folder, save_embedding_layers=True if save else "auto")
    return logits


def refused(base: Path, adapter: Path, out: Path) -> str:
    with pytest.raises(surgery.MatchError) as error:
        surgery.merge_checkpoint(base, adapter, out)
    assert not out.exists()
    return str(error.value)


def check(base: Path, adapter: Path, wanted: Tensor, auto: type, **options: Any) -> Mapping[str, Any]:
    """Merge, load with plain transformers, compare the logits, unmerge; returns the merged config."""
    out = base.with_name("out")
    surgery.merge_checkpoint(base, adapter, out, reversible=True, **options)
    merged, told = auto.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    found = merged.eval()(INPUTS).logits.detach()
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= CLOSE * wanted.abs().max()
    surgery.unmerge_checkpoint(out, base.with_name("back"))
    assert file_hashes(base.with_name("back")) == file_hashes(base)
    config: Mapping[str, Any] = json.loads((out / "config.json").read_text())
    return config


TIED = {
    "the embedding adapted": (["embed_tokens", "q_proj"], None),
    "the head adapted": (["lm_head", "v_proj"], None),
    "both adapted": (["embed_tokens", "lm_head"], None),
    "both trained": (["q_proj"], ["embed_tokens", "lm_head"]),
    "the head trained": (["q_proj"], ["lm_head"]),
    "the embedding trained": (["q_proj"], ["embed_tokens"]),
}


@pytest.mark.parametrize(("targets", "trained"), TIED.values(), ids=TIED.keys())
def test_a_tied_model_is_refused_or_untied(targets: list[str], trained: list[str] | None, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = llama(tied=True)
    model.save_pretrained(base)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    plain = model(INPUTS).logits.detach()
    logits = adapter_of(model, adapter, targets, modules_to_save=trained)
    assert (logits - plain).abs().max() > 100 * CLOSE * logits.abs().max()
    assert "`tied=untie`" in refused(base, adapter, tmp_path / "out")
    config = check(base, adapter, logits, AutoModelForCausalLM, tied="untie")
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_has_grown_grows_the_merged_model(tied: bool, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = llama(tied)
    model.save_pretrained(base)
    model.resize_token_embeddings(VOCAB + 8)
    logits = adapter_of(model, adapter, ["q_proj", "v_proj"], save=True)
    config = check(base, adapter, logits, AutoModelForCausalLM)
    assert config["vocab_size"] == VOCAB + 8
    assert config["tie_word_embeddings"] is tied


def test_a_grown_vocabulary_may_be_trained(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = llama(tied=False)
    model.save_pretrained(base)
    model.resize_token_embeddings(VOCAB + 8)
    logits = adapter_of(model, adapter, ["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    assert check(base, adapter, logits, AutoModelForCausalLM)["vocab_size"] == VOCAB + 8


def test_a_vocabulary_that_grows_in_one_place_alone_is_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = llama(tied=False)
    model.save_pretrained(base)
    model.resize_token_embeddings(VOCAB + 8)
    adapter_of(model, adapter, ["q_proj"], modules_to_save=["embed_tokens"])
    assert "lm_head.weight keeps the base's" in refused(base, adapter, tmp_path / "out")


def test_the_head_of_a_decoder_that_only_the_adapter_brings_is_added(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    llama(tied=True).save_pretrained(base)
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
    logits = adapter_of(model, adapter, ["q_proj"], task_type="SEQ_CLS")
    surgery.merge_checkpoint(base, adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == 3
    assert (tmp_path / "out" / "model.safetensors").is_file()
    merged, told = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", pad_token_id=0, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert (merged.eval()(INPUTS).logits - logits).abs().max() <= CLOSE * logits.abs().max()


def test_the_head_of_a_headless_encoder_is_added(tmp_path: Path) -> None:
    """Its sites bear a prefix, `bert.`, that the headless base's lack."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=VOCAB, **sizes)
    BertModel(config).eval().save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    logits = adapter_of(model, adapter, ["query", "value"], task_type="SEQ_CLS")
    found = check(base, adapter, logits, AutoModelForSequenceClassification)
    assert found["architectures"] == ["BertForSequenceClassification"]
    plan = surgery.plan(base, adapter)
    assert any("classifier.weight is not in the base" in note for note in plan.notes)


@pytest.mark.parametrize("trained", [False, True])
def test_a_tie_that_cannot_be_taken_apart_is_refused(trained: bool, tmp_path: Path) -> None:
    """The heads of these have other names than lm_head, or the embedding has one of its own."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    torch.manual_seed(0)
    if trained:
        config = CTRLConfig(vocab_size=VOCAB, n_embd=16, n_head=2, n_layer=1, dff=24)
        model, targets, save = CTRLLMHeadModel(config), ["Wq"], ["w"]
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = ElectraConfig(vocab_size=VOCAB, embedding_size=16, **sizes)
        model, targets, save = ElectraForCausalLM(config), ["word_embeddings"], None
    model.save_pretrained(base)
    adapter_of(model, adapter, targets, modules_to_save=save)
    with pytest.raises(surgery.MatchError, match="tied"):
        surgery.merge_checkpoint(base, adapter, tmp_path / "out", tied="untie")


@pytest.mark.parametrize("saved", [None, ["generator_lm_head"]], ids=["adapted", "saved"])
def test_a_head_that_the_files_lack_for_it_is_tied_is_told_so(saved: list[str] | None, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ElectraForCausalLM(ElectraConfig(vocab_size=VOCAB, embedding_size=16, **sizes))
    model.save_pretrained(tmp_path / "base")
    adapter_of(model, tmp_path / "adapter", ["query"] if saved else ["generator_lm_head"], modules_to_save=saved)
    told = refused(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "generator_lm_head" in told
    assert "tied to electra.embeddings.word_embeddings.weight, and only it is adapted; save the base with" in told


@pytest.mark.parametrize("saved", [["shared"], None], ids=["saved", "adapted"])
def test_an_embedding_that_others_are_tied_to_is_not_changed_alone(saved: list[str] | None, tmp_path: Path) -> None:
    """Its encoder and decoder read it by modules of their own, over which no adapter lies; its head is another."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = Pop2PianoForConditionalGeneration(Pop2PianoConfig(vocab_size=VOCAB, **sizes))
    model.save_pretrained(tmp_path / "base")
    config = surgery.LoraConfig(r=R, target_modules=["q"] if saved else ["shared"], modules_to_save=saved)
    surgery.inject(model, config)
    surgery.save(shuffled(model), tmp_path / "adapter")
    told = refused(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert all(
        one in told for one in ("shared.weight: ", "encoder.embed_tokens", "decoder.embed_tokens", "apart first")
    )


def test_a_vocabulary_may_grow_under_an_adapted_embedding(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = llama(tied=False)
    model.save_pretrained(base)
    model.resize_token_embeddings(VOCAB + 8)
    logits = adapter_of(model, adapter, ["embed_tokens", "lm_head"], save=True)
    assert check(base, adapter, logits, AutoModelForCausalLM)["vocab_size"] == VOCAB + 8
