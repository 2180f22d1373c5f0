"""A LoRA config for sites of given ranks whose delta is B A itself: alpha is r at every site."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from surgery.core.select import patterned
from surgery.errors import InputError
from surgery.methods.lora_config import LoraConfig


def ranked_config(ranks: Mapping[str, int], parameters: Collection[str], **fields: Any) -> LoraConfig:
    """`ranks` by the names of modules and `parameters`, and the config's other fields.

    InputError where no pattern tells them apart.
    """
    r = Counter(ranks.values()).most_common(1)[0][0]
    plain = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted(ranks.keys() - parameters),
        target_parameters=sorted(parameters) or None,
        inference_mode=True,
        **fields,
    )
    return plain if set(ranks.values()) == {r} else _patterned(plain, ranks)


def _patterned(plain: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    pattern = patterned(ranks)
    if pattern is None:
        raise InputError(
            "names of sites differ by a dot alone, and ranks differ; equal ranks are wanted; give one rank for all"
        )
    return replace(plain, rank_pattern=pattern, alpha_pattern=pattern)
