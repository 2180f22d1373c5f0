"""Tied sites: heads that have the factors of an embedding, turned, in adapters that are combined."""

from collections.abc import Mapping, Sequence

from surgery.core.adapter import Adapter, Weighted, shape_of
from surgery.core.turned import is_turned


def tied_sites(given: Sequence[Weighted]) -> Mapping[str, str] | None:
    """By embedding, the head that has its factors wherever either is adapted; None where that is so in some alone."""
    adapters = [one.adapter for one in given]
    found = {pair for one in adapters if one.config.ties() for pair in _pairs(one)}
    for embedding, head in found:
        there = [one for one in adapters if {embedding, head} & one.sites.keys()]
        if not all(_is_tied(one, embedding, head) for one in there):
            return None
    return dict(found)


def _pairs(adapter: Adapter) -> list[tuple[str, str]]:
    embeddings = [name for name in adapter.sites if adapter.ops.get(name) == "embedding"]
    return [(one, other) for one in embeddings for other in adapter.sites if _is_tied(adapter, one, other)]


def _is_tied(adapter: Adapter, embedding: str, head: str) -> bool:
    if not {embedding, head} <= adapter.sites.keys():
        return False
    of, params = adapter.sites[embedding], adapter.sites[head]
    if shape_of(of, "A") != shape_of(params, "B")[::-1] or shape_of(of, "B") != shape_of(params, "A")[::-1]:
        return False
    return adapter.config.method(embedding) == adapter.config.method(head) and is_turned(params, of)
