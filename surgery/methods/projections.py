"""Projections: matrices drawn from a seed, which all sites of an adapter share and no training changes.

Each torch call is PEFT's, in its order, so that the same seed gives the same bits.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from surgery.core.site import Site
from surgery.methods.bias_config import BiasConfig
from surgery.methods.field_values import check_dropout, check_whole


@dataclass(frozen=True, kw_only=True)
class ProjectionsConfig(BiasConfig):
    """What the configs of such methods have."""

    dropout_field: ClassVar[str]
    unwritten: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    projection_prng_key: int = 0
    save_projection: bool = True
    fan_in_fan_out: bool = False  # read and written for PEFT; the op decides, see hosts
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("projection_prng_key", self.projection_prng_key, -(1 << 63), (1 << 64) - 1)
        check_dropout(self.dropout_field, getattr(self, self.dropout_field))

    def keeps_shared(self) -> bool:
        return self.save_projection

    def keeping_shared(self) -> Self:
        return replace(self, save_projection=True)

    def generator(self) -> torch.Generator:
        """That of the seed, begun."""
        return torch.Generator("cpu").manual_seed(self.projection_prng_key)


def largest(sites: Iterable[Site]) -> tuple[int, int]:
    """(out, in): the most outputs, and the most inputs, of any."""
    outs, ins = zip(*(site.shape for site in sites), strict=True)
    return max(outs), max(ins)


def kaiming_of_seed(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming's uniform numbers, as many to an output as there are columns."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def held_beside(drawn: Mapping[str, Tensor], sites: Collection[Site]) -> Mapping[str, Tensor]:
    """As PEFT holds them: rounded to the dtype of each weight that they lie over, then in float32 or wider."""
    dtypes = dict.fromkeys(site.weight.torch_dtype for site in sites)
    return {role: _through(values, dtypes) for role, values in drawn.items()}


def _through(values: Tensor, dtypes: Iterable[torch.dtype]) -> Tensor:
    for dtype in dtypes:
        values = values.to(dtype) if dtype.is_floating_point else values
    return values.to(torch.promote_types(values.dtype, torch.float32))
