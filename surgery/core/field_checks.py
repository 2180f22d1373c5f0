"""Checks of the fields of a config that name modules and layers."""

from typing import Any

from surgery.core.patterns import Budget
from surgery.errors import ConfigError, quoted


def check_names(field: str, value: Any, or_pattern: bool) -> None:
    """ConfigError for what is no list of names, nor, if `or_pattern`, one string."""
    if value is None or (or_pattern and isinstance(value, str)):
        return
    wanted = "a list of module names" + (" or one string" if or_pattern else "")
    if not _listed(value):
        raise ConfigError(f"{field} is {quoted(value)}; it must be {wanted}")
    if not all(isinstance(entry, str) and entry for entry in value):
        raise ConfigError(f"{field} holds an entry that is not a name; it must be {wanted}")


def check_pattern(field: str, pattern: str) -> None:
    """ConfigError for what is no regular expression, or may take too long."""
    try:
        Budget().check(pattern)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error


def check_layers(value: Any) -> None:
    """ConfigError for what is no number of a layer, nor a list of them."""
    numbers = value if _listed(value) else [] if value is None else [value]
    if not all(type(number) is int for number in numbers):
        raise ConfigError(f"layers_to_transform is {quoted(value)}; it must be a whole number or a list of them")


def _listed(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset))
