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
from surgery.core.method import Params
from surgery.errors import InputError, MatchError, printable
from surgery.hosts.tree import injected
from surgery.io.durable import write_file
from surgery.io.octets import tensor_from
from surgery.io.regular import contained
from surgery.io.tensor_file import TensorFile
from surgery.methods.adalora_config import AdaLoraConfig
from surgery.methods.adalora_ranks import Importance, Smoothed
from surgery.procedures.live.adalora import adalora_of, in_training, sites_of
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
    importance, config = injected(root).importance.get(adapter, {}), adalora_of(injected(root), adapter)
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
    held, state, (adapter, config) = _tensors(file), injected(root), _read(folder)
    fitted = sites_of(root, adapter_name)
    masks = {f"{name}.lora_E": held[f"{name}.{_MASK}"].tolist() for name in fitted if f"{name}.{_MASK}" in held}
    told = replace(config, rank_pattern=masks or None)  # refuses masks that are none, while nothing has changed
    importance = {}
    if any(key.endswith(Smoothed._fields) for key in held):
        importance = {name: _importance(held, name, p) for name, p in fitted.items()}
    sites = {name: _whole(held, name, p) for name, p in fitted.items()}
    _refill_whole(root, replace(adapter, sites=sites), told, adapter_name)
    state.importance.pop(adapter_name, None)
    if importance:
        state.importance[adapter_name] = importance


def read_reduced(root: nn.Module, adapter_name: str, folder: Path) -> None:
    """The adapter that was saved, without its progress: what is gone is zero in the model."""
    adapter, config = _read(folder)
    sites = {name: _spread(p, config.mask(name)) for name, p in adapter.sites.items()}
    _refill_whole(root, replace(adapter, sites=sites), config, adapter_name)


def _read(folder: Path) -> tuple[Adapter, AdaLoraConfig]:
    """The adapter in a folder, and its config. MatchError for one of another kind."""
    adapter = read_adapter(folder)
    if not isinstance(adapter.config, AdaLoraConfig):
        raise MatchError(
            f"{printable(folder)}: its adapter is of {adapter.config.peft_type}, and the model's of "
            f"{AdaLoraConfig.peft_type}; the same kind is wanted; was it saved from a model with another config?"
        )
    return adapter, adapter.config


def _refill_whole(root: nn.Module, adapter: Adapter, config: AdaLoraConfig, adapter_name: str) -> None:
    """The adapter, with all the triplets that it began with, into the model's; `config` tells which are left."""
    refill(root, replace(adapter, config=replace(config, rank_pattern=None)), adapter_name)
    state = injected(root)
    told = adalora_of(state, adapter_name)
    state.configs[adapter_name] = replace(told, rank_pattern=config.rank_pattern)


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
