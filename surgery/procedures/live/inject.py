"""inject: a fresh adapter over the modules of a model that a config names, in place."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from torch import nn

from surgery.core.collector import collector_paused
from surgery.core.config import AdapterConfig
from surgery.core.entries import InPeftTerms, in_peft_terms
from surgery.core.method import Dense
from surgery.core.names import Endings, suffix_hits
from surgery.core.select import kept_out, refuse_unmatched, saved_modules, select, unmatched
from surgery.errors import UsageError
from surgery.hosts.holding import Awareness
from surgery.procedures.live.awareness import holdings
from surgery.procedures.live.examples import Examples
from surgery.procedures.live.fitting import Fitting, check_name, fit
from surgery.procedures.live.fresh import fresh_sites
from surgery.procedures.places.biases import trained_modules
from surgery.procedures.places.model_tree import Tree
from surgery.procedures.places.parameters import targeted_parameters
from surgery.procedures.places.rows import with_embedding, with_rows, with_tied_rows
from surgery.procedures.places.stacking import stacked
from surgery.procedures.places.tied_copies import Saved, with_tied_copies
from surgery.procedures.places.tied_heads import tied_heads, with_heads


@dataclass(frozen=True)
class Start:
    """How a config is read, and what its adapter starts from besides."""

    output_heads: Callable[[], Collection[str]] = tuple  # finds what "all-linear" leaves out
    as_peft: bool = False  # by PEFT's own rules, by which an entry that hits nothing is none
    held: Awareness | None = None  # it runs as it will once it is merged and held so
    examples: Examples | None = None


@collector_paused()
def inject(root: nn.Module, config: AdapterConfig, adapter: str, start: Start, trainable: bool = True) -> None:
    """Lay a fresh adapter over the modules that `config` selects.

    Raises MatchError for an entry that hits nothing, StateError if `adapter` is there or a merge is.
    """
    check_name(root, adapter)
    config.check_fresh()
    with stacked(root, config):
        tree = Tree(root)
        fit(tree, adapter, _fresh(tree, with_embedding(tree, config), start), trainable)


def _fresh(tree: Tree, config: AdapterConfig, start: Start) -> Fitting:
    """What `config` lays over the model. MatchError for an entry that hits nothing."""
    chosen = _choose(tree, _with_task_heads(config, tree), start)
    if chosen.config.copied:
        return _fresh_copies(tree, chosen.config, chosen.spelled, start)
    heads = tied_heads(tree, chosen.config, chosen.spelled)
    spelled = {name: one for name, one in chosen.spelled.items() if name not in heads}
    spelled |= {name: name for name in heads.values()}
    config, sites = fresh_sites(tree, chosen.config, spelled, start.examples)
    drawn = config.drawn([site for site, _, _ in sites.values()])
    sites = {name: (site, method, {**p, **drawn}) for name, (site, method, p) in sites.items()} if drawn else sites
    dealt = config.dealt({name: site for name, (site, _, _) in sites.items()})
    sites = {name: (site, method, {**p, **dealt.get(name, {})}) for name, (site, method, p) in sites.items()}
    config, replaced = with_rows(tree, config, sites)
    for name in replaced:
        site, method = tree.site(name), config.method(name)
        sites[name] = site, method, method.init(site, partial(tree.dense, name))
    for name in chosen.parameters:
        site, method = tree.parameter_site(name), config.method(name)
        sites[site.name] = site, method, method.init(site, _no_base)
    saved: Saved = dict.fromkeys(
        tree.first_name(name) for name in saved_modules(config, list(tree.modules), start.as_peft)
    )
    sites = with_heads(tree, with_tied_rows(tree, sites, saved), heads)
    saved = with_tied_copies(tree, config, sites, saved)
    aware = {} if start.held is None else holdings(tree.modules, config, sites, start.held)
    biases = dict.fromkeys(trained_modules(tree, config, sites, saved))
    return Fitting(config, sites, saved, aware, biases, heads=heads)


def _fresh_copies(tree: Tree, config: AdapterConfig, targets: Collection[str], start: Start) -> Fitting:
    """Copies of the modules that `config` targets, and of those that it saves besides."""
    if start.held is not None or start.examples is not None:
        option = "quantization_aware" if start.held is not None else "examples"
        raise UsageError(f"{option} is given, and {config.peft_type} trains copies of whole modules; leave it out")
    besides = saved_modules(config, list(tree.modules), start.as_peft)
    saved = dict.fromkeys([*targets, *(tree.first_name(name) for name in besides)])
    return Fitting(config.named(list(targets)), {}, saved)


def _no_base() -> Dense:
    raise AssertionError("only methods that start without the base adapt parameters")


class Chosen(NamedTuple):
    """What a config, in PEFT's terms, adapts in a model."""

    config: AdapterConfig
    modules: Sequence[str]  # at every path
    parameters: Sequence[str]
    spelled: Mapping[str, str]  # of each module the first path, and how PEFT spells it


def _choose(tree: Tree, config: AdapterConfig, start: Start) -> Chosen:
    """MatchError for an entry that hits nothing; `as_peft`, only where all of them do."""
    names, as_peft = list(tree.modules), start.as_peft
    terms = InPeftTerms(config, {}) if as_peft else in_peft_terms(config, names)
    config = terms.config
    parameters = targeted_parameters(config, tree)
    modules = select(
        config, names, lambda: {name for name in names if tree.is_linear(name)} - {*start.output_heads()}, as_peft
    )
    if not as_peft or (not modules and not parameters):
        refuse_unmatched("target_modules", unmatched(config, modules), names)
    first = dict.fromkeys(tree.first_name(name) for name in modules)
    adapted = [*first, *parameters]
    for field, entries in () if as_peft else config.unused(adapted).items():
        refuse_unmatched(field, terms.missed(field, entries), adapted)
    spelled = {name: name for name in first} if config.copied else tree.spelled(first)
    out = set() if as_peft else kept_out(config, spelled)  # PEFT adapts an attention layer's out_proj all the same
    kept = {name: spelling for name, spelling in spelled.items() if name not in out}
    return Chosen(config, modules, parameters, kept)


def _with_task_heads(config: AdapterConfig, tree: Tree) -> AdapterConfig:
    """As PEFT: the heads of a task are saved with the adapter, those of them that the model has.

    To PEFT a head is what ends in its name, from whatever letter on: DistilBERT's pre_classifier, new with its
    classifier, is one too.
    """
    given, ends = list(config.modules_to_save or ()), Endings(config.task_heads())
    heads = [name for name in tree.modules if ends.end(name) and not suffix_hits(given, name)]
    return replace(config, modules_to_save=[*given, *heads]) if heads else config
