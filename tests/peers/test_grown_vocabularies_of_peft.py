"""Adapters that PEFT trained over a vocabulary that had grown: its files hold embedding and head under many names."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GROWN = 110
TOKENS = torch.arange(97, 109).view(2, 6)
BOTH = ["embed_tokens", "lm_head"]
KINDS: dict[str, dict[str, Any]] = {
    "alone": {},
    "both saved": {"modules_to_save": BOTH},
    "one saved": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [100, 104]},
}


def base(folder: Path, tied: bool) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)).save_pretrained(folder / "base")
    return folder / "base"


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


def grown(folder: Path) -> Any:
    """The base with more tokens, whose rows are random."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    return model


def trained(folder: Path, **fields: Any) -> Tensor:
    """The outputs of an adapter of peft, which is saved beside its base."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **fields)
    model = get_peft_model(grown(folder / "base"), config)
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_(0.01 * torch.randn_like(values))
    model.save_pretrained(folder / "adapter")
    return outputs(model)


CASES = [
    pytest.param(kind, tied, id=f"{kind}{', tied' if tied else ''}")
    for kind in KINDS
    for tied in (False, True)
    if (kind, tied) != ("one saved", True)  # which leaves the head and the embedding apart
]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_the_model_is_loaded_with_as_many_tokens_as_the_adapter_has(kind: str, tied: bool, tmp_path: Path) -> None:
    base(tmp_path, tied)
    wanted = trained(tmp_path, **KINDS[kind])
    model = surgery.load_model(tmp_path / "adapter")
    assert model.config.vocab_size == GROWN
    torch.testing.assert_close(outputs(model), wanted, rtol=0, atol=64 * torch.finfo(torch.float32).eps)
    if kind == "both saved":  # all that was resized is in the adapter, so that any rows will do
        there = surgery.load(grown(tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(outputs(there), outputs(model))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_it_is_merged_into_the_files_of_the_smaller_base(kind: str, tied: bool, tmp_path: Path) -> None:
    base(tmp_path, tied)
    wanted = trained(tmp_path, **KINDS[kind])
    how = {"tied": "untie"} if tied and kind == "both saved" else {}  # which PEFT trains apart
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", reversible=True, **how)
    surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged").require()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged), wanted, rtol=0, atol=64 * torch.finfo(torch.float32).eps)
    surgery.unmerge_checkpoint(tmp_path / "merged", tmp_path / "restored")
    surgery.diff(tmp_path / "base", tmp_path / "restored").require()


def test_rows_that_are_in_neither_are_refused(tmp_path: Path) -> None:
    base(tmp_path, tied=False)
    trained(tmp_path, modules_to_save=["embed_tokens"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: values for name, values in load_file(file).items() if "lm_head" not in name}, file)
    with pytest.raises(surgery.MatchError, match=r"110 tokens, and lm_head\.weight of the base has 99"):
        surgery.load_model(tmp_path / "adapter")


def test_a_second_name_for_another_tensor_is_refused(tmp_path: Path) -> None:
    base(tmp_path, tied=False)
    trained(tmp_path, modules_to_save=BOTH)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = load_file(file)
    held["base_model.model.lm_head.modules_to_save.weight"] += 1
    save_file(held, file)
    with pytest.raises(surgery.FormatError, match=r"two tensors are lm_head\.weight"):
        surgery.load_model(tmp_path / "adapter")
