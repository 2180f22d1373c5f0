"""Formats: what a plain weight can be held as, by the names that people give them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.codecs.bnb4 import Bnb4
from surgery.codecs.bnb8 import Bnb8
from surgery.codecs.fp8_block import Fp8Block
from surgery.core.arithmetic import round_once
from surgery.core.codec import Codec, Packed, Settings
from surgery.errors import UsageError, printable


class Format(NamedTuple):
    """A codec with the settings of fresh scales."""

    codec: Codec
    settings: Settings

    def holds(self, packed: Packed) -> bool:
        """Is it what `packed` is held as?"""
        told = {key: packed.settings.get(key) for key in self.settings}
        return self.codec.claims(packed.headers) and told == self.settings

    def fresh(self, exact: Tensor, dtype: torch.dtype) -> Packed:
        """An exact weight (float64), rounded once to `dtype` and held so."""
        return self.codec.fresh(round_once(exact, dtype), self.settings)


FORMATS: Mapping[str, Format] = {
    "nf4": Format(Bnb4(), {"quant_type": "nf4"}),
    "fp4": Format(Bnb4(), {"quant_type": "fp4"}),
    "int8": Format(Bnb8(), {}),
    "fp8_block": Format(Fp8Block(), {}),
}


def format_of(name: str, where: str) -> Format:
    """UsageError for a name that is none."""
    if name not in FORMATS:
        raise UsageError(f"{where}: {printable(name)!r}; one of {', '.join(FORMATS)} is wanted")
    return FORMATS[name]
