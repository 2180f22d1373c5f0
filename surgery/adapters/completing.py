"""Completing: what an adapter's files leave to be made, of its seed and of the sites that it lies over."""

from collections.abc import Mapping

from surgery.adapters.peft import check_shapes
from surgery.core.adapter import Adapter
from surgery.core.site import Site
from surgery.errors import MatchError, ShapeError, printable


def completed(adapter: Adapter, sites: Mapping[str, Site], in_order: bool = False) -> Adapter:
    """With the tensors that its files leave to be made, for the base's `sites` by the adapter's names.

    `in_order`: they stand as in the model. ShapeError where the tensors that are there are not as large as its config
    says; MatchError where it has no place, or where nothing tells an order that is asked for.
    """
    adapter = _dealt(adapter, sites, in_order) if adapter.config.deals else adapter
    if adapter.shared or not adapter.config.shared:
        return adapter
    _check_own(adapter, sites)
    return adapter.completed(sites.values())


def _dealt(adapter: Adapter, sites: Mapping[str, Site], in_order: bool) -> Adapter:
    specs = {name: adapter.config.method(name).tensors(site) for name, site in sites.items()}
    lacking = any(one.dealt and role not in adapter.sites[name] for name in sites for role, one in specs[name].items())
    if not lacking or sites.keys() != adapter.sites.keys():  # of which some have no place
        return adapter
    _check_own(adapter, sites)
    names = list(sites) if in_order else adapter.config.order_of(adapter.sites)
    if names is None:
        raise MatchError(
            f"{printable(adapter.where)}: nothing in it tells the order of its modules, by which each has its part of "
            "what they share, and no checkpoint does; merge it in memory, by surgery.load and surgery.merge"
        )
    adapter = adapter.dealt({name: sites[name] for name in names})
    _check_rows(adapter)
    return adapter


def _check_own(adapter: Adapter, sites: Mapping[str, Site]) -> None:
    """Of each site, before anything is made for it: a config alone may ask for any amount of memory."""
    for name, site in sites.items():
        given, specs = adapter.sites[name], adapter.config.method(name).tensors(site).items()
        wanted = {role: spec for role, spec in specs if role in given or not (spec.shared or spec.dealt)}
        check_shapes(name, given, wanted, adapter.where)


def _check_rows(adapter: Adapter) -> None:
    """ShapeError where there are other rows of what sites share than they have among them."""
    wanted = adapter.config.shared_rows(len(adapter.sites))
    for role, values in adapter.shared.items():
        if wanted is not None and len(values) != wanted:
            raise ShapeError(
                f"{printable(adapter.where)}: {role} has {len(values)} vectors, and {wanted} are wanted by its "
                f"{len(adapter.sites)} modules and the config; the file is incomplete; save it again"
            )


def drawn_notes(adapter: Adapter) -> list[str]:
    """What of an adapter its files leave to the generator of whoever reads them, to be said aloud."""
    if not adapter.config.keeps_dealt():
        return [
            f"{printable(adapter.where)}: places or projections are not in it: they are dealt over the model's modules "
            "in their order, from its seed, as in PEFT; another version of torch or numpy may deal others"
        ]
    if adapter.config.keeps_shared():
        return []
    drawn = " and ".join(adapter.config.shared)
    return [
        f"{printable(adapter.where)}: {drawn} are not in it: they are drawn from its seed, as torch does on a CPU, and "
        "rounded to the base's dtype, as in PEFT; another version of torch may draw others"
    ]


def place_notes(adapter: Adapter) -> list[str]:
    """The same where no file of its kind has it: a plan says so, and nobody is warned of what is always so."""
    if not adapter.config.draws_places:
        return []
    return [
        f"{printable(adapter.where)}: the places of its numbers are not in it: they are drawn from its seed, as torch "
        "does on a CPU, as in PEFT; another version of torch may draw others"
    ]
