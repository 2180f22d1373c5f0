"""What a config that names no modules adapts in a model of transformers: what PEFT 0.21.2 adapts there.

By the model's type, as its config tells it. The families are few, so they are listed by what they call their layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from surgery.core.config import AdapterConfig
from surgery.core.entries import in_peft_terms
from surgery.core.names import suffix_hits
from surgery.core.select import select
from surgery.hosts.tree import places
from surgery.integrations.transformers.model import is_pretrained
from surgery.layers import base_of


class Default(NamedTuple):
    """Modules by the ends of their names, or one pattern; and those of them whose inputs IA3 scales."""

    targets: Sequence[str]
    types: str
    feedforward: Sequence[str] = ()


_LORA = (
    Default(
        ("q_proj", "v_proj"),
        "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm",
    ),
    Default(("query", "value"), "bert electra layoutlm roberta xlm-roberta"),
    Default(("query_key_value",), "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox"),
    Default(("q", "v"), "mt5 t5"),
    Default(("c_attn",), "gpt2 gpt_bigcode"),
    Default(("q", "v", "q_proj", "v_proj"), "blip-2"),
    Default(("query_proj", "value_proj"), "deberta-v2"),
    Default(("in_proj",), "deberta"),
    Default(("Wqkv",), "mpt"),
    Default(("c_proj", "c_attn"), "btlm"),
    Default(("qkv_proj",), "codegen"),
    Default(("q_proj", "v_proj", "fc1", "fc2"), "phi"),
    Default(r".*language_model\..*\.(q_proj|v_proj)", "gemma4"),
    Default(("q_proj", "k_proj", "v_proj", "o_proj"), "nemotron_h"),
    Default(("key", "value", "receptance", "output"), "rwkv"),
    Default(("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"), "rwkv7"),
)
_VERA = (
    *(one for one in _LORA if one.types != "phi"),
    Default(("q_proj", "v_proj"), "phi"),
)
_PVERA = (*_VERA, Default(("query", "value"), "dinov2"))
_C3A = (*(one for one in _LORA if "gpt2" not in one.types), Default(("mlp.c_proj",), "gpt2 gpt_bigcode"))
_VBLORA = (
    Default(("q", "k", "v", "o", "wi", "wo"), "t5"),
    Default(("q", "k", "v", "o", "wi_0", "wi_1", "wo"), "mt5"),
    Default(("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), "bart opt"),
    Default(("c_attn",), "gpt2 gpt_bigcode"),
    Default(("query_key_value",), "bloom gpt_neox"),
    Default(("q_proj", "v_proj"), "gemma gemma2 gemma3_text gpt_neo gptj llama llama4 qwen2 qwen3"),
    Default(("query", "value"), "bert roberta"),
    Default(("query_proj", "key_proj", "value_proj", "dense"), "deberta-v2"),
    Default(("in_proj",), "deberta"),
    Default(r".*language_model\..*\.(q_proj|v_proj)", "gemma4"),
    Default(("q_proj", "k_proj", "v_proj", "o_proj"), "nemotron_h"),
)
_WAVEFT = tuple(one for one in _C3A if one.types not in {"btlm", "rwkv", "rwkv7"})
_ADALORA = (
    Default(("q_proj", "v_proj"), "gemma gemma2 gemma3_text gpt_neo gptj llama llama4 qwen2 qwen3"),
    Default(("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), "bart opt"),
    Default(("query_key_value",), "bloom gpt_neox"),
    Default(("c_attn",), "gpt2 gpt_bigcode"),
    Default(("query", "value"), "bert"),
    Default(("query", "key", "value", "dense"), "roberta"),
    Default(("query_proj", "key_proj", "value_proj", "dense"), "deberta-v2"),
    Default(("in_proj",), "deberta"),
    Default(("q", "k", "v", "o", "wi", "wo"), "t5"),
    Default(("q", "k", "v", "o", "wi_0", "wi_1", "wo"), "mt5"),
    Default(r".*language_model\..*\.(q_proj|v_proj)", "gemma4"),
    Default(("q_proj", "k_proj", "v_proj", "o_proj"), "nemotron_h"),
)
_IA3 = (
    Default(("q_proj", "v_proj", "down_proj"), "gemma gemma2 gemma3_text llama4 qwen2 qwen3", ("down_proj",)),
    Default(("k_proj", "v_proj", "down_proj"), "llama mistral", ("down_proj",)),
    Default(("k_proj", "v_proj", "w2"), "mixtral", ("w2",)),
    Default(("q_proj", "v_proj", "fc2"), "bart phi", ("fc2",)),
    Default(("q_proj", "k_proj", "fc2"), "opt", ("fc2",)),
    Default(("q_proj", "v_proj", "fc_out"), "gptj", ("fc_out",)),
    Default(("q_proj", "v_proj", "c_proj"), "gpt_neo", ("c_proj",)),
    Default(("key", "value", "output.dense"), "bert roberta", ("output.dense",)),
    Default(("key_proj", "value_proj", "output.dense"), "deberta-v2", ("output.dense",)),
    Default(("in_proj", "output.dense"), "deberta", ("output.dense",)),
    Default(("query_key_value", "dense_4h_to_h"), "RefinedWeb RefinedWebModel falcon gpt_neox", ("dense_4h_to_h",)),
    Default(("query_key_value", "mlp.dense_4h_to_h"), "bloom", ("mlp.dense_4h_to_h",)),
    Default(("c_attn", "mlp.c_proj"), "gpt2 gpt_bigcode", ("mlp.c_proj",)),
    Default(("k", "v", "wo"), "t5", ("wo",)),
    Default(("k", "v", "wi_1"), "mt5"),
)
_LN_TUNING = (
    Default(("input_layernorm", "post_attention_layernorm", "norm"), "gemma llama mistral"),
    Default(("input_layernorm", "post_attention_layernorm", "ln_f"), "bloom falcon"),
    Default(
        ("multi_modal_projector", "input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", "lm_head"),
        "llava",
    ),
    Default(("layer_norm", "final_layer_norm"), "mt5 t5"),
    Default(("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"), "bart"),
    Default(("ln_1", "ln_2", "ln_f"), "gpt2"),
    Default(("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"), "blip-2"),
    Default(("ln_1", "ln_f"), "gptj"),
    Default(("input_layernorm", "final_layernorm"), "phi"),
    Default(
        (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "norm",
        ),
        "gemma2 gemma3_text",
    ),
    Default(("post_attention_layernorm",), "qwen2 qwen3"),
)
_BEFT = (
    Default(("v",), "mt5 t5"),
    Default(("value",), "bert roberta"),
    Default(("v_proj",), "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt phi qwen2 qwen3"),
    Default(("value_proj",), "deberta-v2"),
)
DEFAULTS: Mapping[str, Mapping[str, Default]] = {
    kind: {one: default for default in table for one in default.types.split()}
    for kind, table in (
        ("LORA", _LORA),
        ("ADALORA", _ADALORA),
        ("IA3", _IA3),
        ("LN_TUNING", _LN_TUNING),
        ("VERA", _VERA),
        ("PVERA", _PVERA),
        ("SHIRA", _VERA),
        ("C3A", _C3A),
        ("FOURIERFT", _C3A),
        ("WAVEFT", _WAVEFT),
        ("BEFT", _BEFT),
        ("VBLORA", _VBLORA),
        *(
            (kind, _LORA)
            for kind in [
                "LOHA",
                "LOKR",
                "RANDLORA",
                "UNILORA",
                "TINYLORA",
                "OFT",
                "BOFT",
                "ROAD",
                "HRA",
                "HIRA",
                "DELORA",
                "GLORA",
                "GRALORA",
                "MISS",
                "SUPERTUNING",
            ]
        ),
    )
}


def with_default_targets(root: nn.Module, config: AdapterConfig, as_peft: bool = False) -> AdapterConfig:
    """The config, with the modules named that its kind adapts in such a model, if it names none and they are known.

    Those are left out of which the config takes away all: that nothing else matches is an error of what a user names.
    """
    if config.target_modules is not None or config.parameters() or not is_pretrained(root):
        return config
    model: Any = root
    if config.rows() is None and config.repeats_rows:
        return _of_embedding(model, config)
    default = DEFAULTS.get(config.peft_type, {}).get(model.config.model_type)
    if default is None:
        return config
    names = [place.name for place in places(root)]
    wanted = replace(config, target_modules=default.targets)
    chosen = select(wanted if as_peft else in_peft_terms(wanted, names).config, names, tuple, as_peft)
    missing: dict[str, Any] = {
        field: _meant(ends, chosen or names)
        for field, ends in (("target_modules", default.targets), ("feedforward_modules", default.feedforward))
        if getattr(config, field, ()) is None
    }
    return replace(config, **missing)


def _of_embedding(model: Any, config: AdapterConfig) -> AdapterConfig:
    """The config of the rows of what the model says embeds its tokens."""
    own = model.get_input_embeddings()
    found = [place.name for place in places(model) if own in (place.module, base_of(place.module))]
    return config.with_rows(found[:1]) if found else config


def _meant(ends: str | Sequence[str], names: Sequence[str]) -> str | Sequence[str]:
    """Those that hit some of the names."""
    return ends if isinstance(ends, str) else [end for end in ends if any(suffix_hits((end,), name) for name in names)]
