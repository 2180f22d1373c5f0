"""A vocabulary under adapters keeps its size and its ties; beside them it is resized as ever."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_llama import FIRST, adapted, llama, outputs, state, unchanged
from transformers import LlamaForCausalLM

import surgery


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_under_an_adapter_keeps_its_size(options: dict[str, Any], tied: bool) -> None:
    model = surgery.inject(llama(tie_word_embeddings=tied), surgery.LoraConfig(**(FIRST | options)))
    before, size = state(model), model.config.vocab_size
    for asked in ({"new_num_tokens": size + 11}, {"pad_to_multiple_of": size - 1}):
        with pytest.raises(surgery.StateError, match=f"of {size} tokens; resize the model first"):
            model.resize_token_embeddings(**asked)
    assert unchanged(model, before)
    model.resize_token_embeddings(size)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [1]},
    ],
    ids=str,
)
def test_tied_weights_under_adapters_are_tied_again_as_they_are(options: dict[str, Any]) -> None:
    model = surgery.inject(llama(tie_word_embeddings=True), surgery.LoraConfig(**(FIRST | options)))
    before, running = state(model), outputs(model)
    model.tie_weights()
    assert unchanged(model, before)
    assert torch.equal(outputs(model), running)
    surgery.eject(model).tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_vocabulary_beside_adapters_is_resized_as_ever(tmp_path: Path) -> None:
    model = adapted()
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 3, pad_to_multiple_of=8, mean_resizing=False)
    grown = -(-(size + 3) // 8) * 8
    assert model(torch.tensor([[grown - 1]])).logits.shape[-1] == grown
    model.save_merged(tmp_path / "out")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == grown
