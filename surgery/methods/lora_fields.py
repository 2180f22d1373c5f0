"""LoRA's fields that PEFT writes and we do not serve: the value that leaves the maths alone, and what another means.

And what is served beside the factors: `bias`, which AdaLoRA's configs have too, and `trainable_token_indices`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from surgery.core.names import suffix_hits
from surgery.errors import ConfigError, printable

Bias = Literal["none", "all", "lora_only"]
TokenIndices = Sequence[int] | Mapping[str, Sequence[int]] | None

NEUTRAL: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "use_qalora": False,
    "velora_config": None,
}

_BASE = "its start changes the base too; convert it in PEFT first, by path_initial_model_for_weight_conversion"
_MEGATRON = "Megatron's layers hold a part of a weight each; train it there"
_QALORA = "QALoRA acts on sums over groups of inputs; run it in PEFT"

REASONS: Mapping[str, str] = {
    "alora_invocation_tokens": "aLoRA acts after certain tokens only, which no merged weight can do; run it in PEFT",
    "arrow_config": "Arrow chooses among adapters for each token, which no merged weight can do; run it in PEFT",
    "corda_config": _BASE,
    "kasa_config": "KaSA first cuts the base down to a lower rank; merge it in PEFT",
    "layer_replication": "it stacks layers that share one weight, which a merge would change for all; run it in PEFT",
    "lora_ga_config": _BASE,
    "megatron_config": _MEGATRON,
    "megatron_core": _MEGATRON,
    "monteclora_config": "MonteCLoRA draws its factors anew in each step of training; train and merge it in PEFT",
    "qalora_group_size": _QALORA,
    "trainable_token_indices": "it replaces rows of an embedding; adapt that by LoRA instead, or merge it in PEFT",
    "use_bdlora": "BD-LoRA holds only blocks of a factor, those on its diagonal; merge it in PEFT",
    "use_qalora": _QALORA,
    "velora_config": "VeLoRA compresses what training keeps; train it in PEFT; what is trained does not need it",
}


def check_bias(value: object) -> None:
    """ConfigError for what says nothing of which biases are trained."""
    if value not in get_args(Bias):
        raise ConfigError(f"bias is {printable(value)!r}; 'none', 'all' or 'lora_only' is wanted")


def check_tokens(value: object) -> None:
    """ConfigError for what is neither a list of tokens nor one for each module."""
    table = value if isinstance(value, Mapping) else {} if value is None else {"": value}
    for name, tokens in table.items():
        if not isinstance(name, str) or not isinstance(tokens, list | tuple) or not tokens:
            raise ConfigError(
                f"trainable_token_indices is {printable(value)!r}; a list of tokens is wanted, or one for each module"
            )
        if not all(type(token) is int and 0 <= token < 1 << 31 for token in tokens) or len({*tokens}) < len(tokens):
            raise ConfigError(
                f"trainable_token_indices holds {printable(tokens)}; whole numbers from 0 to 2^31 - 1, each once, are "
                "wanted"
            )


def tokens_of(value: TokenIndices, name: str) -> Sequence[int] | None:
    """Those of the module `name`; None where rows of it are not trained, or only the model tells of which they are."""
    if not isinstance(value, Mapping):
        return None
    hits = suffix_hits(value.keys(), name)
    return value[hits[0]] if hits else None
