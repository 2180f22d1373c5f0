"""Tiny models of transformers with random weights, by the names of their architectures."""

from collections.abc import Callable, Mapping
from typing import Any

import transformers

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = {**_SIZES, "vocab_size": 100}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_BOTH = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PATCHES = {**_SIZES, "image_size": 16, "patch_size": 8}
_SHORT = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _clip() -> transformers.CLIPModel:
    text = {**_TEXT, **_SHORT, "eos_token_id": 99, "projection_dim": 32}
    vision = {**_PATCHES, "projection_dim": 32}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def _of(kind: str, config: str, **fields: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**fields))


ARCHITECTURES: Mapping[str, Callable[[], Any]] = {
    "llama": _of("LlamaForCausalLM", "LlamaConfig", **_GROUPED),
    "qwen3": _of("Qwen3ForCausalLM", "Qwen3Config", **_GROUPED, head_dim=16),
    "mistral": _of("MistralForCausalLM", "MistralConfig", **_GROUPED),
    "gemma3": _of(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        **_GROUPED,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": _of("Phi3ForCausalLM", "Phi3Config", **_GROUPED, **_SHORT),
    "opt": _of(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        ffn_dim=128,
        num_attention_heads=4,
        word_embed_proj_dim=64,
    ),
    "gpt2": _of("GPT2LMHeadModel", "GPT2Config", vocab_size=100, n_embd=64, n_layer=2, n_head=4, **_SHORT),
    "gpt-neox": _of("GPTNeoXForCausalLM", "GPTNeoXConfig", **_TEXT),
    "bloom": _of("BloomForCausalLM", "BloomConfig", vocab_size=100, hidden_size=64, n_layer=2, n_head=4),
    "mixtral": _of("MixtralForCausalLM", "MixtralConfig", **_GROUPED, num_local_experts=4),
    "qwen3-moe": _of(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        **_GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=16,
    ),
    "bert": _of("BertForSequenceClassification", "BertConfig", **_TEXT),
    "roberta": _of("RobertaForTokenClassification", "RobertaConfig", **_TEXT),
    "bart": _of("BartForConditionalGeneration", "BartConfig", **_BOTH),
    "t5": _of(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=100,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
    ),
    "whisper": _of(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        **_BOTH,
        num_mel_bins=16,
        max_source_positions=30,
        decoder_start_token_id=1,
    ),
    "vit": _of("ViTForImageClassification", "ViTConfig", **_PATCHES),
    "clip": _clip,
}
