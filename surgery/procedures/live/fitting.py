"""fit: an adapter that is checked whole, laid over a model's modules."""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from surgery.core.collector import collector_paused
from surgery.core.config import AdapterConfig
from surgery.core.method import Params
from surgery.core.room import Room
from surgery.errors import ConfigError, MatchError, StateError, UsageError, printable
from surgery.hosts.of_peft import refuse_adapters_of_peft
from surgery.hosts.quantized import hold, is_quantized
from surgery.hosts.tree import State, adapted_layers, refuse_merged, set_state, state_of
from surgery.layers import BASE, Adapted, Replaced, SharedSlot, Slot, Spelled, shared_slots
from surgery.layers.aware import Holding
from surgery.procedures.places.biases import Biases, lay_biases, refuse_clash, run_biases
from surgery.procedures.places.model_tree import Tree, wrap
from surgery.procedures.places.parameters import refuse_nested
from surgery.procedures.places.placing import placed, refuse_shares
from surgery.procedures.places.rows import FittedSite, share_rows
from surgery.procedures.places.stacking import own_parameters
from surgery.procedures.places.tied_copies import Saved, tie_copies
from surgery.procedures.places.tied_heads import Heads, lay_head

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_PROBE = Slot()


@dataclass(frozen=True)
class Fitting:
    """All that one adapter lays over a model, checked: nothing is changed before it is whole."""

    config: AdapterConfig
    sites: Mapping[str, FittedSite]
    saved: Saved  # by module: tensors to start from; None: the module's own
    aware: Mapping[str, Holding] = dataclasses.field(default_factory=dict)  # by site, where it is quantization-aware
    biases: Biases = dataclasses.field(default_factory=dict)
    rooms: Mapping[str, Room] = dataclasses.field(default_factory=dict)  # by site, where tensors are held with room
    heads: Heads = dataclasses.field(default_factory=dict)  # sites that have the factors of another

    def spelled(self, name: str) -> Spelled:
        """How the model spells the copies of a module."""
        return Spelled("base_layer", self.config.copied) if self.field(name) == "target_modules" else Replaced.spelled

    def field(self, name: str) -> str:
        """Which of the config's fields names a module that is copied."""
        targets = self.config.target_modules if self.config.copied else None
        return "target_modules" if name in (targets or ()) else "modules_to_save"

    def weighted(self, weight: float) -> "Fitting":
        """The same, `weight` times as strong. ConfigError where copies of modules are all that it is."""
        if self.config.copied:
            raise ConfigError(f"its weight is {weight}; {self.config.peft_type} replaces modules; 1 is wanted")
        sites = {name: (site, method.weighted(weight), p) for name, (site, method, p) in self.sites.items()}
        return replace(self, sites=sites)


@collector_paused()
def fit(tree: Tree, adapter: str, fitting: Fitting, trainable: bool) -> None:
    """Lay a checked adapter over the model. The first one of a model is active, later ones are not."""
    _refuse_unfit(tree, fitting)
    state = state_of(tree.root) or _frozen(tree)
    for place in tree.places:
        hold(place.module)
    if fitting.biases:
        state.biases[adapter] = lay_biases(tree, fitting.biases, trainable)
    touched: list[Adapted | Replaced] = [
        *_lay_layers(tree, adapter, fitting, trainable),
        *_lay_copies(tree, adapter, fitting, trainable),
    ]
    state.configs[adapter] = replace(fitting.config, inference_mode=not trainable)
    if len(state.configs) == 1:
        state.active = (adapter,)
    for wrapper in touched:  # elsewhere nothing has changed
        wrapper.activate(state.active, state.enabled)
    run_biases(state, state.active, state.enabled)


def _refuse_unfit(tree: Tree, fitting: Fitting) -> None:
    """An error by name for what this model cannot hold."""
    for name in fitting.saved:
        refuse_copy(tree.modules[name], name, fitting.field(name))
        _refuse_copy_in_copy(name, fitting)
    for name in fitting.saved:
        refuse_shares(tree, [name], f"{fitting.field(name)} names it")
    refuse_shares(tree, fitting.biases, "its bias would be trained")
    refuse_shares(tree, fitting.aware, "the adapter would be aware of its format")
    refuse_shares(tree, fitting.heads, "its factors are those of the embedding that it is tied to")
    refuse_nested(tree, {name: site for name, (site, _, _) in fitting.sites.items()}, fitting.saved)
    refuse_clash(tree, state_of(tree.root), fitting.biases, fitting.saved)


def refuse_copy(module: nn.Module, name: str, field: str) -> None:
    """MatchError where `field` names what cannot be trained, or what other adapters lie over and would be copied."""
    if any(is_quantized(one) for one in module.modules()):
        raise MatchError(
            f"{printable(name)}: {field} names it, and its weight is quantized, which no gradient can train; leave it "
            "out there, or load the model with it skipped"
        )
    if any(isinstance(one, Adapted | Replaced) for one in _within(module)):
        raise MatchError(
            f"{printable(name)}: {field} names it, and an adapter lies over it or within it; leave it out there, or "
            "delete that adapter first"
        )


def _refuse_copy_in_copy(name: str, fitting: Fitting) -> None:
    outer = next((other for other in fitting.saved if name.startswith(f"{other}.")), None)
    if outer is not None and fitting.config.copied:
        raise MatchError(f"{printable(name)}: it lies in {printable(outer)}, which is copied too; name one of them")


def _within(module: nn.Module) -> Iterator[nn.Module]:
    """All that a copy of the model's own module would hold, of what may have copies already."""
    return (module.original if isinstance(module, Replaced) else module).modules()


def _frozen(tree: Tree) -> State:
    """Freeze the model, and remember what was not."""
    wanted = {name: values for name, values in own_parameters(tree) if values.requires_grad}
    for values in wanted.values():
        values.requires_grad_(False)
    state = State(frozenset(wanted))
    set_state(tree.root, state)
    return state


def _lay_layers(tree: Tree, adapter: str, fitting: Fitting, trainable: bool) -> list[Adapted]:
    """The layers that the adapter lies over from now on."""
    touched, common = [], _Common(tree, fitting.config)
    for name, (site, method, params) in _outer_first(tree, fitting.sites):
        if name in fitting.heads:
            continue
        layer = tree.layer(name, site)
        own = common.placed(params, layer)
        layer.fit(adapter, method, own, trainable, fitting.aware.get(name), fitting.rooms.get(name))
        touched.append(layer)
    touched += [
        lay_head(tree, adapter, head, embedding, fitting.sites[head]) for head, embedding in fitting.heads.items()
    ]
    share_rows(tree, adapter, fitting.sites)
    return touched


class _Common:
    """What the sites of one adapter share: placed beside the first of them, and held in slots that all have."""

    def __init__(self, tree: Tree, config: AdapterConfig) -> None:
        layers = adapted_layers(tree.root).values() if config.shared else ()
        there = {name: slot for layer in layers for name, slot in shared_slots(layer).items()}
        self.slots = {name: there.get(name, SharedSlot()) for name in config.shared}
        self.roles, self.tensors = tuple(config.shared.values()), dict[str, Tensor]()

    def placed(self, params: Params, layer: Adapted) -> Params:
        """The tensors of a layer beside its weight."""
        weight, op = layer.base_weight, layer.op
        if not self.roles:
            return placed(params, weight, op)
        layer._modules.update(self.slots)
        if not self.tensors:
            self.tensors.update(placed({role: params[role] for role in self.roles}, weight, op, whole=True))
        own = {role: values for role, values in params.items() if role not in self.roles}  # in one order everywhere
        return {**placed(own, weight, op), **self.tensors}


def _outer_first(tree: Tree, sites: Mapping[str, FittedSite]) -> Iterator[tuple[str, FittedSite]]:
    """Modules, then parameters from the last of each module on: as PEFT has it, the first lies innermost."""
    alone = {name for name, (site, _, _) in sites.items() if site.acting.alone}
    yield from ((name, one) for name, one in sites.items() if name not in alone)
    for name in reversed(tree.parameter_names()) if alone else ():
        if name in alone:
            yield name, sites[name]


def _lay_copies(tree: Tree, adapter: str, fitting: Fitting, trainable: bool) -> list[Replaced]:
    """What holds the adapter's copies of modules from now on."""
    touched = []
    for name, tensors in fitting.saved.items():
        module = tree.modules[name]
        holder = module if isinstance(module, Replaced) else wrap(tree, module, Replaced(module, fitting.spelled(name)))
        holder.copies[adapter] = _copied(holder.original, tensors, trainable)
        touched.append(holder)
    if fitting.config.ties():
        tie_copies(tree, adapter, fitting.saved)
    return touched


def _copied(original: nn.Module, tensors: Mapping[str, Tensor] | None, trainable: bool) -> nn.Module:
    module = copy.deepcopy(original)
    if tensors is not None:
        module.load_state_dict(dict(tensors))
    return module.requires_grad_(trainable)


def check_name(root: nn.Module, adapter: str) -> None:
    """UsageError for a name that cannot be one; StateError if it is taken, or adapters are merged."""
    if not _NAME.fullmatch(adapter):
        raise UsageError(f"adapter name {printable(adapter)!r}: letters, digits, _ and - are wanted")
    if adapter == BASE or hasattr(_PROBE, adapter) or hasattr(nn.ModuleDict(), adapter):
        raise UsageError(
            f"adapter name {printable(adapter)!r}: modules have this word for something else; another is wanted"
        )
    refuse_adapters_of_peft(root)
    state = state_of(root)
    if state is not None and adapter in state.configs:
        raise StateError(f"adapter {adapter!r} is there already; choose another adapter_name, or eject first")
    refuse_merged(root, "add an adapter")
