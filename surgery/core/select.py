"""Which of a model's names a config selects, by PEFT's rules: suffixes, one regex, or all-linear."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from surgery.core.config import AdapterConfig
from surgery.core.names import nearest, suffix_hits, suffixes
from surgery.errors import ConfigError, MatchError, printable

ALL_LINEAR = "all-linear"
Number = TypeVar("Number", int, float)


def select(config: AdapterConfig, names: Iterable[str], all_linear: Callable[[], Collection[str]]) -> list[str]:
    """Those of `names` that `target_modules` hits and nothing excludes, in their order.

    `all_linear` finds what "all-linear" stands for in this model. ConfigError for a pattern that is no regex.
    """
    hit = _matcher(config.target_modules, all_linear)
    excluded = _matcher(config.exclude_modules, tuple)
    saved = frozenset(config.modules_to_save or ())
    return [
        name
        for name in names
        if hit(name) and not excluded(name) and not _inside(saved, name) and _in_layers(config, name)
    ]


def unmatched(config: AdapterConfig, chosen: Collection[str]) -> list[str]:
    """Entries of `target_modules` that hit none of `chosen`; a pattern counts as one entry."""
    targets = config.target_modules
    if isinstance(targets, str) or targets is None:
        return [] if chosen else [str(targets)]
    found = {entry for name in chosen for entry in suffix_hits(frozenset(targets), name)}
    return sorted(set(targets) - found)


def refuse_unmatched(field: str, entries: Sequence[str], names: Collection[str]) -> None:
    """MatchError naming each entry that hit nothing, with its three nearest names."""
    if not entries:
        return
    told = "; ".join(f"{printable(entry)!r} ({_why(entry, names)})" for entry in entries)
    raise MatchError(f"{field}: nothing matches {told}; each must match; `surgery.inspect(model)` lists the names")


def saved_modules(config: AdapterConfig, names: Collection[str]) -> list[str]:
    """The modules that `modules_to_save` names; MatchError for an entry that names none."""
    entries = frozenset(config.modules_to_save or ())
    if not entries:
        return []
    chosen = [name for name in names if suffix_hits(entries, name)]
    found = {entry for name in chosen for entry in suffix_hits(entries, name)}
    refuse_unmatched("modules_to_save", sorted(entries - found - config.task_heads()), names)
    return chosen


def pattern_value(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    """The value of the first key that, as a regex, matches the end of `name` (PEFT's rule), else `default`."""
    for key, value in patterns.items():
        if _compile(rf"(.*\.)?({key})$", key).match(name):
            return value
    return default


def _why(entry: str, names: Collection[str]) -> str:
    if any(suffix_hits((entry,), name) for name in names):
        return "exclude_modules, layers_to_transform or modules_to_save takes away all it hits"
    if not names:
        return "the model has no modules in it; wrap it in one"
    return f"nearest: {', '.join(printable(name) for name in nearest(entry, names))}"


def _matcher(entries: str | Sequence[str] | None, all_linear: Callable[[], Collection[str]]) -> Callable[[str], bool]:
    """The test that `entries` stands for, prepared once for many names."""
    if isinstance(entries, str) and entries.lower() == ALL_LINEAR:
        return frozenset(all_linear()).__contains__
    if isinstance(entries, str):
        pattern = _compile(entries, entries)
        return lambda name: pattern.fullmatch(name) is not None
    if not entries:
        return frozenset[str]().__contains__
    wanted = frozenset(entries)
    return lambda name: not wanted.isdisjoint(suffixes(name))


def _inside(modules: frozenset[str], name: str) -> bool:
    """Whether `name` is one of `modules` (by suffix) or lies inside one."""
    if not modules:
        return False
    parts = name.split(".")
    return any(suffix_hits(modules, ".".join(parts[: count + 1])) for count in range(len(parts)))


def _in_layers(config: AdapterConfig, name: str) -> bool:
    """`layers_to_transform`: the number after the first `.<layers_pattern>.` must be among them."""
    wanted = config.layers_to_transform
    if wanted is None or isinstance(config.target_modules, str) or name in (config.target_modules or ()):
        return True
    patterns = config.layers_pattern or r"[^.]+"
    choices = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in choices:
        found = _compile(rf".*?(?:^|\.)(?:{pattern})\.(\d+)\.", pattern).match(name)
        if found:
            return int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _compile(pattern: str, shown: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{printable(shown)!r} is not a regular expression: {error}") from error
