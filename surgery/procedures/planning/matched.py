"""Matched: why each layer of a plan is there, and by which numbers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery.core.adapter import Adapter, Weighted
from surgery.core.name_map import USUAL, Part
from surgery.core.names import in_base
from surgery.core.select import matched_by
from surgery.hosts.change import Change


def matched(
    changes: Iterable[Change], adapters: Sequence[Weighted], laid: Sequence[Weighted]
) -> dict[str, list[Mapping[str, Any]]]:
    """By tensor, of each layer: its adapter, the site as that names it, the entry that hits it, its r and alpha.

    `laid` are the adapters as the base's files hold what they adapt.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    parts = [_parts(one.adapter) for one in adapters]
    for change in changes:
        for layer in change.layers:
            adapter, numbers = adapters[layer.adapter].adapter, laid[layer.adapter].adapter.config.told(layer.name)
            told = {"adapter": adapter.hub_id or adapter.where, "site": layer.name}
            told["by"] = _entry(adapter, [layer.name, *parts[layer.adapter].get(layer.name, ())])
            found.setdefault(change.site.weight.name, []).append({**told, **numbers})
    return found


def _entry(adapter: Adapter, names: Sequence[str]) -> str:
    """What in the config hits a site of these names, or the stack of experts that it is a part of."""
    part = _part(names[0])
    whole = [] if part is None else [part.whole]
    entries = (matched_by(adapter.config, in_base(name)) for name in (*names, *whole))
    return ", ".join(dict.fromkeys(filter(None, entries)))


def _parts(adapter: Adapter) -> Mapping[str, Sequence[str]]:
    """The sites that are single experts, by the stack that a base may hold of them."""
    found: dict[str, list[str]] = {}
    for site in adapter.sites:
        part = _part(site)
        if part is not None:
            found.setdefault(part.whole, []).append(site)
    return found


def _part(site: str) -> Part | None:
    return USUAL.part(USUAL.rename(f"{site}.weight"))
