"""How the tensors of files become those of a model of transformers, by its own tables."""

from collections.abc import Mapping
from functools import reduce
from importlib import import_module
from typing import Any

from surgery.core.name_map import USUAL, NameMap, Stack
from surgery.errors import FormatError, InputError
from surgery.hosts.checkpoint import Checkpoint
from surgery.integrations.transformers.bare_model import bare_model
from surgery.procedures.places.op_choice import families


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


def names_in_memory(base: Checkpoint) -> Mapping[str, str]:
    """The files' names of the tensors that transformers renames as it loads them, by those that it gives them.

    Without what it makes of several. None where it is not there, or makes no model of the config.
    """
    try:
        model = bare_model(base)
    except FormatError:  # what called for it tells of names
        return {}
    if model is None:
        return {}
    tables: Any = import_module("transformers.conversion_mapping")
    steps: Any = import_module("transformers.core_model_loading")
    rules = tables.get_model_conversion_mapping(model)
    renaming, making = (
        [one for one in rules if isinstance(one, kind)] for kind in (steps.WeightRenaming, steps.WeightConverter)
    )
    held, found = model.state_dict(), {}
    for info in base.weights():
        name, pattern = steps.rename_source_key(info.name, renaming, making, model.base_model_prefix, held)
        if pattern is None and name != info.name and name in held:
            found[name] = info.name
    return found


def ties_in_memory(base: Checkpoint) -> Mapping[str, str]:
    """The tensors that are others' in memory, such as an output head, with what they are tied to; none if unknown."""
    try:
        model = bare_model(base)
    except InputError:  # what else calls for the model tells of its config, or of a class that is not exported
        return {}
    return getattr(model, "all_tied_weights_keys", None) or {}


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
    """A pattern that begins anywhere, as one that begins after a dot; some escape their dots."""
    pattern = pattern.replace("\\.", ".")
    return pattern if pattern.startswith(".") else f".{pattern}"
