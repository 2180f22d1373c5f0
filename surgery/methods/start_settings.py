"""Settings of an init, as PEFT nests them in a config: `eva_config` and its like."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from surgery.errors import ConfigError, printable

Settings = TypeVar("Settings")


def settings_of(kind: type[Settings], field: str, given: object) -> Settings:
    """What `given`, a table or nothing, says. ConfigError for a setting that is not known, or cannot be."""
    if not isinstance(given, Mapping | None):
        raise ConfigError(f"{field} is {printable(given)!r}; a table of its settings is wanted")
    known: Any = kind
    names = [one.name for one in fields(known)]
    unknown = [name for name in given or {} if name not in names]
    if unknown:
        raise ConfigError(f"{field} has {printable(unknown[0])!r}; {', '.join(names)} are known; leave it out")
    try:
        return kind(**(given or {}))
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error


def check_choice(name: str, value: object, wanted: tuple[object, ...]) -> None:
    """ConfigError for a value that is none of those wanted."""
    if not any(type(value) is type(one) and value == one for one in wanted):
        told = ", ".join(map(repr, wanted))
        raise ConfigError(f"{name} is {printable(value)!r}; {'one of ' if len(wanted) > 1 else ''}{told} is wanted")


def check_whole(name: str, value: object, low: int, high: int) -> None:
    """ConfigError for what is no whole number within the bounds."""
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} is {printable(value)!r}; a whole number from {low} to {high} is wanted")


def check_between(name: str, value: object, low: float, high: float) -> None:
    """ConfigError for what is no number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} is {printable(value)!r}; a number from {low:g} to {high:g} is wanted")
