"""Changes of a live model: what its active adapters make of each weight and bias, where a merge may make it so."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from surgery.core.adapter import Layer, bias_layers
from surgery.core.as_peft import Arithmetic, PeftMerge, refuse_unlike_peft
from surgery.core.sharded import whole
from surgery.core.site import Site
from surgery.errors import MatchError, printable
from surgery.hosts.change import Change
from surgery.hosts.model import live_site
from surgery.layers import Adapted
from surgery.layers.running import Fitted
from surgery.ops.bias import Bias, bias_site
from surgery.procedures.live.standing_in import held_as, plain_dtype
from surgery.procedures.places.rows import merged_once
from surgery.procedures.places.tied_heads import merged_with_embedding, unlike_peft

Changes = Mapping[str, tuple[Change, ...]]  # by layer: of its weight and, if that is changed too, of its bias


def changes_of(
    root: nn.Module, layers: Mapping[str, Adapted], arithmetic: Arithmetic, model_dtype: torch.dtype
) -> Changes:
    """Of each layer; none where another that shares its weight is changed alike.

    MatchError for a tied weight, ConfigError for an adapter whose merge by this arithmetic is not known.
    """
    heads = merged_with_embedding(layers)
    if heads and arithmetic != "exact":
        raise unlike_peft(printable(min(heads)))
    once = merged_once(layers) | heads
    clones = Clones()
    found = {
        name: () if name in once else _followed(_changes(name, layer, model_dtype, clones), arithmetic)
        for name, layer in layers.items()
    }
    _refuse_tied(root, layers, found)
    return found


def parameter_of(layer: Adapted, change: Change) -> Tensor:
    """What the change is of."""
    role = _role(change)
    held: Tensor = getattr(layer.innermost, layer.op.roles.get(role, role))
    return held


def _role(change: Change) -> str:
    return "bias" if change.site.acting.name == Bias.name else "weight"


class Clones:
    """Copies of what lies over layers, for training may go on; what layers share is copied once for each device."""

    def __init__(self) -> None:
        self.shared: dict[tuple[int, torch.device], Tensor] = {}  # by what the model holds

    def of(self, one: Fitted, site: Site, device: torch.device) -> Layer:
        """An adapter over a site, its tensors on the device."""
        specs = one.method.tensors(site)
        copies = {
            role: self._once(values, device) if specs[role].shared else _copy(values, device)
            for role, values in one.params.items()
        }
        return Layer(one.method, copies)

    def _once(self, values: Tensor, device: torch.device) -> Tensor:
        key = id(values), device
        if key not in self.shared:
            self.shared[key] = _copy(values, device)
        return self.shared[key]


def _copy(values: Tensor, device: torch.device) -> Tensor:
    return whole(values.detach()).to(device, copy=True)


def _changes(name: str, layer: Adapted, model_dtype: torch.dtype, clones: Clones) -> tuple[Change, ...]:
    """What the active adapters make of a layer's weight and bias; the factors are cloned, for training may go on."""
    site = layer.site if layer.op.alone else live_site(name, layer.base_layer, layer.op)
    active = [layer.fitted[adapter] for adapter in layer.active]
    for one in active:
        one.method.refuse_merge(site)
    layers = [clones.of(one, site, layer.base_weight.device) for one in active]
    held = held_as(layer)
    dtype = plain_dtype(layer.beneath, model_dtype) if held else site.weight.torch_dtype
    on_weight = tuple(layer for layer in layers if not layer.method.leaves_weight)
    weight, bias = Change(site, dtype, on_weight, held=held), bias_site(site)
    on_bias = bias_layers(layers, site)
    return (weight, Change(bias, bias.weight.torch_dtype, on_bias, held=held)) if bias and on_bias else (weight,)


def _followed(changes: tuple[Change, ...], arithmetic: Arithmetic) -> tuple[Change, ...]:
    """The same by this arithmetic. ConfigError for a layer that it does not know."""
    if arithmetic == "exact":
        return changes
    for change in changes:
        for layer in change.layers:
            refuse_unlike_peft(layer.method, change.site)
    as_peft = PeftMerge(safe=arithmetic == "peft-safe", as_held=True)
    return tuple(replace(change, as_peft=as_peft) for change in changes)


def _refuse_tied(root: nn.Module, layers: Mapping[str, Adapted], changes: Changes) -> None:
    """MatchError where another module holds the very parameter."""
    owners: dict[int, dict[str, nn.Module]] = {}
    for name, module in root.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), {})[name] = module
    shared = {layer.innermost for name, layer in layers.items() if not changes[name]}  # of which nothing is said anew
    for name, layer in layers.items():
        for change in changes[name]:
            holding = owners[id(parameter_of(layer, change))].items()
            others = [owner for owner, module in holding if module not in {layer.innermost, *shared}]
            if others:
                raise MatchError(
                    f"{printable(name)}: its {_role(change)} is tied to {printable(others[0])}; a merge would change "
                    "both; untie them, or leave it out of target_modules"
                )
