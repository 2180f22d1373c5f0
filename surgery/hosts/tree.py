"""The tree of a live model: its modules by path, and how one takes another's place at every path."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from surgery.core.config import AdapterConfig
from surgery.errors import StateError
from surgery.layers import Adapted, Replaced
from surgery.methods.adalora_ranks import Importance

_STATE = "surgery_state"
_WRAPPERS = (Adapted, Replaced)


class Place(NamedTuple):
    """A module, where it hangs, and its path; a wrapper stands for what it wraps."""

    name: str
    module: nn.Module
    parent: nn.Module
    key: str


@dataclass
class State:
    """What a model with adapters remembers beside its modules."""

    trainable: frozenset[str]  # parameters that required gradients before the first injection
    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    importance: dict[str, Mapping[str, Importance]] = field(default_factory=dict)  # by adapter whose ranks are allotted
    regularized: bool = False  # did the model itself put AdaLoRA's regularizer into its last loss?


def state_of(root: nn.Module) -> State | None:
    """The state of the model that was injected; None if nothing is injected."""
    found = root.__dict__.get(_STATE)
    return found if isinstance(found, State) else None


def injected(root: nn.Module) -> State:
    """The state of a model with adapters. StateError if it has none."""
    state = state_of(root)
    if state is None or not state.configs:
        raise StateError("the model has no adapters; inject or load one first")
    return state


def set_state(root: nn.Module, state: State | None) -> None:
    if state is None:
        root.__dict__.pop(_STATE, None)
    else:
        root.__dict__[_STATE] = state


def places(root: nn.Module, prefix: str = "") -> Iterator[Place]:
    """Every path below `root`, shared modules at each; nothing inside a wrapper."""
    for key, module in root._modules.items():
        if module is None:
            continue
        name = prefix + key
        yield Place(name, module, root, key)
        if not isinstance(module, _WRAPPERS):
            yield from places(module, name + ".")


def adapted_layers(root: nn.Module) -> dict[str, Adapted]:
    """By path, each once."""
    return {place.name: place.module for place in _once(root) if isinstance(place.module, Adapted)}


def replaced_modules(root: nn.Module) -> dict[str, Replaced]:
    """By path, each once."""
    return {place.name: place.module for place in _once(root) if isinstance(place.module, Replaced)}


def _once(root: nn.Module) -> Iterator[Place]:
    seen: set[int] = set()
    for place in places(root):
        if id(place.module) not in seen:
            seen.add(id(place.module))
            yield place
