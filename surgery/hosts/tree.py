"""The tree of a live model: its modules by path, and how one takes another's place at every path."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from surgery.core.config import AdapterConfig
from surgery.errors import StateError, printable
from surgery.hosts.of_peft import refuse_adapters_of_peft
from surgery.layers import Adapted, Replaced, base_of
from surgery.methods.adalora_ranks import Importance

_STATE = "surgery_state"


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
    mixed: tuple[str, ...] = ()  # the adapter of each row, while a batch is mixed
    importance: dict[str, Mapping[str, Importance]] = field(default_factory=dict)  # by adapter whose ranks are allotted
    biases: dict[str, Mapping[str, nn.Module]] = field(default_factory=dict)  # by adapter: modules whose bias it trains
    regularized: bool = False  # is AdaLoRA's regularizer in the last loss, by the model itself or its Trainer?
    by_trainer: bool = False  # does a Trainer compute a loss, so that the model itself adds nothing?
    owed: bool = False  # is the Trainer to add it to that loss?

    def require(self, adapter: str) -> None:
        """StateError if the model has no adapter of that name."""
        if adapter not in self.configs:
            there = ", ".join(map(printable, self.configs))
            raise StateError(f"adapter {printable(adapter)!r} is not in the model; there are: {there}")


def state_of(root: nn.Module) -> State | None:
    """The state of the model that was injected; None if nothing is injected."""
    found = root.__dict__.get(_STATE)
    return found if isinstance(found, State) else None


def injected(root: nn.Module) -> State:
    """The state of a model with adapters. StateError if it has none."""
    state = state_of(root)
    if state is None or not state.configs:
        refuse_adapters_of_peft(root)
        raise StateError("the model has no adapters; inject or load one first")
    return state


def refuse_merged(root: nn.Module, what: str) -> None:
    """StateError while adapters are merged, or a batch is mixed."""
    refuse_mixed(root, what)
    if state_of(root) is not None and is_merged(root):
        raise StateError(f"cannot {what} while adapters are merged; unmerge first")


def is_merged(root: nn.Module) -> bool:
    """Does the model hold adapters as its own?"""
    layers, holders = adapted_layers(root).values(), replaced_modules(root).values()
    return any(layer.merged is not None for layer in layers) or any(holder.merged for holder in holders)


def refuse_mixed(root: nn.Module, what: str) -> None:
    """StateError while a batch is mixed."""
    state = state_of(root)
    if state is not None and state.mixed:
        raise StateError(f"cannot {what} while a batch is mixed; leave mixed_batch first")


def set_state(root: nn.Module, state: State | None) -> None:
    if state is None:
        root.__dict__.pop(_STATE, None)
    else:
        root.__dict__[_STATE] = state


def places(root: nn.Module, prefix: str = "") -> Iterator[Place]:
    """Every path below `root` as it is without wrappers, shared modules at each; of a wrapper, what its base holds.

    A wrapper of a parameter stands at that parameter's name, before the module that holds it.
    """
    for key, module in root._modules.items():
        if module is None:
            continue
        place = Place(prefix + key, module, root, key)
        if isinstance(module, Adapted):
            *alone, place = _unwrapped(place)
            yield from alone
        yield place
        base = base_of(place.module)
        if base._modules and not isinstance(base, Replaced):
            yield from places(base, place.name + ".")


def _unwrapped(place: Place) -> Iterator[Place]:
    """The wrappers of a module's parameters at a place, from the outermost on, and the module."""
    module = place.module
    while isinstance(module, Adapted) and module.parameter is not None:
        yield place._replace(name=f"{place.name}.{module.parameter}")
        place = Place(place.name, module.base_layer, module, "base_layer")
        module = place.module
    yield place


def spelled(layers: Mapping[str, Adapted], name: str, adapter: str) -> str:
    """How PEFT spells the path of an adapted layer: what lies in another that this adapter lies over says so.

    Of the parameters of one module, each lies in those that come after it.
    """
    if layers[name].parameter is not None:
        owner, others = _beside(layers, name)
        after = others[others.index(name) + 1 :]
        return owner + _BASE * sum(adapter in layers[other].fitted for other in after)
    outer = layers.get(name.rpartition(".")[0])
    return live_path(layers, name) if outer is not None and adapter in outer.fitted else name


def live_path(layers: Mapping[str, Adapted], name: str) -> str:
    """The path of an adapted layer in the model as it is, with what it lies in."""
    if layers[name].parameter is not None:
        owner, others = _beside(layers, name)
        return owner + _BASE * (len(others) - layers[name].depth)
    parent, _, last = name.rpartition(".")
    return f"{parent}.base_layer.{last}" if parent in layers else name


def _beside(layers: Mapping[str, Adapted], name: str) -> tuple[str, list[str]]:
    """The module of an adapted parameter, and all of its that are adapted, in the module's order."""
    owner = name.rpartition(".")[0]
    names = (f"{owner}.{own}" for own in layers[name].innermost._parameters)
    return owner, [other for other in names if other in layers]


_BASE = ".base_layer"


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
