"""Configs as users give them: a config of surgery or peft, a dict of PEFT's fields, or the folder of an adapter."""

from collections.abc import Mapping
from enum import Enum
from os import PathLike
from typing import Any

from surgery.adapters.configs import PeftFiles
from surgery.adapters.peft import config_from
from surgery.core.config import AdapterConfig
from surgery.errors import ConfigTypeError


def config_of(value: object) -> AdapterConfig:
    """The config that `value` is, spells, or lies at. ConfigTypeError for anything else."""
    if isinstance(value, AdapterConfig):
        return value
    if isinstance(value, str | PathLike):
        return PeftFiles().read(value)
    spelled: Any = value.to_dict() if hasattr(value, "to_dict") else value  # a peft config
    if not isinstance(spelled, Mapping):
        raise ConfigTypeError(f"config: a {type(value).__name__}; a config, a dict or a folder is wanted")
    config = config_from({key: _plain(field) for key, field in spelled.items()}, "config")
    config.check_given(value)
    return config


def is_peft_s(value: object) -> bool:
    """Is it a config of peft, or a file of its format? Those are read by PEFT's own rules of matching."""
    return isinstance(value, str | PathLike) or type(value).__module__.partition(".")[0] == "peft"


def _plain(field: Any) -> Any:
    if isinstance(field, Enum):
        return field.value
    return sorted(field) if isinstance(field, set) else field
