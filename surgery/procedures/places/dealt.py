"""Dealt: the sites of an adapter whose files name none, since its config alone tells them."""

from dataclasses import replace

from surgery.adapters.peft import check_shapes
from surgery.core.adapter import Adapter
from surgery.core.select import select
from surgery.errors import MatchError, printable
from surgery.procedures.places.model_tree import Tree


def with_dealt(tree: Tree, adapter: Adapter) -> Adapter:
    """The adapter at all modules that its config selects, in the model's order. MatchError where these are none."""
    if not adapter.is_unplaced:
        return adapter
    config = adapter.config
    chosen = select(config, list(tree.modules), tuple)
    names = dict.fromkeys(tree.first_name(name) for name in chosen)
    if not names:
        raise MatchError(
            f"{printable(adapter.where)}: target_modules hits no module of the model; is this the adapter's base?"
        )
    sites = {name: tree.site(name) for name in names}
    for name, site in sites.items():
        specs = config.method(name).tensors(site).items()  # refuses those that it does not act on
        shared = {role: spec for role, spec in specs if role in adapter.shared}
        check_shapes(name, adapter.shared, shared, adapter.where)  # before as many are dealt as the config says
    return replace(adapter, sites=config.dealt(sites)).sharing(adapter.shared)
