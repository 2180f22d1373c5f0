"""Which of a model's names a config selects, by PEFT's rules: suffixes, one regex, or all-linear."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from surgery.core.config import AdapterConfig
from surgery.core.names import Endings, nearest, suffix_hits, suffixes
from surgery.core.patterns import LAYER, SAVED, Budget, PatternTable
from surgery.errors import ConfigError, MatchError, printable, quoted

ALL_LINEAR = "all-linear"
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")  # PEFT's, where layers_pattern is not given: none at the root
Number = TypeVar("Number", int, float)


def select(
    config: AdapterConfig, names: Iterable[str], all_linear: Callable[[], Collection[str]], as_peft: bool = True
) -> list[str]:
    """Those of `names` that `target_modules` hits and nothing excludes, in their order.

    `all_linear` finds what "all-linear" stands for in this model. `as_peft` lets an entry that is the whole name of a
    module escape `layers_to_transform`. ConfigError for a pattern that is no regex, or that takes too long.
    """
    if not config.target_modules and not config.parameters():
        raise MatchError(
            f"target_modules is not given; a list of module names, a pattern or {ALL_LINEAR!r} is wanted; "
            "`surgery.inspect(model)` lists the names"
        )
    _check_layers(config)
    budget = Budget()
    hit = _matcher(config.target_modules, all_linear, budget)
    excluded = _matcher(config.exclude_modules, tuple, budget)
    saved = frozenset(config.modules_to_save or ())
    escaping = frozenset(config.target_modules or ()) if as_peft else frozenset[str]()
    return [
        name
        for name in names
        if hit(name)
        and not excluded(name)
        and not _inside(saved, name, budget)
        and (name in escaping or _in_layers(config, name, budget))
    ]


def kept_out(config: AdapterConfig, names: Collection[str]) -> set[str]:
    """Those of `names` that `exclude_modules` hits."""
    return set(filter(_matcher(config.exclude_modules, tuple, Budget()), names))


def chosen_layers(config: AdapterConfig, names: Collection[str]) -> Collection[str]:
    """Those of `names` that lie in the layers that `layers_to_transform` chooses; all where it chooses none."""
    if config.layers_to_transform is None:
        return names
    budget = Budget()
    return [name for name in names if _in_layers(config, name, budget)]


def unmatched(config: AdapterConfig, chosen: Collection[str]) -> list[str]:
    """Entries of `target_modules` that hit none of `chosen`; a pattern counts as one entry."""
    targets = config.target_modules
    if isinstance(targets, str) or targets is None:
        return [] if chosen or not targets else [targets]
    found = {entry for name in chosen for entry in suffix_hits(frozenset(targets), name)}
    return sorted(set(targets) - found)


def matched_by(config: AdapterConfig, name: str) -> str:
    """The entry that hits `name`: the longest, or the one pattern; nothing if none does."""
    targets = config.target_modules
    listed = frozenset(() if isinstance(targets, str) else targets or ()) | frozenset(config.parameters())
    found = suffix_hits(listed, name)
    return found[0] if found else targets if isinstance(targets, str) else ""


def refuse_unmatched(field: str, entries: Sequence[str], names: Collection[str]) -> None:
    """MatchError naming each entry that hit nothing, with its three nearest names."""
    if not entries:
        return
    told = "; ".join(f"{quoted(entry)} ({_why(entry, names)})" for entry in entries)
    raise MatchError(f"{field}: nothing matches {told}; each must match; `surgery.inspect(model)` lists the names")


def saved_modules(config: AdapterConfig, names: Collection[str], as_peft: bool = False) -> list[str]:
    """The modules that `modules_to_save` names, `as_peft` by any end of theirs; MatchError for an entry without one."""
    entries = frozenset(config.modules_to_save or ())
    if not entries:
        return []
    if as_peft:
        ends = Endings(entries)
        chosen = [name for name in names if ends.end(name)]
        found = {entry for entry in entries if any(name.endswith(entry) for name in chosen)}
    else:
        chosen = [name for name in names if suffix_hits(entries, name)]
        found = {entry for name in chosen for entry in suffix_hits(entries, name)}
    refuse_unmatched("modules_to_save", sorted(entries - found - config.task_heads()), names)
    return chosen


def pattern_value(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    """The value of the first key that, as a regex, matches the end of `name` (PEFT's rule), else `default`.

    What lies in an adapted layer, `name.base_layer...`, has that layer's value.
    """
    name = name.partition(".base_layer.")[0]
    table = patterns if isinstance(patterns, PatternTable) else PatternTable(patterns)
    key = table.key_of(name)
    return default if key is None else table[key]


def patterned(values: Mapping[str, Number]) -> dict[str, Number] | None:
    """Full names as patterns; with an anchor where one of them would mean another too. None where no pattern does."""
    for anchor in ("", "^"):
        table = PatternTable({anchor + name: value for name, value in values.items()})
        keys = {name: table.key_of(name) for name in values}
        if all(key is not None and table[key] == values[name] for name, key in keys.items()):
            return dict(table)
    return None


def _why(entry: str, names: Collection[str]) -> str:
    if any(suffix_hits((entry,), name) for name in names):
        return "exclude_modules, layers_to_transform or modules_to_save takes away all it hits"
    if not names:
        return "the model has no modules in it; wrap it in one"
    return f"nearest: {', '.join(printable(name) for name in nearest(entry, names))}"


def _matcher(
    entries: str | Sequence[str] | None, all_linear: Callable[[], Collection[str]], budget: Budget
) -> Callable[[str], bool]:
    """The test that `entries` stands for, prepared once for many names."""
    if isinstance(entries, str) and entries.lower() == ALL_LINEAR:
        return frozenset(all_linear()).__contains__
    if isinstance(entries, str):
        return lambda name: budget.fullmatch(entries, name) is not None
    if not entries:
        return frozenset[str]().__contains__
    wanted = frozenset(entries)
    return lambda name: not wanted.isdisjoint(suffixes(name))


def _inside(modules: frozenset[str], name: str, budget: Budget) -> bool:
    """Whether `name` is one of `modules` or lies inside one. To PEFT they are patterns here, and only here."""
    return any(budget.match(one, name, SAVED) is not None for one in modules)


def _check_layers(config: AdapterConfig) -> None:
    """ConfigError where a choice of layers would go unheard, as in PEFT."""
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError(
            "layers_pattern is given, and layers_to_transform is not; give the numbers, or leave both out"
        )
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ConfigError(
            "layers_to_transform is given, and target_modules is one pattern; that may choose the layers itself, "
            "or be a list of names"
        )


def _in_layers(config: AdapterConfig, name: str, budget: Budget) -> bool:
    """`layers_to_transform`: the number after the first `.<layers_pattern>.` must be among them."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = config.layers_pattern
    choices = [patterns] if isinstance(patterns, str) else list(patterns or ())
    for pattern in choices:
        found = budget.match(pattern, name, LAYER)
        if found:
            return _layer(found) in _listed(wanted)
    found = None if choices else _ANY_LAYER.match(name)
    return found is not None and _layer(found) in _listed(wanted)


def _layer(found: Any) -> int | None:
    """None where a pattern such as a|b matches without the number."""
    return None if found["idx"] is None else int(found["idx"])


def _listed(wanted: int | Sequence[int]) -> Sequence[int]:
    return [wanted] if isinstance(wanted, int) else wanted
