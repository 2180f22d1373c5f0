"""refill: the tensors of a saved adapter into one that lies over a live model, in place."""

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from surgery.core.adapter import Adapter
from surgery.core.config import AdapterConfig
from surgery.core.sharded import fill
from surgery.errors import MatchError, ShapeError, printable
from surgery.hosts.tree import adapted_layers, injected, refuse_merged, replaced_modules
from surgery.layers import Adapted, Replaced
from surgery.layers.running import Tied
from surgery.layers.trained_bias import trained_bias
from surgery.procedures.live.fitting import Fitting
from surgery.procedures.live.load import fitting_of
from surgery.procedures.live.room import with_zeros
from surgery.procedures.places.model_tree import Tree
from surgery.procedures.places.stacking import check_stack


def refill(root: nn.Module, adapter: Adapter, adapter_name: str) -> None:
    """Make the adapter that is there the one that is given; its parameters stay the very same objects.

    Nothing changes unless all fits: MatchError if it lies over other modules, ShapeError for another rank. One that
    was laid with room takes any rank up to that, and what lies over fewer modules.
    """
    state = injected(root)
    state.require(adapter_name)
    refuse_merged(root, "load into an adapter")
    check_stack(root, adapter.config)
    layers = {name: layer for name, layer in adapted_layers(root).items() if adapter_name in layer.fitted}
    fitting = _as_held(fitting_of(Tree(root), adapter), layers, adapter_name, state.configs[adapter_name])
    fitting = with_zeros(fitting, layers, adapter_name)
    holders = {name: one for name, one in replaced_modules(root).items() if adapter_name in one.copies}
    _check_same(fitting.sites, layers, adapter)
    _check_tensors(fitting, layers, adapter_name, adapter)
    _check_same(fitting.saved, holders, adapter)
    there = state.biases.get(adapter_name, {})
    _check_same(fitting.biases, there, adapter)
    _check_heads(fitting, layers, adapter_name, adapter)
    biases = [(f"{name}.bias", trained_bias(one), _given(fitting.biases[name])) for name, one in there.items()]
    pairs = [*_factors(fitting, layers, adapter_name, adapter), *_wholes(fitting, holders, adapter_name), *biases]
    for name, old, new in pairs:
        if old.shape != new.shape:
            raise ShapeError(
                f"{printable(adapter.where)}: {printable(name)} is {list(new.shape)}, in the model's adapter "
                f"{adapter_name!r} it is {list(old.shape)}; they must be equal; delete that adapter and load this one"
            )
    with torch.no_grad():
        for old, new in {id(old): (old, new) for _, old, new in pairs}.values():  # what sites share, once
            fill(old, new)
    for name, layer in layers.items():
        layer.retune(adapter_name, fitting.sites[name][1])
    state.configs[adapter_name] = replace(fitting.config, inference_mode=state.configs[adapter_name].inference_mode)


def _as_held(fitting: Fitting, layers: dict[str, Adapted], adapter_name: str, config: AdapterConfig) -> Fitting:
    """What is saved as another kind of adapter than it is, as the model holds it, if all of it is so."""
    sites = {}
    for name, (site, method, params) in fitting.sites.items():
        own = layers[name].fitted[adapter_name].method if name in layers else method
        held = own.reread(method, params)
        if held is None:
            return fitting
        sites[name] = site, own, held
    return replace(fitting, config=config, sites=sites)


def _check_same(given: Collection[str], there: Collection[str], adapter: Adapter) -> None:
    for name in sorted({*given} ^ {*there}):
        found = "it does not adapt" if name in there else "it adapts"
        raise MatchError(
            f"{printable(adapter.where)}: {found} {printable(name)}, unlike the model's adapter; "
            "the same modules are wanted; was it saved from a model with another config?"
        )


def _check_tensors(fitting: Fitting, layers: dict[str, Adapted], adapter_name: str, adapter: Adapter) -> None:
    for name, (_, method, params) in fitting.sites.items():
        one = layers[name].fitted[adapter_name]
        if params.keys() != one.params.keys():
            raise MatchError(
                f"{printable(adapter.where)}: {printable(name)} is {method.name} of {', '.join(params)}, and in the "
                f"model's adapter {adapter_name!r} {one.method.name} of {', '.join(one.params)}; the same tensors are "
                "wanted; delete that adapter and load this one"
            )


def _check_heads(fitting: Fitting, layers: dict[str, Adapted], adapter_name: str, adapter: Adapter) -> None:
    """MatchError where only one of the two lets what is tied have the factors of the embedding."""
    there = {name for name, layer in layers.items() if isinstance(layer.fitted[adapter_name], Tied)}
    for name in sorted(there ^ {*fitting.heads}):
        told = "the same" if name in fitting.heads else "others"
        raise MatchError(
            f"{printable(adapter.where)}: {printable(name)} has factors that are {told}, unlike those of the model's "
            f"adapter {adapter_name!r}, over the weight that it shares with an embedding; delete that adapter and "
            "load this one"
        )


def _given(values: Tensor | None) -> Tensor:
    assert values is not None  # as in any file
    return values


def _factors(
    fitting: Fitting, layers: dict[str, Adapted], adapter_name: str, adapter: Adapter
) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, (_, method, params) in fitting.sites.items():
        one = layers[name].fitted[adapter_name]
        held = one.held
        laid = one.laid(method, params, f"{printable(adapter.where)}: {printable(name)}")
        yield from ((f"{name}: {role}", held[role], values) for role, values in laid.items())


def _wholes(fitting: Fitting, holders: dict[str, Replaced], adapter_name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, holder in holders.items():
        held, given = holder.copies[adapter_name].state_dict(), fitting.saved[name] or {}
        yield from ((f"{name}.{key}", held[key], values) for key, values in given.items())
