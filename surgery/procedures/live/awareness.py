"""Awareness: an adapter that is trained as it will be once it is merged into weights of a format."""

from collections.abc import Mapping
from dataclasses import fields

from torch import nn

from surgery.core.config import AdapterConfig
from surgery.errors import ConfigError, MatchError, StateError, printable
from surgery.hosts.holding import Awareness
from surgery.layers import Adapted, base_of
from surgery.layers.aware import Holding
from surgery.procedures.places.rows import FittedSite


def holdings(
    modules: Mapping[str, nn.Module],
    config: AdapterConfig,
    sites: Mapping[str, FittedSite],
    held: Awareness,
) -> dict[str, Holding]:
    """By site, how its weight will be held; but for those that will be plain.

    ConfigError for dropout, StateError beside an adapter of another format, MatchError for what is not held so.
    """
    drops = [one.name for one in fields(config) if one.name.endswith("_dropout") and getattr(config, one.name)]
    if drops:
        raise ConfigError(
            f"{drops[0]} is {getattr(config, drops[0])}; a quantization-aware adapter acts in the weight and has no "
            "input of its own that could be dropped; set it to 0"
        )
    found = {}
    for name, (site, method, _) in sites.items():
        if site.acting.name != "linear" or site.acting.alone:
            raise MatchError(
                f"{printable(name)}: its op is {site.acting.name}; quantization_aware is for Linear, whose weights are "
                "held quantized; exclude it"
            )
        module = modules[name]
        method.refuse_merge(site)
        aware = held(base_of(module), site.acting, name)
        if aware is None:
            continue
        found[name] = aware
        others = module.fitted.values() if isinstance(module, Adapted) else ()
        if any(one.aware not in (None, aware) for one in others):
            raise StateError(
                f"{printable(name)}: an adapter there is aware of another format; one format for each layer is wanted; "
                "inject both for the same one"
            )
    if sites and not found:
        raise MatchError(
            "quantization_aware: none of the layers that it adapts is held in codes; leave it out, or give a format"
        )
    return found
