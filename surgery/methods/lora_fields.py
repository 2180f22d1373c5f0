"""LoRA's fields that PEFT writes and we do not serve: the value that leaves the maths alone, and what another means.

And what is served beside the factors: `bias`, which AdaLoRA's configs have too, layers stacked anew, and
`trainable_token_indices`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from surgery.core.names import suffix_hits
from surgery.errors import ConfigError, printable, quoted

Bias = Literal["none", "all", "lora_only"]
TokenIndices = Sequence[int] | Mapping[str, Sequence[int]] | None
Ranges = Sequence[Sequence[int]] | None  # of layers, each without its end
_MOST_LAYERS = 4096

NEUTRAL: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "velora_config": None,
}

_MEGATRON = "Megatron's layers hold a part of a weight each; train it there"

REASONS: Mapping[str, str] = {
    "alora_invocation_tokens": "aLoRA acts after certain tokens only, which no merged weight can do; run it in PEFT",
    "arrow_config": "Arrow chooses among adapters for each token, which no merged weight can do; run it in PEFT",
    "kasa_config": "KaSA first cuts the base down to a lower rank; merge it in PEFT",
    "megatron_config": _MEGATRON,
    "megatron_core": _MEGATRON,
    "monteclora_config": "MonteCLoRA draws its factors anew in each step of training; train and merge it in PEFT",
    "velora_config": "VeLoRA compresses what training keeps; train it in PEFT; what is trained does not need it",
}


def check_tokens(value: object) -> None:
    """ConfigError for what is neither a list of tokens nor one for each module."""
    table = value if isinstance(value, Mapping) else {} if value is None else {"": value}
    for name, tokens in table.items():
        if not isinstance(name, str) or not isinstance(tokens, list | tuple) or not tokens:
            raise ConfigError(
                f"trainable_token_indices is {quoted(value)}; a list of tokens is wanted, or one for each module"
            )
        check_token_list("trainable_token_indices", tokens)


def check_token_list(field: str, tokens: Sequence[object]) -> None:
    """ConfigError unless each is a token, once."""
    if not all(type(token) is int and 0 <= token < 1 << 31 for token in tokens) or len({*tokens}) < len(tokens):
        raise ConfigError(f"{field} holds {printable(tokens)}; whole numbers from 0 to 2^31 - 1, each once, are wanted")


def check_ranges(value: object) -> None:
    """ConfigError for what does not say how layers are stacked."""
    pairs = [] if value is None else value
    if not isinstance(pairs, list | tuple) or not all(map(_is_range, pairs)) or (value is not None and not pairs):
        raise ConfigError(
            f"layer_replication is {quoted(value)}; a list of pairs is wanted, first layer and the one after the "
            "last, such as [[0, 4], [2, 5]]"
        )
    if (count := sum(end - first for first, end in pairs)) > _MOST_LAYERS:
        raise ConfigError(f"layer_replication stacks {count} layers; at most {_MOST_LAYERS} are wanted")


def layers_of(value: Ranges) -> tuple[int, ...]:
    """The layers that the ranges stack, in their order."""
    return tuple(at for first, end in value or () for at in range(first, end))


def _is_range(pair: object) -> bool:
    numbers = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(one) is int for one in pair)
    return numbers and 0 <= pair[0] < pair[1]  # type: ignore[index]


def tokens_of(value: TokenIndices, name: str) -> Sequence[int] | None:
    """Those of the module `name`; None where rows of it are not trained, or only the model tells of which they are."""
    if not isinstance(value, Mapping):
        return None
    hits = suffix_hits(value.keys(), name)
    return value[hits[0]] if hits else None
