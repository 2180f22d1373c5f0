"""save_merged: a model with adapters as a plain checkpoint, which transformers alone loads."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.core.sharded import has_shares, whole, written_by_one
from surgery.errors import UsageError
from surgery.hosts.packing import BESIDE
from surgery.integrations.transformers.model import is_pretrained
from surgery.integrations.transformers.quantizing import forget_quantization, keep_codes, refuse_joined
from surgery.io.staging import Staging
from surgery.procedures.live.merged_state import merged_state


def save_merged(root: nn.Module, folder: Path, overwrite: bool = False, **options: Any) -> None:
    """Write the model with its active adapters merged; the model stays as it is, to the bit.

    `options` are those of transformers' `save_pretrained`. Raises UsageError for a model of another kind.
    """
    if not is_pretrained(root):
        raise UsageError(
            f"save_merged: a {type(root).__name__}; a model of transformers is wanted; "
            "for others merge, eject(keep_merged=True), and save the state_dict"
        )
    if has_shares(root):
        return _save_shares(root, folder, overwrite, **options)
    with Staging(folder, overwrite=overwrite) as staging, merged_state(root) as state:
        write_merged(root, state, staging, **options)
    return None


def _save_shares(root: nn.Module, folder: Path, overwrite: bool, **options: Any) -> None:
    """All processes gather what the first writes."""
    with merged_state(root) as state, written_by_one(root) as writes:
        gathered = {name: whole(values) for name, values in state.items()}
        if writes:
            with Staging(folder, overwrite=overwrite) as staging:
                write_merged(root, gathered, staging, **options)


def write_merged(root: nn.Module, state: dict[str, Tensor], staging: Staging, **options: Any) -> None:
    """The model's `state`, without adapters, as its own class saves it."""
    plain = _twin(root)
    if any(name.endswith(BESIDE) for name in state):  # quantized weights stay so
        keep_codes(plain)
    else:
        forget_quantization(plain)
    refuse_joined(plain)
    _untie(plain, state)
    plain.save_pretrained(staging.folder, state_dict=state, **options)
    staging.adopt()


def _twin(root: nn.Module) -> Any:
    """A model that shares all with `root` but its class, which is the plain one, and its config."""
    from surgery.integrations.transformers.methods import LOADED
    from surgery.integrations.transformers.subclass import own_class

    kind: Any = own_class(root)
    twin = kind.__new__(kind)
    twin.__dict__.update({name: one for name, one in root.__dict__.items() if name != LOADED})
    twin.config = copy.deepcopy(twin.config)
    return twin


def _untie(plain: Any, state: dict[str, Tensor]) -> None:
    """Where a tied tensor has become another than its twin, the config says so, and each is written."""
    tied: Mapping[str, str] = getattr(plain, "all_tied_weights_keys", None) or {}
    pairs = [(one, other) for one, other in tied.items() if one in state and other in state]
    if all(state[one].data_ptr() == state[other].data_ptr() for one, other in pairs):
        return
    for config in (plain.config, plain.config.get_text_config()):
        config.tie_word_embeddings = False
    for one, _ in pairs:
        state[one] = state[one].clone()
