"""Entries: how a new config names modules, put into PEFT's terms, in which it is matched and saved.

An entry is the end of a name, from a whole part on, whose dots are dots; a glob of parts, in which `*` is anything
within a part and `**` any parts; or `re:` before a regular expression of the whole name. To PEFT a dot in a pattern is
any character, and a list holds neither globs nor expressions.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

from surgery.core.config import AdapterConfig
from surgery.core.names import suffix_hits
from surgery.core.patterns import ENDING, GLOB, Budget, PatternTable
from surgery.core.select import chosen_layers, refuse_unmatched

RE = "re:"
_LISTS = ("target_modules", "exclude_modules", "modules_to_save")
_NAME = re.compile(r"[\w.-]*")


class InPeftTerms(NamedTuple):
    """A config that PEFT's rules read as it was meant, and how its entries were spelled."""

    config: AdapterConfig
    spelled: Mapping[str, str]  # what is in the config now, by entry or one of the names that it stands for

    def missed(self, field: str, unused: Collection[str]) -> list[str]:
        """The entries of a field, as they were spelled, all of which is unused."""
        told = getattr(self.config, field) or ()
        used = {self.spelled.get(one, one) for one in (() if isinstance(told, str) else told) if one not in unused}
        return [one for one in dict.fromkeys(self.spelled.get(one, one) for one in unused) if one not in used]


def in_peft_terms(config: AdapterConfig, names: Collection[str]) -> InPeftTerms:
    """The config for a model whose modules are `names`. MatchError for an entry that hits none of them."""
    found: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    config = _with_expressions(config)
    in_layers = chosen_layers(config, names)
    for field in fields(config):
        value = getattr(config, field.name)
        if not value:
            continue
        if field.name in _LISTS or field.name in config.by_ends:
            hits = _hits(field.name, value, in_layers if field.name == "target_modules" else names)
            found[field.name] = _named(value, hits)
            if hits and field.name in config.by_ends:
                found[field.name] = _ending(found[field.name], hits, names)
            spelled |= {name: entry for entry, there in hits.items() for name in there if name not in value}
        elif field.name.endswith("_pattern") and isinstance(value, PatternTable):
            keys = {key: _key(key, value.form) for key in value}
            spelled |= {after: before for before, after in keys.items()}
            found[field.name] = {keys[key]: one for key, one in value.items()}
    changed = {name: value for name, value in found.items() if value != getattr(config, name)}
    return InPeftTerms(replace(config, **changed) if changed else config, spelled)


def _with_expressions(config: AdapterConfig) -> AdapterConfig:
    """Its `layers_pattern` as expressions."""
    given = config.layers_pattern
    if not given:
        return config
    return replace(config, layers_pattern=[_expression(one) for one in ([given] if isinstance(given, str) else given)])


def _hits(field: str, value: str | Sequence[str], names: Collection[str]) -> Mapping[str, Sequence[str]]:
    """By each glob and expression of a list, the names that it stands for. MatchError for an entry that hits none."""
    budget, hits = Budget(), {}
    for entry in () if isinstance(value, str) else value:
        if field == "exclude_modules" or _is_wide(entry):
            test = _test(entry, budget)
            hits[entry] = [name for name in names if test(name)]
    refuse_unmatched(field, [entry for entry, there in hits.items() if not there], names)
    return {entry: there for entry, there in hits.items() if _is_wide(entry)}


def _named(value: str | Sequence[str], hits: Mapping[str, Sequence[str]]) -> str | Sequence[str]:
    """Names in place of globs and expressions; one string is an expression, as in PEFT, or a name."""
    if isinstance(value, str):
        told = value.removeprefix(RE)
        return re.escape(told) if "." in told and told == value and _NAME.fullmatch(told) else told
    kept = [entry for entry in value if entry not in hits]
    return list(dict.fromkeys([*kept, *(name for there in hits.values() for name in there)])) if hits else value


def _ending(listed: Sequence[str], hits: Mapping[str, Sequence[str]], names: Collection[str]) -> str | Sequence[str]:
    """A list of ends of names, or one expression where a whole name that is meant ends another that is not."""
    whole = {name for there in hits.values() for name in there}
    ends = tuple(one for one in listed if one not in whole)
    meant = [name for name in names if name in whole or name.endswith(ends)]
    return (
        listed if len(meant) == sum(name.endswith(tuple(listed)) for name in names) else "|".join(map(re.escape, meant))
    )


def _is_wide(entry: str) -> bool:
    return entry.startswith(RE) or GLOB.fullmatch(entry) is not None


def _test(entry: str, budget: Budget) -> Callable[[str], bool]:
    if entry.startswith(RE):
        return lambda name: budget.fullmatch(entry.removeprefix(RE), name) is not None
    if GLOB.fullmatch(entry):
        return lambda name: budget.fullmatch(rf"(?:.*\.)?{_translated(entry)}", name) is not None
    return partial(_ends, (entry,))


def _ends(entries: Collection[str], name: str) -> bool:
    return bool(suffix_hits(entries, name))


def _expression(entry: str) -> str:
    """Of a pattern that PEFT matches with the end of a name: what no name or glob can be is an expression as it is."""
    if entry.startswith(RE):
        return entry.removeprefix(RE)
    if GLOB.fullmatch(entry):
        return _translated(entry)
    return re.escape(entry).replace(r"\-", "-") if _NAME.fullmatch(entry) else entry


def _key(entry: str, form: str) -> str:
    """The same of a table's key; where PEFT's form wants a part before it, that of one that may be a whole name."""
    found = _expression(entry)
    return found if found == entry or form == ENDING else rf"(?!)|(?:.*\.)?(?:{found})"


def _translated(glob: str) -> str:
    pieces = re.split(r"(\*\*|\*|\?)", glob)
    wild = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return "".join(wild[piece] if piece in wild else re.escape(piece) for piece in pieces)
