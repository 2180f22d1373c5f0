"""Fresh: the tensors that a new adapter starts with, of the base alone or of examples run through it."""

from collections.abc import Mapping
from functools import partial

from surgery.core.config import AdapterConfig
from surgery.core.method import Method, Params
from surgery.core.observer import Observer
from surgery.core.site import Site
from surgery.errors import UsageError
from surgery.procedures.examples import Examples, observe
from surgery.procedures.model_tree import Tree

FittedSite = tuple[Site, Method, Params]


def fresh_sites(
    tree: Tree, config: AdapterConfig, spelled: Mapping[str, str], examples: Examples | None
) -> tuple[AdapterConfig, dict[str, FittedSite]]:
    """The adapter at each module, by name and as PEFT spells it; and its config, with the ranks that it was given.

    UsageError where examples are missing, or given and not needed.
    """
    found = {name: (tree.site(name), config.method(spelling)) for name, spelling in spelled.items()}
    observers = {name: one for name, (site, _) in found.items() if (one := config.observer(site)) is not None}
    if examples is not None and not observers:
        raise UsageError("examples are given, and this adapter starts without; leave them out")
    if not observers:
        started = {
            name: (site, method, method.init(site, partial(tree.dense, name))) for name, (site, method) in found.items()
        }
        return config, started
    if examples is None:
        start = next(iter(observers.values())).start
        raise UsageError(
            f"examples: none are given, and init_lora_weights {start!r} starts from what the model makes of some; "
            "give inject an iterable of batches, examples=..."
        )
    return _from_examples(tree, config, observers, examples)


def _from_examples(
    tree: Tree, config: AdapterConfig, observers: Mapping[str, Observer], examples: Examples
) -> tuple[AdapterConfig, dict[str, FittedSite]]:
    observe(tree, config, observers, examples)
    config, kept = config.after(observers)
    sites = {}
    for name in kept:
        site, method = tree.site(name), config.method(name)
        sites[name] = site, method, observers[name].begin(site, method, partial(tree.dense, name))
    return config, sites
