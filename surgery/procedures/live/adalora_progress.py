"""AdaLoRA's training in a checkpoint: all that an adapter's files leave out, so that it goes on to the same bits.

Beside the adapter lies one file more, of safetensors' format but not of its name, which loaders look for: every
tensor whole, with the triplets that are gone, what is known of its importance, and the masks.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery.adapters.peft import adapter_bytes, read_adapter
from surgery.core.adapter import Adapter
from surgery.core.config import AdapterConfig
from surgery.core.method import Params
from surgery.errors import InputError, printable
from surgery.hosts.tree import injected
from surgery.io.durable import write_file
from surgery.io.octets import tensor_from
from surgery.io.regular import contained
from surgery.io.tensor_file import TensorFile
from surgery.methods.adalora import AdaLoraConfig
from surgery.methods.adalora_ranks import Importance, Smoothed
from surgery.procedures.live.adalora import in_training, sites_of
from surgery.procedures.live.refill import refill

FILE = "surgery.adalora"
_MASK = "left"


def with_open_ranks(root: nn.Module) -> list[str]:
    """The AdaLoRA adapters in training that have all the triplets they began with, so that ranks can be allotted."""
    return [
        name
        for name, config in in_training(root).items()
        if all(len(p["E"]) == config.init_r for p in sites_of(root, name).values())
    ]


def write_progress(root: nn.Module, adapter: str, folder: Path) -> None:
    """Into the folder that the adapter is saved in."""
    importance, config = injected(root).importance.get(adapter, {}), injected(root).configs[adapter]
    assert isinstance(config, AdaLoraConfig)
    tensors: dict[str, Tensor] = {}
    for name, p in sites_of(root, adapter).items():
        tensors |= {f"{name}.{role}": values for role, values in p.items()}
        for role, one in importance.get(name, {}).items():
            tensors |= {f"{name}.{role}.{field}": values for field, values in one._asdict().items()}
        if (mask := config.mask(name)) is not None:
            tensors[f"{name}.{_MASK}"] = torch.tensor(mask)
    write_file(folder / FILE, adapter_bytes(tensors, prefix=""))


def read_progress(root: nn.Module, adapter_name: str, folder: Path) -> None:
    """The adapter as it was when the checkpoint was written, in place. InputError if that holds no progress."""
    file = contained(folder, FILE)
    if not file.exists():
        raise InputError(
            f"{printable(folder)}: it holds no {FILE}, by which AdaLoRA's training goes on; a checkpoint that "
            "AdapterTrainer has written is wanted, with save_only_model false"
        )
    held, state, adapter = _tensors(file), injected(root), read_adapter(folder)
    fitted = sites_of(root, adapter_name)
    masks = {f"{name}.lora_E": held[f"{name}.{_MASK}"].tolist() for name in fitted if f"{name}.{_MASK}" in held}
    told = _with_masks(state.configs[adapter_name], masks)  # refuses masks that are none, while nothing has changed
    importance = {}
    if any(key.endswith(Smoothed._fields) for key in held):
        importance = {name: _importance(held, name, p) for name, p in fitted.items()}
    _refill_whole(root, adapter, adapter_name, {name: _whole(held, name, p) for name, p in fitted.items()})
    state.configs[adapter_name] = _with_masks(state.configs[adapter_name], told.rank_pattern)
    state.importance.pop(adapter_name, None)
    if importance:
        state.importance[adapter_name] = importance


def _with_masks(config: AdapterConfig, masks: Mapping[str, list[bool]] | None) -> AdaLoraConfig:
    assert isinstance(config, AdaLoraConfig)
    return replace(config, rank_pattern=masks or None)


def read_reduced(root: nn.Module, adapter_name: str, folder: Path) -> None:
    """The adapter that was saved, without its progress: what is gone is zero in the model."""
    adapter = read_adapter(folder)
    config = adapter.config
    if isinstance(config, AdaLoraConfig):
        whole = {name: _spread(p, config.mask(name)) for name, p in adapter.sites.items()}
        _refill_whole(root, adapter, adapter_name, whole)
    else:
        refill(root, adapter, adapter_name)  # which says that it is another


def _refill_whole(root: nn.Module, adapter: Adapter, adapter_name: str, sites: Mapping[str, Params]) -> None:
    config = adapter.config
    masks = config.rank_pattern if isinstance(config, AdaLoraConfig) else None
    if isinstance(config, AdaLoraConfig):
        config = replace(config, rank_pattern=None)
    refill(root, replace(adapter, config=config, sites=sites), adapter_name)
    state = injected(root)
    told = state.configs[adapter_name]
    if isinstance(told, AdaLoraConfig):
        state.configs[adapter_name] = replace(told, rank_pattern=masks)


def _tensors(file: Path) -> dict[str, Tensor]:
    opened = TensorFile(file)
    try:
        entries = opened.header.entries
        found = {
            info.name: tensor_from(opened.read(at, info.nbytes), info.torch_dtype, info.shape) for info, at in entries
        }
        opened.check_unchanged()
        return found
    finally:
        opened.close()


def _whole(held: Mapping[str, Tensor], name: str, p: Params) -> Params:
    return {role: _of(held, f"{name}.{role}", values) for role, values in p.items()}


def _importance(held: Mapping[str, Tensor], name: str, p: Params) -> Importance:
    return {
        role: Smoothed(*(_of(held, f"{name}.{role}.{field}", values).to(values.device) for field in Smoothed._fields))
        for role, values in p.items()
    }


def _of(held: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    found = held.get(key)
    if found is None or found.shape != like.shape:
        what = "no tensor" if found is None else f"{list(found.shape)} of"
        raise InputError(
            f"{FILE}: {what} {printable(key)} in it, where {list(like.shape)} is wanted; was another model trained?"
        )
    return found


def _spread(p: Params, mask: list[bool] | None) -> Params:
    """The tensors with zeros for the triplets that are gone."""
    if mask is None or len(mask) == len(p["E"]):
        return p
    left = torch.tensor(mask).nonzero().flatten()
    found = {}
    for role, values in p.items():
        along = 1 if role == "B" else 0
        shape = list(values.shape)
        shape[along] = len(mask)
        found[role] = values.new_zeros(shape).index_copy_(along, left, values)
    return found
