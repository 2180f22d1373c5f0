"""Stacking: an adapter over a model's layers in another order, each as often as wanted. PEFT's `layer_replication`.

The layers of a stack share the weights of those that they are copies of, and have factors of their own.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from surgery.core.config import AdapterConfig
from surgery.errors import MatchError, StateError
from surgery.hosts.tree import state_of
from surgery.layers.stacked import Stacked
from surgery.procedures.places.model_tree import Tree

_LISTS = (("layers",), ("encoder", "layer"), ("h",))  # where PEFT looks for the list of layers


class _Place(NamedTuple):
    """Where a model's list of layers hangs, and the config that speaks of them."""

    parent: nn.Module
    key: str
    config: Any

    @property
    def layers(self) -> nn.ModuleList:
        found: nn.ModuleList = self.parent._modules[self.key]  # type: ignore[assignment]
        return found

    def put(self, layers: nn.ModuleList, told: Mapping[str, Any]) -> None:
        self.parent._modules[self.key] = layers
        for name, value in told.items():
            setattr(self.config, name, value)


@contextmanager
def stacked(root: nn.Module, config: AdapterConfig) -> Iterator[None]:
    """The model with its layers as `config` stacks them; as it was if what is laid over it meanwhile is refused.

    MatchError for a model without such layers, StateError where its adapters are over another stack.
    """
    was_stacked = stack_of(root) is not None
    check_stack(root, config)
    if config.stacking() and not was_stacked:
        _stack(root, config.stacking())
    try:
        yield
    except BaseException:
        if not was_stacked:
            unstack(root)
        raise


def check_stack(root: nn.Module, config: AdapterConfig) -> None:
    """StateError where the adapters of a model and this one are not all over one stack."""
    stack, state, wanted = stack_of(root), state_of(root), config.stacking()
    there = () if stack is None else stack.order
    if there != wanted and (there or (state is not None and state.configs)):
        raise StateError(
            f"layer_replication: the model's adapters are over {_told(there)}, and this one is over {_told(wanted)}; "
            "one for all is wanted; eject first"
        )


def stack_of(root: nn.Module) -> Stacked | None:
    """The stack that a model's adapters are over, if there is one."""
    place = _place(root)
    return place.layers if place is not None and isinstance(place.layers, Stacked) else None


def unstack(root: nn.Module) -> None:
    """Put the model's own layers back, if they are stacked."""
    place, stack = _place(root), stack_of(root)
    if place is not None and stack is not None:
        place.put(stack.own, stack.told)


def own_parameters(tree: Tree) -> Iterable[tuple[str, nn.Parameter]]:
    """Of the model without a stack, by the names that they have there."""
    place, stack = _place(tree.root), stack_of(tree.root)
    if place is None or stack is None:
        return tree.parameters()
    place.put(stack.own, {})
    try:
        return list(tree.root.named_parameters())
    finally:
        place.put(stack, {})


def merge_refusal(where: str) -> MatchError:
    """Why an adapter over a stack is not merged."""
    return MatchError(
        f"{where}: layer_replication, by which layers share one weight, and a merge would change it for all of them; "
        "leave it unmerged"
    )


def _stack(root: nn.Module, order: tuple[int, ...]) -> None:
    place = _place(root)
    if place is None:
        raise MatchError(
            "layer_replication: the model has no list of layers where PEFT looks for it, at layers, encoder.layer or "
            "h, within its model or bert; leave it out"
        )
    if max(order) >= len(place.layers):
        raise MatchError(
            f"layer_replication: it takes layer {max(order)}, and the model has {len(place.layers)}, from 0 on; is "
            "this the adapter's base?"
        )
    told = {name: getattr(place.config, name, None) for name in ("num_hidden_layers", "layer_types")}
    told = {name: value for name, value in told.items() if value is not None}
    kinds = told.get("layer_types")
    after = {"num_hidden_layers": len(order), "layer_types": kinds and [kinds[at] for at in order]}
    place.put(Stacked(place.layers, order, told), {name: after[name] for name in told})


def _place(root: nn.Module) -> _Place | None:
    """Where PEFT would find the list of layers."""
    module = root
    while (inner := module._modules.get("model")) is not None:
        module = inner
    module = module._modules.get("bert") or module
    for path in _LISTS:
        parent: nn.Module | None = module
        for key in path[:-1]:
            parent = None if parent is None else parent._modules.get(key)
        if parent is not None and isinstance(parent._modules.get(path[-1]), nn.ModuleList):
            return _Place(parent, path[-1], module.__dict__.get("config"))
    return None


def _told(order: tuple[int, ...]) -> str:
    return f"layers {', '.join(map(str, order))}" if order else "the model's own layers"
