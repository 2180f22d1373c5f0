"""How the tensors of files become those of a model of transformers, by its own tables."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

from surgery.core.name_map import USUAL, NameMap, Stack
from surgery.procedures.op_choice import families


def name_map(config: Mapping[str, Any]) -> NameMap:
    """For the families that a config.json names; what is usual where transformers is not there, or has no table."""
    try:
        from transformers import conversion_mapping as tables
        from transformers import core_model_loading as steps
    except ImportError:
        return USUAL
    table: Any = tables.get_checkpoint_conversion_mapping
    found = [one for family in families(config) for one in table(family) or ()]
    if not found:
        return USUAL
    renaming = [one for one in found if type(one) is steps.WeightRenaming]
    merging = [one for one in found if type(one) is steps.WeightConverter and _stacks(one, steps)]

    def rename(name: str) -> str:
        return reduce(lambda told, one: one.rename_source_key(told)[0], renaming, name)

    return NameMap(rename, [Stack(_parts(one), _dotted(one.target_patterns[0])) for one in merging])


def _stacks(converter: Any, steps: Any) -> bool:
    """Does it do nothing but put the matrices of each expert one below another, and the experts behind one another?"""
    told = [
        (type(step), step.dim)
        for step in converter.operations
        if type(step) in (steps.MergeModulelist, steps.Concatenate)
    ]
    wanted = [(steps.MergeModulelist, 0), (steps.Concatenate, 1)][: 1 + (len(converter.source_patterns) > 1)]
    starred = all(one.count("*") == 1 for one in converter.source_patterns)
    return len(told) == len(converter.operations) and told == wanted and starred and len(converter.target_patterns) == 1


def _parts(converter: Any) -> tuple[str, ...]:
    return tuple(map(_dotted, converter.source_patterns))


def _dotted(pattern: str) -> str:
    """A pattern that begins anywhere, as one that begins after a dot."""
    return pattern if pattern.startswith(".") else f".{pattern}"
