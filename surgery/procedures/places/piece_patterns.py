"""Piece patterns: r and alpha of parameters, as patterns for the single tensors that a base's files hold of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from surgery.core.select import Number, pattern_value
from surgery.methods.lora_config import LoraConfig


def config_for_pieces(config: LoraConfig, pieces: Mapping[str, str], singles: Sequence[str]) -> LoraConfig:
    """The config for sites that are `pieces` of parameters, whose ranks and alphas they have."""
    told = config.with_parameters(singles)
    if not (config.rank_pattern or config.alpha_pattern):
        return told
    kinds = {(whole, _any_expert(site)): site for site, whole in pieces.items()}
    ranks = {one: pattern_value(config.rank_pattern, one[0], config.r) for one in kinds}
    alphas = {one: pattern_value(config.alpha_pattern, one[0], float(config.lora_alpha)) for one in kinds}
    return replace(
        told,
        rank_pattern={**_by_pattern(ranks), **config.rank_pattern},
        alpha_pattern={**_by_pattern(alphas), **config.alpha_pattern},
    )


def _by_pattern(values: Mapping[tuple[str, str], Number]) -> dict[str, Number]:
    """Of sites by patterns; by the ends of those where all that end so have one value."""
    by_end: dict[str, set[Number]] = {}
    for (_, pattern), value in values.items():
        by_end.setdefault(_end(pattern), set()).add(value)
    return {
        _end(pattern) if len(by_end[_end(pattern)]) == 1 else pattern: value for (_, pattern), value in values.items()
    }


def _any_expert(site: str) -> str:
    """A pattern for a site of any expert."""
    owner, _, last = site.rpartition(".")
    return rf"{re.escape(owner.rpartition('.')[0])}\.\d+\.{re.escape(last)}"


def _end(pattern: str) -> str:
    """What of it begins with the module of experts."""
    return r"\.".join(pattern.split(r"\.")[-3:])
