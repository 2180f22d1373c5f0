"""whole: what a model of transformers takes nothing from in its files, and what it does not find there.

A head of another task is no part of the model, and stays in the files alone. What lies in a part that the model does
have, such as a layer more than its config names, would be missing from an export.
"""

from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from surgery.core.adapter import Weighted
from surgery.errors import InputError, MatchError, printable
from surgery.hosts.checkpoint import Checkpoint

_NAMED = 3  # of the tensors that a message names


def unread(model: nn.Module, files: Checkpoint) -> list[str]:
    """The tensors of no part of the model. MatchError for others that it takes nothing from.

    What its class says is to be ignored, such as masks that were once stored, is in neither.
    """
    left = _left(model, files)
    modules, prefix = dict(model.named_modules()), str(model.base_model_prefix)
    lost = [name for name, target in left.items() if _has_part(modules, target, prefix)]
    if lost:
        raise MatchError(
            f"{printable(files.folder / 'config.json')}: the {type(model).__name__} that it makes has no place for "
            f"{_counted(lost)}; a config that tells of all that the files hold is wanted; see to the number of its "
            "layers, and to what they are made of"
        )
    return list(left)


def refuse_missing(missing: Collection[str], adapters: Sequence[Weighted], files: Checkpoint) -> None:
    """InputError for a weight that neither the files nor an adapter has: it would be random."""
    lacking = sorted(set(missing) - {name for one in adapters for name in one.adapter.saved})
    if lacking:
        raise InputError(
            f"{printable(files.path)}: it has no {_counted(lacking)}, which would be random; a whole model is wanted; "
            "copy it again, or see to what its config.json tells of its layers"
        )


def _left(model: Any, files: Checkpoint) -> dict[str, str]:
    """Of each tensor that the model does not take, by its name in the files, what the model would call it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [one for one in rules if isinstance(one, WeightRenaming)]
    converters = [one for one in rules if isinstance(one, WeightConverter)]
    wanted, prefix = model.state_dict(), model.base_model_prefix
    targets = {
        one.name: rename_source_key(one.name, renamings, converters, prefix, wanted)[0] for one in files.weights()
    }
    told = SimpleNamespace(missing_keys=set(), unexpected_keys=targets.values() - wanted.keys())
    model._adjust_missing_and_unexpected_keys(told)
    return {name: target for name, target in targets.items() if target in told.unexpected_keys}


def _has_part(modules: Mapping[str, nn.Module], target: str, prefix: str) -> bool:
    """Does it lie in a module that the model has, or among its layers? Files may have the `prefix` or lack it."""
    path = target.rpartition(".")[0]
    paths = (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}."))
    return any(one in modules or _among_layers(modules, one) for one in paths if one)


def _among_layers(modules: Mapping[str, nn.Module], path: str) -> bool:
    parts = path.split(".")
    return any(isinstance(modules.get(".".join(parts[:end])), nn.ModuleList) for end in range(1, len(parts)))


def _counted(names: Sequence[str]) -> str:
    """The first, and how many more."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(map(printable, names[:_NAMED]))}{more}"
