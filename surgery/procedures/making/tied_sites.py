"""Tied sites: heads and embeddings that have the factors of another embedding, in adapters that are combined."""

from collections.abc import Iterable, Mapping, Sequence

from surgery.core.adapter import Adapter, Weighted, shape_of
from surgery.core.turned import EMBEDDING, is_same, is_turned


def tied_sites(given: Sequence[Weighted]) -> Mapping[str, str] | None:
    """By site, the embedding whose factors it has wherever either is adapted; None where that is so in some alone."""
    adapters = [one.adapter for one in given]
    found: dict[str, str] = {}
    for one in adapters:
        if one.config.ties():
            found |= _of(one, found)
    for other, embedding in found.items():
        there = [one for one in adapters if {embedding, other} & one.sites.keys()]
        if not all(_is_tied(one, embedding, other) for one in there):
            return None
    return found


def embeds(adapter: Adapter, name: str) -> bool:
    return adapter.ops.get(name) == EMBEDDING


def _of(adapter: Adapter, known: Mapping[str, str]) -> dict[str, str]:
    """Of one adapter those that are not known."""
    found: dict[str, str] = {}
    for embedding in _free((name for name in adapter.sites if embeds(adapter, name)), known):
        if embedding not in found:
            others = _free(adapter.sites, {**known, **found})
            found |= {other: embedding for other in others if _is_tied(adapter, embedding, other)}
    return found


def _free(names: Iterable[str], known: Mapping[str, str]) -> list[str]:
    return sorted(name for name in names if name not in known and name not in known.values())


def _is_tied(adapter: Adapter, embedding: str, other: str) -> bool:
    if embedding == other or not {embedding, other} <= adapter.sites.keys():
        return False
    method = adapter.config.method(embedding)
    if not method.turns or method != adapter.config.method(other):
        return False
    of, params = adapter.sites[embedding], adapter.sites[other]
    if embeds(adapter, other):
        return all(shape_of(of, role) == shape_of(params, role) for role in of) and is_same(params, of)
    shapes = (shape_of(params, "B")[::-1], shape_of(params, "A")[::-1])
    return shapes == (shape_of(of, "A"), shape_of(of, "B")) and is_turned(params, of)
