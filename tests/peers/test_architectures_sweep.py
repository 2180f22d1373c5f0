"""One line a family of transformers: what an adapter of all its linear layers goes through, end to end, to the bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery

# Small sizes, by the names that configs give them; of these each config takes what it has.
SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("embedding_size", "lru_width"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "v_head_dim", "head_dim", "d_kv"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "state_size", "mamba_d_state", "patch_size"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "n_groups"), 1),
    **{"vocab_size": 120, "max_position_embeddings": 64, "image_size": 16, "num_mel_bins": 8, "o_lora_rank": 8},
    **{"shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "use_mamba_kernels": False},
    **{"max_source_positions": 16, "max_target_positions": 32, "sliding_window": 8, "intermediate_size_mlp": 24},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_WAVES = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
_WAVES |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
_STATES = {"num_heads": 4, "head_dim": 8, "expand": 2}
_HYBRID = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
_MASKS = {"num_blocks": 1, "num_queries": 5, "num_labels": 6, "num_upscale_blocks": 1}
_NGRAM = {f"num_{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
_MASKED = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
_STAGES = {"depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 2}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {},
    "Gemma2ForCausalLM": {},
    "BloomForCausalLM": {},
    "GPTNeoXForCausalLM": {},
    "FalconForCausalLM": {},
    "MixtralForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "DeepseekV2ForCausalLM": {},
    "DeepseekV3ForCausalLM": {"head_dim": 4},
    "DeepseekV4ForCausalLM": {"num_key_value_heads": 1},
    "GptOssForCausalLM": {},
    "Llama4ForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "OlmoeForCausalLM": {},
    "PhimoeForCausalLM": {},
    "JambaForCausalLM": _HYBRID,
    "MambaForCausalLM": {},
    "Mamba2ForCausalLM": _STATES,
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "T5ForConditionalGeneration": {},
    "PegasusForConditionalGeneration": {},
    "M2M100ForConditionalGeneration": {},
    "WhisperForConditionalGeneration": {"decoder_start_token_id": 1},
    "DebertaForMaskedLM": {},
    "DebertaV2ForTokenClassification": {},
    "ModernBertForSequenceClassification": {"cls_token_id": 3, "sep_token_id": 4},
    "DistilBertForQuestionAnswering": {},
    "ElectraForSequenceClassification": {},
    "XLNetLMHeadModel": {"d_inner": 24},
    "SwinForImageClassification": _STAGES,
    "ConvNextForImageClassification": {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2},
    "SiglipForImageClassification": {},
    "HubertForCTC": _WAVES,
    "SplinterForQuestionAnswering": {},
    "ProphetNetForConditionalGeneration": {**_NGRAM, "decoder_start_token_id": 1},
    "EomtForUniversalSegmentation": _MASKS,
    "ViTMAEForPreTraining": {**_MASKED, "decoder_intermediate_size": 24},
}


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """The class of a model, and one of it in a folder, with weights that are large enough to matter."""
    kind = getattr(transformers, request.param)
    known = kind.config_class().to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known} | {**FAMILIES[request.param]}
    if "vision_config" in known:
        sizes = {"vision_config": {**SIZES}, "text_config": {**SIZES}} | sizes
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes))
    with torch.no_grad():
        for values in model.parameters():
            if values.dim() > 1:
                values.normal_(0, values[0].numel() ** -0.5)
    model.save_pretrained(tmp_path / "base")
    return kind, tmp_path / "base"


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], one) for name, one in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize("made", FAMILIES, indirect=True)
def test_an_adapter_of_all_linear_layers_goes_in_and_out_of_any_family(made: tuple[Any, Path], tmp_path: Path) -> None:
    kind, base = made
    model: nn.Module = kind.from_pretrained(base)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    config = surgery.LoraConfig(r=4, lora_alpha=2, target_modules="all-linear", init_lora_weights=False)
    surgery.save(surgery.inject(model, config), tmp_path / "adapter")
    surgery.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", reversible=True)
    report = surgery.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out", outputs=True)
    assert {one.grade for one in report.tensors.values()} == {"bits", "untouched"}
    assert report.ok, report.outputs
    _, told = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    surgery.save_merged(model, tmp_path / "live")
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "live"))
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert all((tmp_path / "back" / file.name).read_bytes() == file.read_bytes() for file in base.iterdir())
    surgery.unmerge(surgery.merge(model))
    assert same(surgery.eject(model).state_dict(), before)
    assert type(model) is kind
