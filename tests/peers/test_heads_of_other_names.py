"""Output heads that are tied to the embedding and not called lm_head: adapted with it, alone, and not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import surgery
from surgery.hosts.checkpoint import Checkpoint

SIZES = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WHISPER = {"d_model": 16, "vocab_size": 29, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 20}
WHISPER |= {"decoder_ffn_dim": 20, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
XLM = {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 29, "pad_index": 0, "max_position_embeddings": 16}
HEADS: dict[str, tuple[Callable[[], hf.PreTrainedModel], str, str]] = {
    "whisper": (
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
        "model.decoder.embed_tokens",
        "proj_out",
    ),
    "bert": (
        lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
        "bert.embeddings.word_embeddings",
        "cls.predictions.decoder",
    ),
    "roberta": (
        lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES)),
        "roberta.embeddings.word_embeddings",
        "lm_head.decoder",
    ),
    "electra": (
        lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**SIZES, embedding_size=16)),
        "electra.embeddings.word_embeddings",
        "generator_lm_head",
    ),
    "modernbert": (
        lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2)),
        "model.embeddings.tok_embeddings",
        "decoder",
    ),
    "biogpt": (lambda: hf.BioGptForCausalLM(hf.BioGptConfig(**SIZES)), "biogpt.embed_tokens", "output_projection"),
    "xlnet": (
        lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=29, d_model=16, n_layer=1, n_head=2, d_inner=20)),
        "transformer.word_embedding",
        "lm_loss",
    ),
    "xlm": (lambda: hf.XLMWithLMHeadModel(hf.XLMConfig(**XLM)), "transformer.embeddings", "pred_layer.proj"),
}
each_head = pytest.mark.parametrize("name", HEADS)


def made(name: str, folder: Path) -> tuple[hf.PreTrainedModel, str, str]:
    """The model, of which the base is in the folder; its embedding and its head."""
    torch.manual_seed(0)
    make, embedding, head = HEADS[name]
    model = make().eval()
    assert model.get_submodule(embedding).weight is model.get_submodule(head).weight
    model.save_pretrained(folder / "base")
    with Checkpoint(folder / "base") as files:
        assert files.info(f"{head}.weight") is None
    return model, embedding, head


def adapted(model: hf.PreTrainedModel, folder: Path, targets: list[str], ties: bool) -> hf.PreTrainedModel:
    fields = {"r": 2, "target_modules": targets, "init_lora_weights": False, "ensure_weight_tying": ties}
    surgery.inject(model, surgery.LoraConfig(**fields))
    surgery.save(model, folder / "adapter")
    return model


@each_head
def test_both_adapted_alike_are_merged_once_and_stay_tied(name: str, tmp_path: Path) -> None:
    model, embedding, head = made(name, tmp_path)
    base = load_file(tmp_path / "base" / "model.safetensors")
    adapted(model, tmp_path, [embedding], ties=True)
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == base.keys()
    assert [one for one in base if not torch.equal(merged[one], base[one])] == [f"{embedding}.weight"]
    live = surgery.eject(surgery.merge(model), keep_merged=True)
    assert torch.equal(merged[f"{embedding}.weight"], live.get_submodule(embedding).weight)
    assert live.get_submodule(head).weight is live.get_submodule(embedding).weight
    again = type(live).from_pretrained(tmp_path / "out")
    assert torch.equal(again.get_submodule(head).weight, merged[f"{embedding}.weight"])
    assert surgery.verify_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").ok


@each_head
@pytest.mark.parametrize("which", ["embedding", "head"])
def test_one_of_the_two_alone_is_refused_by_both_names(which: str, name: str, tmp_path: Path) -> None:
    model, embedding, head = made(name, tmp_path)
    one, other = (embedding, head) if which == "embedding" else (head, embedding)
    adapted(model, tmp_path, [one], ties=False)
    with pytest.raises(surgery.MatchError, match=rf"{one}.*: it is tied to {other}\.weight"):
        surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_what_the_head_is_called_is_not_asked_for_other_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a model of transformers, which a merge of Linears does without."""
    model, _, _ = made("whisper", tmp_path)
    adapted(model, tmp_path, ["q_proj"], ties=False)
    monkeypatch.setattr("surgery.integrations.transformers.names.bare_model", lambda _: pytest.fail("a model is made"))
    surgery.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
