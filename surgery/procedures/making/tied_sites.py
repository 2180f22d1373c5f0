"""Tied sites: heads and embeddings that have the factors of another embedding, in adapters that are combined."""

from collections.abc import Iterable, Mapping, Sequence

from surgery.core.adapter import Adapter, Weighted, shape_of
from surgery.core.turned import EMBEDDING, is_same, is_turned
from surgery.errors import InputError, printable


def tied_sites(given: Sequence[Weighted]) -> Mapping[str, str] | None:
    """By site, the embedding whose factors it has wherever either is adapted; None where that is so in some alone.

    InputError where adapters tie other modules to each other.
    """
    adapters = [one.adapter for one in given]
    own = [(one, _of(one)) for one in adapters if one.config.ties()]
    _refuse_unlike([(one, group) for one, ties in own for group in _groups(ties)])
    found = {other: embedding for _, ties in own for other, embedding in ties.items()}
    for other, embedding in found.items():
        there = [one for one in adapters if {embedding, other} & one.sites.keys()]
        if not all(_is_tied(one, embedding, other) for one in there):
            return None
    return found


def embeds(adapter: Adapter, name: str) -> bool:
    return adapter.ops.get(name) == EMBEDDING


def _of(adapter: Adapter) -> dict[str, str]:
    """Of one adapter."""
    found: dict[str, str] = {}
    for embedding in sorted(name for name in adapter.sites if embeds(adapter, name)):
        if embedding not in found:
            free = sorted(adapter.sites.keys() - {*found, *found.values()})
            found |= {other: embedding for other in free if _is_tied(adapter, embedding, other)}
    return found


def _groups(ties: Mapping[str, str]) -> list[list[str]]:
    """The names that are tied to each other."""
    return [sorted([one, *(name for name in ties if ties[name] == one)]) for one in dict.fromkeys(ties.values())]


def _refuse_unlike(groups: Sequence[tuple[Adapter, Sequence[str]]]) -> None:
    """Sums over what is tied in part would differ where the model holds one weight, which no merge could."""
    for at, (one, names) in enumerate(groups):
        for other, known in groups[:at]:
            if names != known and not set(names).isdisjoint(known):
                raise InputError(
                    f"{printable(one.where)}: it ties {_listed(names)}, and {printable(other.where)} ties "
                    f"{_listed(known)}; the same modules of one embedding are wanted; were they trained on one model? "
                    "merge both over their base"
                )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(printable, names))


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
