"""Adapter: one config plus its tensors by site; and layer, one method with its tensors at one site."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from surgery.core.config import AdapterConfig
from surgery.core.method import Method, Params


class Layer(NamedTuple):
    """One method with its tensors: what is laid over one site."""

    method: Method
    params: Params


@dataclass(frozen=True)
class Adapter:
    """A config, its tensors by site and role, and what else its files carry."""

    config: AdapterConfig
    sites: Mapping[str, Params]
    saved: Mapping[str, Tensor] = field(default_factory=dict)  # modules_to_save: full tensors by base name
    copies: Mapping[str, Tensor] = field(default_factory=dict)  # copies of the base's own tensors
    ops: Mapping[str, str] = field(default_factory=dict)  # by site, where the spelling of its tensors tells
    where: str = "adapter"
    sha256: Mapping[str, str] = field(default_factory=dict)  # by tensor, as the file spells it, and by file
