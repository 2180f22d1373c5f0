"""inject and eject: adapters into any model in place, and the very modules back out."""

import copy
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from surgery.codecs.formats import Format
from surgery.core.collector import collector_paused
from surgery.core.config import AdapterConfig
from surgery.core.entries import InPeftTerms, in_peft_terms
from surgery.core.method import Dense, Method, Params
from surgery.core.names import suffix_hits
from surgery.core.room import Room
from surgery.core.select import kept_out, refuse_unmatched, saved_modules, select, unmatched
from surgery.core.site import Site
from surgery.errors import MatchError, StateError, UsageError, printable
from surgery.hosts.quantized import hold, is_quantized, release
from surgery.hosts.tree import State, places, set_state, state_of
from surgery.layers import Adapted, Replaced, Slot
from surgery.layers.aware import Holding
from surgery.layers.trained_bias import lift_bias
from surgery.procedures.live.awareness import holdings
from surgery.procedures.live.examples import Examples
from surgery.procedures.live.fresh import fresh_sites
from surgery.procedures.live.merge import refuse_merged, refuse_mixed, unmerge
from surgery.procedures.places.biases import Biases, keep_biases, lay_biases, refuse_clash, run_biases, trained_modules
from surgery.procedures.places.model_tree import Tree, wrap
from surgery.procedures.places.parameters import refuse_nested, targeted_parameters
from surgery.procedures.places.placing import placed, refuse_shares
from surgery.procedures.places.rows import share_rows, with_rows, with_tied_rows
from surgery.procedures.places.stacking import own_parameters, stacked, unstack
from surgery.procedures.places.tied_copies import Saved, tie_copies, with_tied_copies

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_PROBE = Slot()


@dataclass(frozen=True)
class Fitting:
    """All that one adapter lays over a model, checked: nothing is changed before it is whole."""

    config: AdapterConfig
    sites: Mapping[str, tuple[Site, Method, Params]]
    saved: Saved  # by module: tensors to start from; None: the module's own
    aware: Mapping[str, Holding] = dataclasses.field(default_factory=dict)  # by site, where it is quantization-aware
    biases: Biases = dataclasses.field(default_factory=dict)
    rooms: Mapping[str, Room] = dataclasses.field(default_factory=dict)  # by site, where tensors are held with room

    def weighted(self, weight: float) -> "Fitting":
        """The same, `weight` times as strong."""
        sites = {name: (site, method.weighted(weight), p) for name, (site, method, p) in self.sites.items()}
        return dataclasses.replace(self, sites=sites)


@collector_paused()
def inject(  # noqa: PLR0913, PLR0917  # into what, which adapter, and how it runs
    root: nn.Module,
    config: AdapterConfig,
    adapter: str,
    output_heads: Callable[[], Collection[str]] = tuple,
    trainable: bool = True,
    form: Format | None = None,
    as_peft: bool = False,
    examples: Examples | None = None,
) -> None:
    """Lay a fresh adapter over the modules that `config` selects; `output_heads` finds what "all-linear" leaves out.

    With a format it runs as it will once it is merged and held so. `as_peft` reads the config by PEFT's own rules,
    by which an entry that hits nothing is none. `examples` are for those that start from some.
    Raises MatchError for an entry that hits nothing, StateError if `adapter` is there or a merge is.
    """
    check_name(root, adapter)
    config.check_fresh()
    with stacked(root, config):
        tree = Tree(root)
        fit(tree, adapter, _fresh(tree, config, output_heads, form, as_peft, examples), trainable)


def _fresh(  # noqa: PLR0913, PLR0917  # as inject
    tree: Tree,
    config: AdapterConfig,
    output_heads: Callable[[], Collection[str]],
    form: Format | None,
    as_peft: bool,
    examples: Examples | None,
) -> Fitting:
    """What `config` lays over the model. MatchError for an entry that hits nothing."""
    config = with_task_heads(config, tree)
    names = list(tree.modules)
    terms = InPeftTerms(config, {}) if as_peft else in_peft_terms(config, names)
    config = terms.config
    parameters = targeted_parameters(config, tree)
    chosen = select(
        config, names, lambda: {name for name in names if tree.is_linear(name)} - {*output_heads()}, as_peft
    )
    if not as_peft or (not chosen and not parameters):
        refuse_unmatched("target_modules", unmatched(config, chosen), names)
    first = dict.fromkeys(tree.first_name(name) for name in chosen)
    adapted = [*first, *parameters]
    for field, entries in () if as_peft else config.unused(adapted).items():
        refuse_unmatched(field, terms.missed(field, entries), adapted)
    spelled = tree.spelled(first)
    out = set() if as_peft else kept_out(config, spelled)  # PEFT adapts an attention layer's out_proj all the same
    spelled = {name: spelling for name, spelling in spelled.items() if name not in out}
    config, sites = fresh_sites(tree, config, spelled, examples)
    config, replaced = with_rows(tree, config, sites)
    for name in replaced:
        site, method = tree.site(name), config.method(name)
        sites[name] = site, method, method.init(site, partial(tree.dense, name))
    for name in parameters:
        site, method = tree.parameter_site(name), config.method(name)
        sites[site.name] = site, method, method.init(site, _no_base)
    saved: Saved = dict.fromkeys(tree.first_name(name) for name in saved_modules(config, names, as_peft))
    sites = with_tied_rows(tree, sites, saved)
    saved = with_tied_copies(tree, config, chosen, saved)
    aware = {} if form is None else holdings(tree.modules, config, sites, form)
    biases = dict.fromkeys(trained_modules(tree, config, sites, saved))
    return Fitting(config, sites, saved, aware, biases)


@collector_paused()
def fit(tree: Tree, adapter: str, fitting: Fitting, trainable: bool) -> None:
    """Lay a checked adapter over the model. The first one of a model is active, later ones are not."""
    root = tree.root
    _refuse_quantized_copies(tree, fitting)
    refuse_shares(tree, fitting.saved, "modules_to_save names it")
    refuse_shares(tree, fitting.biases, "its bias would be trained")
    refuse_shares(tree, fitting.aware, "the adapter would be aware of its format")
    refuse_nested(tree, {name: site for name, (site, _, _) in fitting.sites.items()}, fitting.saved)
    refuse_clash(tree, state_of(root), fitting.biases, fitting.saved)
    state = state_of(root) or _frozen(tree)
    for place in tree.places:
        hold(place.module)
    if fitting.biases:
        state.biases[adapter] = lay_biases(tree, fitting.biases, trainable)
    touched: list[Adapted | Replaced] = []
    for name, (site, method, params) in _outer_first(tree, fitting.sites):
        layer = tree.layer(name, site)
        own = placed(params, layer.base_weight, site.acting)
        layer.fit(adapter, method, own, trainable, fitting.aware.get(name), fitting.rooms.get(name))
        touched.append(layer)
    share_rows(tree, adapter, fitting.sites)
    for name, tensors in fitting.saved.items():
        module = tree.modules[name]
        holder = module if isinstance(module, Replaced) else wrap(tree, module, Replaced(module))
        holder.modules_to_save[adapter] = _copied(holder.original_module, tensors, trainable)
        touched.append(holder)
    if fitting.config.ties():
        tie_copies(tree, adapter, fitting.saved)
    state.configs[adapter] = replace(fitting.config, inference_mode=not trainable)
    if len(state.configs) == 1:
        state.active = (adapter,)
    for wrapper in touched:  # elsewhere nothing has changed
        wrapper.activate(state.active, state.enabled)
    run_biases(state, state.active, state.enabled)


def _refuse_quantized_copies(tree: Tree, fitting: Fitting) -> None:
    """MatchError where modules_to_save names what cannot be trained."""
    for name in fitting.saved:
        if any(is_quantized(one) for one in tree.modules[name].modules()):
            raise MatchError(
                f"{printable(name)}: modules_to_save names it, and its weight is quantized, which no gradient can "
                "train; leave it out there, or load the model with it skipped"
            )


Fitted = tuple[Site, Method, Params]


def _outer_first(tree: Tree, sites: Mapping[str, Fitted]) -> Iterator[tuple[str, Fitted]]:
    """Modules, then parameters from the last of each module on: as PEFT has it, the first lies innermost."""
    alone = {name for name, (site, _, _) in sites.items() if site.acting.alone}
    yield from ((name, one) for name, one in sites.items() if name not in alone)
    for name in reversed(tree.parameter_names()) if alone else ():
        if name in alone:
            yield name, sites[name]


def _no_base() -> Dense:
    raise AssertionError("only methods that start without the base adapt parameters")


def _frozen(tree: Tree) -> State:
    """Freeze the model, and remember what was not."""
    wanted = {name: values for name, values in own_parameters(tree) if values.requires_grad}
    for values in wanted.values():
        values.requires_grad_(False)
    state = State(frozenset(wanted))
    set_state(tree.root, state)
    return state


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
    for place in reversed(list(places(root))):  # of wrappers in wrappers, the inner ones first
        if isinstance(place.module, Adapted):
            place.parent._modules[place.key] = place.module.base_layer
        elif isinstance(place.module, Replaced):
            kept = place.module.running if keep_merged else place.module.original_module
            place.parent._modules[place.key] = kept
    for modules in state.biases.values():
        if keep_merged:
            keep_biases(modules.values())
        for module in modules.values():
            lift_bias(module)
    for module in root.modules():
        release(module)
    unstack(root)
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in state.trainable and parameter.is_floating_point())  # codes have no gradient
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


def _copied(original: nn.Module, tensors: Mapping[str, Tensor] | None, trainable: bool) -> nn.Module:
    module = copy.deepcopy(original)
    if tensors is not None:
        module.load_state_dict(dict(tensors))
    return module.requires_grad_(trainable)
