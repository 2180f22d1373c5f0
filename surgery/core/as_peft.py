"""As PEFT: the bits of its own merges in place of exact ones; whole weights, in the dtypes that it computes in."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surgery.core.adapter import Layer
from surgery.core.method import Method, Params
from surgery.core.site import Site
from surgery.errors import ConfigError, printable

Arithmetic = Literal["exact", "peft", "peft-safe"]


class AsPeft(ABC):
    """A method that knows, operation by operation, what PEFT 0.21.2's merge_and_unload makes of a weight."""

    @abstractmethod
    def merge_as_peft(self, stored: Tensor, p: Params, site: Site, safe: bool) -> Tensor:
        """The whole stored weight after it, in its dtype; `p` as PEFT holds them; `safe` as its safe_merge."""

    def beyond_peft(self) -> str:
        """What is asked of it that PEFT has no merge for; nothing if it has."""
        return ""


@dataclass(frozen=True)
class PeftMerge:
    """How the layers over one weight are merged.

    Factors that come from files are held as PeftModel.from_pretrained holds them: of half types in float32. Those of
    a live model (`as_held`) are taken as they are.
    """

    safe: bool
    as_held: bool = False

    def __call__(self, stored: Tensor, layers: Iterable[Layer], site: Site) -> Tensor:
        wide = torch.promote_types(stored.dtype, torch.float32)
        for layer in layers:
            p = {r: v if self.as_held else v.to(stored.device, wide) for r, v in layer.params.items()}
            assert isinstance(layer.method, AsPeft)  # others are refused before
            stored = layer.method.merge_as_peft(stored, p, site, self.safe)
        return stored


def refuse_unlike_peft(method: Method, site: Site) -> None:
    """ConfigError for a method over a site whose merge by PEFT is not known to the bit."""
    what = method.beyond_peft() if isinstance(method, AsPeft) else f"a merge of {method.name}"
    what = "a merge of parameters" if site.acting.alone else what
    if what:
        raise ConfigError(
            f"{printable(site.name)}: {what} is not known as PEFT makes it; those of LoRA without DoRA, (IA)^3, "
            "AdaLoRA, BEFT and trainable tokens are; give `arithmetic=exact`"
        )
