"""Awareness: an adapter that is trained as it will be once it is merged into weights of a format."""

from collections.abc import Mapping
from dataclasses import fields

from torch import nn

from surgery.codecs.formats import Format
from surgery.core.config import AdapterConfig
from surgery.errors import ConfigError, MatchError, StateError, printable
from surgery.hosts.holding import holding_of
from surgery.layers import Adapted
from surgery.layers.aware import Holding
from surgery.procedures.places.rows import FittedSite


def holdings(
    modules: Mapping[str, nn.Module],
    config: AdapterConfig,
    sites: Mapping[str, FittedSite],
    form: Format,
) -> dict[str, Holding]:
    """By site, how its weight will be held.

    ConfigError for dropout, StateError beside an adapter of another format, MatchError for what is not held so.
    """
    dropout = next((getattr(config, one.name) for one in fields(config) if one.name == "lora_dropout"), 0)
    if dropout:
        raise ConfigError(
            f"lora_dropout is {dropout}; a quantization-aware adapter acts in the weight and has no input of its own "
            "that could be dropped; set it to 0"
        )
    found = {}
    for name, (site, method, _) in sites.items():
        if site.acting.name != "linear" or site.acting.alone:
            raise MatchError(
                f"{printable(name)}: its op is {site.acting.name}; quantization_aware is for Linear, whose weights are "
                "held quantized; exclude it"
            )
        module = modules[name]
        base = module.base_layer if isinstance(module, Adapted) else module
        method.refuse_merge(site)
        found[name] = holding_of(form, base, site.acting, name)
        others = module.fitted.values() if isinstance(module, Adapted) else ()
        if any(one.aware not in (None, found[name]) for one in others):
            raise StateError(
                f"{printable(name)}: an adapter there is aware of another format; one format for each layer is wanted; "
                "inject both for the same one"
            )
    return found
