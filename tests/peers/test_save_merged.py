"""save_merged of models of transformers: a plain checkpoint, which transformers alone loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_llama import FIRST, SMALL, adapted, llama, outputs, state, unchanged
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM, PreTrainedModel

import surgery


def loaded_plainly(kind: Any, folder: Path) -> PreTrainedModel:
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is kind
    return model


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
def test_a_merged_checkpoint_is_a_plain_one_and_the_model_stays_as_it_is(merged: bool, tmp_path: Path) -> None:
    model = adapted()
    config, before = model.config.to_dict(), state(model)
    if merged:
        model.merge_adapter()
    held = state(model)
    model.save_merged(tmp_path / "out")
    assert unchanged(model, held)
    assert model.config.to_dict() == config
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    (tmp_path / "other").touch()
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "other").stat().st_mode}
    plain = loaded_plainly(LlamaForCausalLM, tmp_path / "out")
    if not merged:
        surgery.merge(model)
    assert torch.equal(outputs(plain), outputs(model))
    assert unchanged(surgery.unmerge(model), before)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_trained_head_is_in_the_merged_checkpoint_apart_from_the_embedding(tied: bool, tmp_path: Path) -> None:
    config = surgery.LoraConfig(**FIRST, modules_to_save=["lm_head"])
    model = surgery.inject(llama(tie_word_embeddings=tied), config)
    with torch.no_grad():
        model.lm_head.running.weight.add_(1)
    surgery.save_merged(model, tmp_path / "out")
    assert model.config.tie_word_embeddings is tied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    plain = loaded_plainly(LlamaForCausalLM, tmp_path / "out")
    assert torch.equal(outputs(plain), outputs(surgery.merge(model)))


def test_a_tied_model_is_saved_merged_with_its_tie(tmp_path: Path) -> None:
    model = surgery.inject(llama(tie_word_embeddings=True), surgery.LoraConfig(**FIRST))
    surgery.save_merged(model, tmp_path / "out")
    plain = loaded_plainly(LlamaForCausalLM, tmp_path / "out")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.equal(outputs(plain), outputs(surgery.merge(model)))


def test_a_classifier_is_saved_merged_with_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)).eval()
    config = surgery.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    model = surgery.inject(base, config)
    surgery.save_merged(model, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    plain = loaded_plainly(BertForSequenceClassification, tmp_path / "out")
    assert torch.equal(outputs(plain), outputs(surgery.merge(model)))


def test_a_merged_checkpoint_takes_the_place_of_another_only_when_told(tmp_path: Path) -> None:
    model = adapted()
    surgery.save_merged(model, tmp_path / "out")
    with pytest.raises(surgery.OutputExistsError):
        surgery.save_merged(model, tmp_path / "out")
    (tmp_path / "out" / "stale").touch()
    surgery.save_merged(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir() if "surgery" in path.name] == []


def test_a_merge_that_cannot_be_saved_leaves_no_folder_and_the_model_as_it_is(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.q_proj").lora_A.first.weight[0, 0] = torch.nan
    before = state(model)
    with pytest.raises(surgery.ValueRangeError):
        surgery.save_merged(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert all(values.equal(before[name]) or values.isnan().any() for name, values in model.state_dict().items())


def test_other_modules_and_models_without_adapters_are_not_saved_merged(tmp_path: Path) -> None:
    with pytest.raises(surgery.UsageError, match="a model of transformers is wanted"):
        surgery.save_merged(nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(surgery.StateError, match="no adapters"):
        surgery.save_merged(llama(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
