"""Clashes: settings of LoRA of which each is served, but not beside the other."""

from collections.abc import Iterator
from typing import Any

from surgery.errors import ConfigError
from surgery.methods.eva import Eva
from surgery.methods.inits import is_from_base


def check_together(config: Any) -> None:
    """ConfigError for the first of a LoraConfig's clashes."""
    for found, why in _clashes(config):
        if found:
            raise ConfigError(why)


def _clashes(one: Any) -> Iterator[tuple[bool, str]]:
    start, plain = one.init_lora_weights, one.init_lora_weights in (True, False)
    yield (
        is_from_base(start) and bool(one.use_dora or one.target_parameters or one.trainable_token_indices),
        f"init_lora_weights is {start!r}; it goes without use_dora, target_parameters and trainable_token_indices; "
        "start with True",
    )
    yield (
        one.lora_bias and (one.use_dora or not plain),
        "lora_bias is true; as in PEFT it goes with init_lora_weights True or False, without DoRA",
    )
    for field in ("use_bdlora", "use_qalora"):
        yield (
            bool(getattr(one, field)) and bool(one.use_dora or one.lora_bias or one.target_parameters or not plain),
            f"{field} is given; as in PEFT it goes without use_dora, lora_bias and target_parameters, and with "
            "init_lora_weights True or False",
        )
    yield (
        bool(one.use_bdlora and one.use_qalora),
        "use_bdlora and use_qalora are given, each of which shapes A; leave one out",
    )
    if one.target_parameters:
        yield (
            bool(one.use_dora or one.lora_bias or one.lora_dropout),
            "target_parameters is given; as in PEFT it goes without use_dora, lora_bias and lora_dropout",
        )
        yield (
            start == Eva.start,
            "target_parameters is given; it goes without init_lora_weights 'eva'; start with True",
        )
        yield one.bias != "none", "target_parameters is given; it goes with bias 'none' alone; set one of the two"
    yield (
        bool(one.layer_replication) and one.bias != "none",
        "layer_replication is given, whose layers share biases; it goes with bias 'none' alone",
    )
