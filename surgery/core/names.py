"""Pure name matching: suffixes of module paths, and the nearest names to one that fits nothing."""

import difflib
import heapq
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

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


def owners(name: str) -> Iterator[str]:
    """The modules that a tensor lies in, the innermost first: `a.b` and `a` of `a.b.weight`."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def in_base(name: str) -> str:
    """The path in the base of a site, which PEFT spells with `base_layer` where it lies in another adapted layer.

    >>> in_base("0.attn.base_layer.out_proj")
    '0.attn.out_proj'
    """
    return name.replace(".base_layer.", ".")


class Endings:
    """Many texts, of which it is quickly told whether a name ends in one, at a dot or not, as PEFT compares them.

    >>> ends = Endings(["proj", "q_proj", "fc"])
    >>> [ends.end(name) for name in ("0.q_proj", "0.fc2", "xfc")]
    [True, False, True]
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self.backwards: list[str] = []  # sorted; none begins with another, which would say nothing more
        for entry in sorted(entry[::-1] for entry in entries):
            if not self.backwards or not entry.startswith(self.backwards[-1]):
                self.backwards.append(entry)

    def end(self, name: str) -> bool:
        # Whatever sorts between a text and one that begins with it begins with it too: so it is the one before.
        backwards = name[::-1]
        at = bisect_right(self.backwards, backwards)
        return at > 0 and backwards.startswith(self.backwards[at - 1])


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


class Prefix(NamedTuple):
    """What to take off the front of a name, and what to put there."""

    removed: str = ""
    added: str = ""

    def of(self, name: str) -> str:
        """The other name of `name`, which is itself where it begins otherwise."""
        return self.added + name[len(self.removed) :] if name.startswith(self.removed) else name


class Naming(NamedTuple):
    """How an adapter's names become those of the files: by a prefix, and by the model's own names in memory."""

    prefix: Prefix = Prefix()
    renamed: Mapping[str, str] = MappingProxyType({})  # the files' names of modules and tensors, by those in memory

    def of(self, name: str) -> str:
        there = self.prefix.of(name)
        return self.renamed.get(there, there)


def naming_between(
    wanted: Collection[str], known: Collection[str], in_memory: Callable[[], Mapping[str, str]]
) -> Naming:
    """By a prefix alone if there is one; else by what the model's tensors are called in memory.

    >>> found = naming_between(["0.q_proj"], {"0.query"}, lambda: {"0.q_proj.weight": "0.query.weight"})
    >>> found.of("0.q_proj"), found.of("0.q_proj.weight")
    ('0.query', '0.query.weight')
    """
    prefix = prefix_between(wanted, known)
    if prefix is not None:
        return Naming(prefix)
    tensors = in_memory()
    renamed = {**tensors, **{name.rpartition(".")[0]: there.rpartition(".")[0] for name, there in tensors.items()}}
    prefix = prefix_between(wanted, {*known, *renamed})
    return Naming() if prefix is None else Naming(prefix, renamed)


def prefix_between(wanted: Collection[str], known: Collection[str]) -> Prefix | None:
    """The one prefix more, less, or in another's place, that makes each of `wanted` a known name; None if none does.

    A name that does not begin so has to be known as it is, and no two may become one. No prefix holds a number,
    which would turn one layer into another.

    >>> prefix_between(["transformer.h.0.mlp"], {"h.0.mlp"})
    Prefix(removed='transformer.', added='')
    >>> prefix_between(["model.language_model.h.0.mlp"], {"language_model.model.h.0.mlp"})
    Prefix(removed='model.language_model.', added='language_model.model.')
    """
    if set(wanted) <= set(known):
        return Prefix()
    first = max(wanted, key=len)
    for candidates in (_plain_prefixes(first, known), _replaced_prefixes(first, known)):
        fitting = {prefix for prefix in candidates if _leads(prefix, wanted, known)}
        outcomes = {tuple(prefix.of(name) for name in wanted) for prefix in fitting}
        if len(outcomes) == 1:
            return min(fitting, key=lambda prefix: len(prefix.removed) + len(prefix.added))
        if outcomes:
            return None
    return None


def renaming(wanted: Collection[str], known: Collection[str]) -> dict[str, str]:
    """Each of `wanted` as `known` has it, all by one prefix; empty where there is no such prefix, or more than one.

    >>> renaming(["transformer.h.0.mlp"], {"h.0.mlp"})
    {'transformer.h.0.mlp': 'h.0.mlp'}
    """
    prefix = prefix_between(wanted, known) if wanted else None
    return {} if prefix is None else {name: prefix.of(name) for name in wanted}


def _leads(prefix: Prefix, wanted: Collection[str], known: Collection[str]) -> bool:
    found = {prefix.of(name) for name in wanted}
    return len(found) == len(wanted) and found <= set(known)


def _plain_prefixes(name: str, known: Collection[str]) -> Iterator[Prefix]:
    """Those that only take something off the front of `name`, or only put something there."""
    for end in suffixes(name):
        if end in known:
            yield from _unnumbered(name.removesuffix(end), "")
    for other in known:
        if other.endswith("." + name):
            yield from _unnumbered("", other.removesuffix(name))


def _replaced_prefixes(name: str, known: Collection[str]) -> Iterator[Prefix]:
    """Those that put another in the place of what `name` begins with."""
    by_end: dict[str, list[str]] = {}
    for other in known:
        for end in suffixes(other):
            by_end.setdefault(end, []).append(other)
    for end in suffixes(name):
        for other in by_end.get(end, ()):
            if end not in (name, other):
                yield from _unnumbered(name.removesuffix(end), other.removesuffix(end))


def _unnumbered(removed: str, added: str) -> Iterator[Prefix]:
    if not any(part.isdigit() for part in (*removed.split("."), *added.split("."))):
        yield Prefix(removed, added)
