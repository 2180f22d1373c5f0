"""Settings of an init, as PEFT nests them in a config: `eva_config` and its like."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from surgery.errors import ConfigError, quoted

Settings = TypeVar("Settings")


def settings_of(kind: type[Settings], field: str, given: object) -> Settings:
    """What `given`, a table or nothing, says. ConfigError for a setting that is not known, or cannot be."""
    if not isinstance(given, Mapping | None):
        raise ConfigError(f"{field} is {quoted(given)}; a table of its settings is wanted")
    known: Any = kind
    names = [one.name for one in fields(known)]
    unknown = [name for name in given or {} if name not in names]
    if unknown:
        raise ConfigError(f"{field} has {quoted(unknown[0])}; {', '.join(names)} are known; leave it out")
    try:
        return kind(**(given or {}))
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error
