"""Format: one of FORMS, in which a merged weight is to be held."""

from typing import NamedTuple

import torch
from torch import Tensor

from surgery.codecs import FORMS
from surgery.core.arithmetic import round_once
from surgery.core.codec import Codec, Packed, Settings
from surgery.errors import UsageError, printable


class Format(NamedTuple):
    """A codec with the settings of fresh scales."""

    codec: Codec
    settings: Settings

    def holds(self, packed: Packed) -> bool:
        """Is `packed` of this codec and kind? However its scales are held."""
        kind = "quant_type"
        return self.codec.claims(packed.headers) and packed.settings.get(kind) == self.settings.get(kind)

    def fresh(self, exact: Tensor, dtype: torch.dtype) -> Packed:
        """An exact weight (float64), rounded once to `dtype` and held so."""
        return self.codec.fresh(round_once(exact, dtype), self.settings)


def format_of(name: str, where: str) -> Format:
    """UsageError for a name that is none."""
    if name not in FORMS:
        raise UsageError(f"{where}: {printable(name)!r}; one of {', '.join(FORMS)} is wanted")
    return Format(*FORMS[name])
