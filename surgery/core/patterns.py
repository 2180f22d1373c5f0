"""Patterns: the regular expressions of a config. `re` says what they mean; what they may cost is bounded.

A pattern that has several ways over a name is matched by the package `regex`, which can be stopped in time.
What would keep one of the two packages compiling for long is refused before: large counts, sets without case.
"""

import re
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from surgery.errors import ConfigError, printable, quoted

PATTERN_CHARACTERS = 4096
SECONDS = 1.0  # for patterns that have several ways over a name, all of a config together
TRIES = 1 << 22  # of the others on names: 2000 on 2000, a second
TRIES_TO_COMPILE = 200
UNROLLED = 200_000  # characters that counts such as {9} may make of a pattern
CASELESS_SETS = 32

EXACT = "{}"
ENDING = r"(.*\.)?({})$"  # PEFT's form for a key of rank_pattern or alpha_pattern
BELOW = r".*\.{}$"  # the same for a key of FourierFT's n_frequency_pattern; a whole name is no end there
LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."  # PEFT's form for layers_pattern
SAVED = r"(^|.*\.){}($|\..*)"  # PEFT's form for what lies in an entry of modules_to_save

_NAME = re.compile(r"[\w.-]*")  # always a regular expression
GLOB = re.compile(r"(?=[^*?]*[*?])(?=.*\w)[\w*?-]+(?:\.[\w*?-]+)*")  # parts with `*` or `?` in them
_GLOB_ALONE = re.compile(r"^[*?]|[*?]\*")  # what no expression has
_FORK = re.compile(r"[*+?{|(]")
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_CASELESS = re.compile(r"\(\?[a-zA-Z]*i")
# `regex` takes a brace that is no count for a fuzzy match, and knows classes by name; to `re` both are text.
_BRACE = re.compile(r"(\\N\{[^}]*\}|\\.)|\{(?!\d+(?:,\d*)?\}|,\d*\})", re.DOTALL)
_CLASS = re.compile(r"\[\^?:\^?\w+:\]")


class Budget:
    """What patterns may still cost: of one config, or in one search. ConfigError once it is spent."""

    def __init__(self) -> None:
        self.seconds, self.tries = SECONDS, TRIES
        self.compiled: dict[tuple[str, str], tuple[Any, bool]] = {}

    def check(self, pattern: str, form: str = EXACT) -> None:
        """ConfigError for what is no regular expression, or is beyond the bounds."""
        if len(pattern) > PATTERN_CHARACTERS or not _NAME.fullmatch(pattern):
            self._compiled(pattern, form)

    def fullmatch(self, pattern: str, name: str) -> Any:
        """The match of all of `name`, or None."""
        return self._run("fullmatch", pattern, EXACT, name)

    def match(self, pattern: str, name: str, form: str) -> Any:
        """The match from the start of `name`, or None."""
        return self._run("match", pattern, form, name)

    def _run(self, how: str, pattern: str, form: str, name: str) -> Any:
        compiled, forks = self._compiled(pattern, form)
        if not forks:
            self._try(pattern, 1)
            return getattr(compiled, how)(name)
        with self._clock(pattern):
            return getattr(compiled, how)(name, timeout=self.seconds)

    def _compiled(self, pattern: str, form: str) -> tuple[Any, bool]:
        """The pattern in its form, and whether it has several ways over a name."""
        if (pattern, form) not in self.compiled:
            _check_bounds(pattern)
            self._try(pattern, TRIES_TO_COMPILE)
            forks = _FORK.search(pattern) is not None
            with self._clock(pattern):
                self.compiled[pattern, form] = _compile(pattern, form, forks), forks
        return self.compiled[pattern, form]

    def _try(self, pattern: str, count: int) -> None:
        self.tries -= count
        if self.tries < 0:
            raise ConfigError(f"{quoted(pattern)}: too many patterns for so many names; name fewer, or list modules")

    @contextmanager
    def _clock(self, pattern: str) -> Iterator[None]:
        start = time.thread_time()
        try:
            if self.seconds <= 0:
                raise TimeoutError
            yield
        except TimeoutError as error:
            raise ConfigError(
                f"{quoted(pattern)}: patterns take more than {SECONDS:g} s; write them without repeats in repeats"
            ) from error
        finally:
            self.seconds -= time.thread_time() - start


class PatternTable(dict[str, Any]):
    """Values by pattern, as in `rank_pattern`; what it finds for a name is found once."""

    def __init__(self, values: Mapping[str, Any], form: str = ENDING) -> None:
        super().__init__(values)
        self.form = form
        self.budget = Budget()
        self.keys_of: dict[str, str | None] = {}

    def check(self, field: str) -> None:
        """ConfigError naming the field, for a key that cannot be."""
        for key in self:
            if GLOB.fullmatch(key) and _GLOB_ALONE.search(key):  # put into PEFT's terms before it is matched
                continue
            try:
                self.budget.check(key, self.form)
            except ConfigError as error:
                raise ConfigError(f"{field}: {error}") from error

    def unused(self, names: Collection[str]) -> list[str]:
        """The keys that match the end of none of `names`, and are none."""
        used = {*names, *(self.key_of(name) for name in names)}
        return [
            key for key in self if key not in used and not any(self.budget.match(key, one, self.form) for one in names)
        ]

    def key_of(self, name: str) -> str | None:
        """The first key that matches the end of `name`, or else is that name (PEFT's rule)."""
        if name not in self.keys_of:
            found = (key for key in self if self.budget.match(key, name, self.form))
            self.keys_of[name] = next(found, name if name in self else None)
        return self.keys_of[name]


def _check_bounds(pattern: str) -> None:
    shown = quoted(pattern)
    if len(pattern) > PATTERN_CHARACTERS:
        raise ConfigError(
            f"{shown}: {len(pattern)} characters; the limit is {PATTERN_CHARACTERS}; list modules instead"
        )
    unrolled = len(pattern)
    for low, high in _COUNT.findall(pattern):
        unrolled *= max(1, *(int(one[:9]) for one in (low, high) if one)) if low or high else 1
        if unrolled > UNROLLED:
            raise ConfigError(f"{shown}: its counts make more than {UNROLLED} characters of it; use smaller ones")
    if _CASELESS.search(pattern) and pattern.count("[") > CASELESS_SETS:
        raise ConfigError(f"{shown}: more than {CASELESS_SETS} sets without regard to case; write both cases")
    if _CLASS.search(pattern):
        raise ConfigError(f"{shown}: [:name:] is no class here; list its characters")


def _compile(pattern: str, form: str, forks: bool) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # of sets that a later Python may read otherwise
            found = re.compile(form.replace("{}", pattern))
            return _stoppable(pattern, form) if forks else found
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{quoted(pattern)} is not a regular expression: {printable(error)}") from error


def _stoppable(pattern: str, form: str) -> Any:
    import regex

    try:
        return regex.compile(form.replace("{}", _BRACE.sub(lambda found: found[1] or r"\{", pattern)))
    except regex.error as error:
        raise ConfigError(f"{quoted(pattern)} cannot be matched in bounded time: {error}; list modules") from error
