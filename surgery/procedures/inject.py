"""inject and eject: adapters into any model in place, and the very modules back out."""

import copy
import gc
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surgery.core.config import AdapterConfig
from surgery.core.method import Dense, Method, Params
from surgery.core.names import suffix_hits
from surgery.core.select import refuse_unmatched, saved_modules, select, unmatched
from surgery.core.sharded import is_sharded, rest
from surgery.core.site import Site
from surgery.errors import MatchError, StateError, UsageError, printable
from surgery.hosts.model import live_site
from surgery.hosts.recognition import op_of, unfit
from surgery.hosts.tree import Place, State, places, set_state, state_of
from surgery.layers import Adapted, Replaced, Slot
from surgery.ops.linear import LAYOUTS
from surgery.procedures.merge import refuse_merged, refuse_mixed, unmerge

Wrapper = TypeVar("Wrapper", Adapted, Replaced)

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_PROBE = Slot()


@dataclass(frozen=True)
class Fitting:
    """All that one adapter lays over a model, checked: nothing is changed before it is whole."""

    config: AdapterConfig
    sites: Mapping[str, tuple[Site, Method, Params]]
    saved: Mapping[str, Mapping[str, Tensor] | None]  # by module: tensors to start from; None: the module's own


class Tree:
    """The modules of a model by path, and the paths of each module."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        rest(root)  # else weights in shares would not look like it
        self.places = list(places(root))
        self.modules = {place.name: place.module for place in self.places}
        self.aliases: dict[int, list[Place]] = {}
        for place in self.places:
            self.aliases.setdefault(id(place.module), []).append(place)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As `named_parameters`, each once at its first path, from the walk that has been made."""
        seen: set[int] = set()
        for prefix, module in [("", self.root), *((place.name + ".", place.module) for place in self.places)]:
            for key, values in module._parameters.items():
                if values is not None and id(values) not in seen:
                    seen.add(id(values))
                    yield prefix + key, values

    def first_name(self, name: str) -> str:
        """The first path of the module at `name`."""
        return self.aliases[id(self.modules[name])][0].name

    def is_linear(self, name: str) -> bool:
        """Is it of what "all-linear" stands for, output heads aside?"""
        module = self.modules[name]
        op = op_of(module.base_layer if isinstance(module, Adapted) else module)
        return op is not None and op.name in LAYOUTS

    def spelled(self, names: Iterable[str]) -> dict[str, str]:
        """What is adapted with `names`, as PEFT spells each: an attention layer has its out_proj with it."""
        found = {name: name for name in names}
        for name in list(found):
            module = self.modules[name]
            if isinstance(module.base_layer if isinstance(module, Adapted) else module, nn.MultiheadAttention):
                found[f"{name}.out_proj"] = f"{name}.base_layer.out_proj"
        return found

    def site(self, name: str) -> Site:
        """The site at a path. MatchError if no op of ours acts there."""
        module = self.modules[name]
        base = module.base_layer if isinstance(module, Adapted) else module
        op = op_of(base)
        if op is None:
            kind = f"{type(base).__module__}.{type(base).__name__}"
            raise MatchError(
                f"{printable(name)}: a {kind}; Linear, Conv1D, Embedding, Conv1d, Conv2d, Conv3d and "
                "MultiheadAttention can be adapted; name their paths, or exclude this one"
            )
        why = unfit(base)
        if why is not None:
            raise MatchError(f"{printable(name)}: {why}, or exclude it")
        if any(is_sharded(values) for values in base._parameters.values() if values is not None):
            raise StateError(
                f"{printable(name)}: each process holds a share of its weight, and would train a new adapter over "
                "it by itself; inject or load first, then fully_shard"
            )
        return live_site(name, base, op)

    def dense(self, name: str) -> Dense:
        """The base's weight at a path where a site is, outside autograd."""
        module = self.modules[name]
        base: Any = module.base_layer if isinstance(module, Adapted) else module
        op = self.site(name).acting
        held: Tensor = getattr(base, op.roles.get("weight", "weight"))
        return Dense(op.matrix(held.detach()))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Thousands of modules are made and all of them stay: a search for garbage would double the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_collector_paused()
def inject(
    root: nn.Module,
    config: AdapterConfig,
    adapter: str,
    output_heads: Callable[[], Collection[str]] = tuple,
    trainable: bool = True,
) -> None:
    """Lay a fresh adapter over the modules that `config` selects; `output_heads` finds what "all-linear" leaves out.

    Raises MatchError for an entry that hits nothing, StateError if `adapter` is there or a merge is.
    """
    check_name(root, adapter)
    config.check_fresh()
    tree = Tree(root)
    config = with_task_heads(config, tree)
    names = list(tree.modules)
    chosen = select(config, names, lambda: {name for name in names if tree.is_linear(name)} - {*output_heads()})
    refuse_unmatched("target_modules", unmatched(config, chosen), names)
    first = dict.fromkeys(tree.first_name(name) for name in chosen)
    for field, entries in config.unused(first.keys()).items():
        refuse_unmatched(field, entries, first.keys())
    sites = {}
    for name, spelling in tree.spelled(first).items():
        site, method = tree.site(name), config.method(spelling)
        sites[name] = site, method, method.init(site, partial(tree.dense, name))
    saved = dict.fromkeys(tree.first_name(name) for name in saved_modules(config, names))
    fit(tree, adapter, Fitting(config, sites, saved), trainable)


@_collector_paused()
def fit(tree: Tree, adapter: str, fitting: Fitting, trainable: bool) -> None:
    """Lay a checked adapter over the model. The first one of a model is active, later ones are not."""
    root = tree.root
    state = state_of(root) or _frozen(tree)
    touched: list[Adapted | Replaced] = []
    for name, (site, method, params) in fitting.sites.items():
        module = tree.modules[name]
        layer = module if isinstance(module, Adapted) else _wrap(tree, module, Adapted(module, site))
        layer.fit(adapter, method, _placed(params, layer.base_weight), trainable)
        touched.append(layer)
    for name, tensors in fitting.saved.items():
        module = tree.modules[name]
        holder = module if isinstance(module, Replaced) else _wrap(tree, module, Replaced(module))
        holder.modules_to_save[adapter] = _copied(holder.original_module, tensors, trainable)
        touched.append(holder)
    state.configs[adapter] = replace(fitting.config, inference_mode=not trainable)
    if len(state.configs) == 1:
        state.active = (adapter,)
    for wrapper in touched:  # elsewhere nothing has changed
        wrapper.activate(state.active, state.enabled)


def _frozen(tree: Tree) -> State:
    """Freeze the model, and remember what was not."""
    wanted = {name: values for name, values in tree.parameters() if values.requires_grad}
    for values in wanted.values():
        values.requires_grad_(False)
    state = State(frozenset(wanted))
    set_state(tree.root, state)
    return state


def activate(root: nn.Module, state: State, adapters: tuple[str, ...], enabled: bool) -> None:
    """Run `adapters`, in this order, wherever they lie, if `enabled`."""
    for place in places(root):
        if isinstance(place.module, Adapted | Replaced):
            place.module.activate(adapters, enabled)
    state.active, state.enabled = adapters, enabled


def eject(root: nn.Module, keep_merged: bool = False) -> None:
    """Put the model's own modules back, with their flags; merged weights are unmerged first, or kept.

    StateError if nothing is injected, or nothing merged that could be kept.
    """
    state = state_of(root)
    if state is None:
        raise StateError("eject: the model has no adapters; inject or load one first")
    refuse_mixed(root, "eject")
    merged = any(isinstance(p.module, Adapted) and p.module.merged is not None for p in places(root))
    if keep_merged and not merged:
        raise StateError("eject: keep_merged, but nothing is merged; merge the model first")
    if merged and not keep_merged:
        unmerge(root)
    for place in list(places(root)):
        if isinstance(place.module, Adapted):
            place.parent._modules[place.key] = place.module.base_layer
        elif isinstance(place.module, Replaced):
            kept = place.module.running if keep_merged else place.module.original_module
            place.parent._modules[place.key] = kept
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in state.trainable)
    set_state(root, None)


def check_name(root: nn.Module, adapter: str) -> None:
    """UsageError for a name that cannot be one; StateError if it is taken, or adapters are merged."""
    if not _NAME.fullmatch(adapter) or hasattr(_PROBE, adapter) or hasattr(nn.ModuleDict(), adapter):
        raise UsageError(f"adapter name {printable(adapter)!r}: letters, digits, _ and - are wanted")
    state = state_of(root)
    if state is not None and adapter in state.configs:
        raise StateError(f"adapter {adapter!r} is there already; choose another adapter_name, or eject first")
    refuse_merged(root, "add an adapter")


def with_task_heads(config: AdapterConfig, tree: Tree) -> AdapterConfig:
    """As PEFT: the heads of a task are saved with the adapter, those of them that the model has."""
    if not config.task_heads():
        return config
    given = list(config.modules_to_save or ())
    heads = {head for name in tree.modules for head in suffix_hits(config.task_heads(), name)}
    added = sorted(heads - set(given))
    return replace(config, modules_to_save=[*given, *added]) if added else config


def _wrap(tree: Tree, module: nn.Module, wrapper: Wrapper) -> Wrapper:
    """Put `wrapper` at every path of `module`."""
    wrapper.__dict__["training"] = module.training
    for place in tree.aliases[id(module)]:
        place.parent._modules[place.key] = wrapper
        tree.modules[place.name] = wrapper
    tree.aliases[id(wrapper)] = tree.aliases[id(module)]
    return wrapper


def _placed(params: Params, weight: Tensor) -> Params:
    """On the weight's device, in its dtype, or in float32 where that is a half type: small steps survive."""
    half = weight.dtype.itemsize < 4
    dtype = torch.float32 if half else weight.dtype
    return {role: values.to(weight.device, dtype) for role, values in params.items()}


def _copied(original: nn.Module, tensors: Mapping[str, Tensor] | None, trainable: bool) -> nn.Module:
    module = copy.deepcopy(original)
    if tensors is not None:
        module.load_state_dict(dict(tensors))
    return module.requires_grad_(trainable)
