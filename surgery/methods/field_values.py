"""Checks of the fields of a method's config: counts, numbers, choices, and which biases are trained."""

import sys
from collections.abc import Mapping

from surgery.errors import ConfigError, printable, quoted

_LARGEST = sys.float_info.max  # NaN compares false to it, and a whole number of any length can be compared


def check_bias(value: object, of_adapted: str) -> None:
    """ConfigError for what says nothing of which biases are trained; PEFT has a word for each method."""
    if value not in ("none", "all", of_adapted):
        raise ConfigError(f"bias is {quoted(value)}; 'none', 'all' or '{of_adapted}' is wanted")


def check_count(name: str, value: object, lowest: int = 1) -> None:
    """ConfigError for what is no number of ranks, or steps."""
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value < 1 << 31:
        raise ConfigError(f"{name} is {printable(repr(value))}; it must be a whole number, from {lowest} to 2^31 - 1")


def check_counts(name: str, table: Mapping[str, int]) -> None:
    """The same of each entry of a table, such as `rank_pattern`."""
    for key, value in table.items():
        check_count(f"{name}[{quoted(key)}]", value)


def check_number(name: str, value: object) -> None:
    """ConfigError for what no factor of a weight can be."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ConfigError(f"{name} is {printable(repr(value))}; it must be a finite number")


def check_numbers(name: str, table: Mapping[str, float]) -> None:
    """The same of each entry of a table, such as `alpha_pattern`."""
    for key, value in table.items():
        check_number(f"{name}[{quoted(key)}]", value)


def check_dropout(name: str, value: object) -> None:
    """ConfigError for what is no part of an input that could be dropped."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"{name} is {printable(repr(value))}; it must be a number, at least 0 and below 1")


def check_choice(name: str, value: object, wanted: tuple[object, ...]) -> None:
    """ConfigError for a value that is none of those wanted."""
    if not any(type(value) is type(one) and value == one for one in wanted):
        told = ", ".join(map(repr, wanted))
        raise ConfigError(f"{name} is {quoted(value)}; {'one of ' if len(wanted) > 1 else ''}{told} is wanted")


def check_whole(name: str, value: object, low: int, high: int) -> None:
    """ConfigError for what is no whole number within the bounds."""
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} is {printable(repr(value))}; a whole number from {low} to {high} is wanted")


def check_between(name: str, value: object, low: float, high: float) -> None:
    """ConfigError for what is no number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} is {printable(repr(value))}; a number from {low:g} to {high:g} is wanted")
