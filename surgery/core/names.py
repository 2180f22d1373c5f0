"""Pure name matching: suffixes of module paths, and the nearest names to one that fits nothing."""

import difflib
import heapq
from collections.abc import Collection, Iterable

CANDIDATES, COMPARED = 200, 200  # names, and characters of each, that are held against a name


def suffixes(name: str) -> Iterable[str]:
    """`a.b.c`, `b.c`, `c`."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def suffix_hits(entries: Collection[str], name: str) -> list[str]:
    """Those of `entries` that are `name` or end it after a dot."""
    return [suffix for suffix in suffixes(name) if suffix in entries]


def nearest(entry: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names closest to `entry`; an entry without dots is held against last components too."""
    known = set(names) if "." in entry else {name.rsplit(".", 1)[-1] for name in names}
    return difflib.get_close_matches(entry[:COMPARED], _likely(entry, known), n=count, cutoff=0.0)


def _likely(entry: str, names: Collection[str]) -> list[str]:
    """Of very many names those that share most components with `entry`: to compare letters takes long."""
    short = (name for name in names if len(name) <= COMPARED)
    if len(names) <= CANDIDATES:
        return sorted(short)
    parts = set(entry.split("."))
    return heapq.nsmallest(CANDIDATES, short, key=lambda name: (-len(parts.intersection(name.split("."))), name))


def renaming(wanted: Collection[str], known: Collection[str]) -> dict[str, str]:
    """Each of `wanted` as `known` has it: all the same, or all with one prefix more or less. Else empty.

    >>> renaming(["transformer.h.0.mlp"], {"h.0.mlp"})
    {'transformer.h.0.mlp': 'h.0.mlp'}
    """
    if all(name in known for name in wanted):
        return {name: name for name in wanted}
    first = next(iter(wanted), "")
    found = []
    for removed, added in _prefixes(first, known):
        if all(name.startswith(removed) and added + name[len(removed) :] in known for name in wanted):
            found.append({name: added + name[len(removed) :] for name in wanted})
    return found[0] if len(found) == 1 else {}


def _prefixes(name: str, known: Collection[str]) -> Iterable[tuple[str, str]]:
    """What to remove from the front of `name`, and what to put there, to reach a known name."""
    for end in suffixes(name):
        if end in known:
            yield name.removesuffix(end), ""
    for other in known:
        if other.endswith("." + name):
            yield "", other.removesuffix(name)
