"""Pure name matching: suffixes of module paths, and the nearest names to one that fits nothing."""

import difflib
from collections.abc import Collection, Iterable


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
    full = sorted(set(names))
    if "." in entry:
        return difflib.get_close_matches(entry, full, n=count, cutoff=0.0)
    last = sorted({name.rsplit(".", 1)[-1] for name in full})
    return difflib.get_close_matches(entry, last, n=count, cutoff=0.0)
