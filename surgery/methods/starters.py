"""The inits that start from more than the base: their settings in a config, and what makes their tensors."""

from collections.abc import Mapping
from typing import Any

from surgery.core.site import Site
from surgery.core.starter import Held, Starter
from surgery.errors import ConfigError, MatchError, printable
from surgery.methods.eva import Eva, EvaSettings
from surgery.methods.loftq import Loftq, LoftqSettings
from surgery.methods.start_settings import settings_of

SETTINGS: Mapping[str, tuple[str, type]] = {
    Eva.start: ("eva_config", EvaSettings),
    Loftq.start: ("loftq_config", LoftqSettings),
}
_OPS = frozenset({"linear", "conv1d"})


def check_settings(config: object) -> None:
    """ConfigError for a field that spells no settings."""
    for name, kind in SETTINGS.values():
        settings_of(kind, name, getattr(config, name))


def check_used(config: object, start: object) -> None:
    """ConfigError for settings of another init than the one that is asked for."""
    for other, (name, _) in SETTINGS.items():
        if getattr(config, name) and other != start:
            raise ConfigError(f"{name} is given, and init_lora_weights is not {other!r}; set that, or leave it out")


def starter_of(config: object, start: object, site: Site, r: int, held: Held) -> Starter | None:
    """What makes the tensors at a site; None where the base alone does. MatchError for a layer of another kind."""
    if not isinstance(start, str) or start not in SETTINGS:
        return None
    if site.acting.name not in _OPS or site.acting.alone:
        raise MatchError(
            f"{printable(site.name)}: its op is {site.acting.name}; init_lora_weights {start!r} is for Linear and "
            "Conv1D; exclude it, or start with True"
        )
    name, kind = SETTINGS[start]
    settings: Any = settings_of(kind, name, getattr(config, name))
    return Eva(site, r, settings) if start == Eva.start else Loftq(settings, held)
