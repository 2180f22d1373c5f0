"""The inits that start from more than the base: their settings in a config, and what makes their tensors."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from surgery.core.site import Site
from surgery.core.starter import Held, Starter
from surgery.errors import ConfigError, MatchError, printable
from surgery.methods.corda import Corda, CordaSettings
from surgery.methods.eva import Eva, EvaSettings
from surgery.methods.loftq import Loftq, LoftqSettings
from surgery.methods.lora_ga import LoraGa, LoraGaSettings
from surgery.methods.start_settings import settings_of


class Start(NamedTuple):
    """The config's field with its settings, what they are, and what makes its tensors at a site with so large an r."""

    field: str
    settings: type
    made: Callable[[Site, int, Any, Held], Starter]


STARTS: Mapping[str, Start] = {
    Eva.start: Start("eva_config", EvaSettings, lambda site, r, settings, _: Eva(site, r, settings)),
    Corda.start: Start("corda_config", CordaSettings, lambda site, _r, settings, _: Corda(site, settings)),
    LoraGa.start: Start("lora_ga_config", LoraGaSettings, lambda site, _r, settings, _: LoraGa(site, settings)),
    Loftq.start: Start("loftq_config", LoftqSettings, lambda _site, _r, settings, held: Loftq(settings, held)),
}
_OPS = frozenset({"linear", "conv1d"})


def check_settings(config: object) -> None:
    """ConfigError for a field that spells no settings."""
    for one in STARTS.values():
        _settings(one, config)


def check_used(config: object, start: object) -> None:
    """ConfigError for settings of another init than the one that is asked for."""
    for other, (field, *_) in STARTS.items():
        if getattr(config, field) and other != start:
            raise ConfigError(f"{field} is given, and init_lora_weights is not {other!r}; set that, or leave it out")


def starter_of(config: object, start: object, site: Site, r: int, held: Held) -> Starter | None:
    """What makes the tensors at a site; None where the base alone does. MatchError for a layer of another kind."""
    if not isinstance(start, str) or start not in STARTS:
        return None
    if site.acting.name not in _OPS or site.acting.alone:
        raise MatchError(
            f"{printable(site.name)}: its op is {site.acting.name}; init_lora_weights {start!r} is for Linear and "
            "Conv1D; exclude it, or start with True"
        )
    return STARTS[start].made(site, r, _settings(STARTS[start], config), held)


def _settings(one: Start, config: object) -> Any:
    return settings_of(one.settings, one.field, getattr(config, one.field))
