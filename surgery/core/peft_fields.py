"""What PEFT's configs have beside the fields that a config class serves, and how values are written in their JSON."""

from abc import ABCMeta
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from inspect import Signature, signature
from typing import Any

from surgery.core.patterns import PatternTable
from surgery.errors import ConfigError, FormatError, quoted

# Fields that say where a file came from. They change no number, so any value is carried.
PROVENANCE = frozenset({"auto_mapping", "peft_type", "peft_version", "runtime_config"})


class OfFields(ABCMeta):
    """What PEFT's configs take besides, and is not served, may be given with the value that leaves the maths alone."""

    neutral: Mapping[str, Any]
    reasons: Mapping[str, str]

    def __call__(cls, *given: Any, **values: Any) -> Any:
        beside = {name: value for name, value in values.items() if name in cls.neutral.keys() - cls.own()}
        for name, value in beside.items():
            if why := cls.refusal(name, value):
                raise ConfigError(f"{name}: {why}")
        return super().__call__(*given, **{name: value for name, value in values.items() if name not in beside})

    @property
    def __signature__(cls) -> Signature:
        """Its own fields, which help() and editors show; not those of the call above."""
        config: Any = cls
        told = signature(config.__init__)
        return told.replace(parameters=list(told.parameters.values())[1:], return_annotation=Signature.empty)

    def own(cls) -> frozenset[str]:
        """Its fields."""
        config: Any = cls  # a dataclass, which its class alone does not say
        return frozenset(field.name for field in fields(config))

    def refusal(cls, name: str, value: object) -> str:
        """Why a field that is not served cannot have this value; nothing where it leaves the maths alone."""
        if value == cls.neutral[name] or value in (None, False, {}, []):
            return ""
        default = f"only {cls.neutral[name]!r} is supported; merge this adapter with the tool that made it"
        return cls.reasons.get(name, default)

    def check_known(cls, data: Mapping[str, Any], where: str) -> None:
        """FormatError for a field of `data` that is not known, or has a value that is not served."""
        own = cls.own()
        for name, value in data.items():
            if name in own or name in PROVENANCE:
                continue
            if name not in cls.neutral:
                near = get_close_matches(name[:64], sorted(own), n=1)
                raise FormatError(
                    f"{where}: unknown field {quoted(name)}; it may change the maths, so it is refused; "
                    f"{f'is {near[0]} meant? ' if near else ''}remove it if it changes nothing"
                )
            if why := cls.refusal(name, value):
                raise FormatError(f"{where}: {name} is {quoted(value)}; {why}")


def as_json(value: Any) -> Any:
    """`value` as JSON has it; sorted, so that equal configs give equal bytes, but for patterns, whose order counts."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value if isinstance(value, PatternTable) else sorted(value.items()))
    return value
