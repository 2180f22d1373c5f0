"""BEFT: a vector added to a layer's bias, bias + b, and nothing else. https://arxiv.org/abs/2509.15974"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.core.as_peft import AsPeft
from surgery.core.config import AdapterConfig
from surgery.core.elementwise import Scale
from surgery.core.method import AtStrength, Dense, Params, Product, Run
from surgery.core.op import Op, Tile
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.errors import MatchError, printable
from surgery.methods.acts_on import only_linear
from surgery.methods.lora_bias import Offset


@dataclass(frozen=True, kw_only=True)
class BeftConfig(AdapterConfig):
    """BEFT's settings, named as in PEFT: what is trained is added to the biases of Linear modules, b [1, out].

    A module without a bias can be trained and saved with one, and not merged. https://arxiv.org/abs/2509.15974

    >>> BeftConfig(target_modules=["v_proj"]).method("layers.0.v_proj").zeros
    True
    """

    peft_type: ClassVar[str] = "BEFT"
    spellings: ClassVar[Mapping[str, Spelling]] = {"beft_bias": Spelling("b")}
    neutral: ClassVar[Mapping[str, Any]] = {}
    unwritten = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    init_weights: bool = True  # does it begin as zeros? Else as normal numbers

    def method(self, name: str) -> "Beft":  # noqa: ARG002  # the same everywhere
        return Beft(zeros=self.init_weights)


@dataclass(frozen=True)
class Beft(AtStrength, AsPeft):
    """b is [1, out]; at another strength so much of it is added."""

    zeros: bool = True

    name = "BEFT"
    couples = frozenset()
    leaves_weight = True

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear(site, self.name)
        return {"b": Spec("beft_bias", (1, site.shape[0]))}

    def refuse_merge(self, site: Site) -> None:
        if "bias" not in site.tensors:
            raise MatchError(
                f"{printable(site.name)}: it has no bias, and BEFT adds to that alone; a model of this kind has no "
                "place for one; leave it unmerged, or train modules that have a bias"
            )

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # as others'
        return {"b": (torch.zeros if self.zeros else torch.randn)(self.tensors(site)["b"].shape)}

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        if base.bias is None:
            return base
        column = Dense(base.bias.unsqueeze(1))  # [out, 1]
        return base._replace(bias=self.for_bias().merge(column, p, tile, product).weight.squeeze(1))

    def steps(self, p: Params, tile: Tile, product: Product) -> Scale:  # noqa: ARG002  # the weight stays
        return Scale(torch.ones_like(product.held(p["b"][:1, :1], "b")))

    def merge_as_peft(self, stored: Tensor, p: Params, site: Site, safe: bool) -> Tensor:  # noqa: ARG002  # the weight stays
        return stored

    def beyond_peft(self) -> str:
        return "" if self.strength == 1 else "BEFT at another weight than 1"

    def for_bias(self) -> "BeftOffset":
        return BeftOffset(self.strength)

    def spread(self, p: Params, tile: Tile) -> Tensor:  # noqa: ARG002  # of the weight, which stays
        return torch.zeros(1, 1, dtype=torch.float64)

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:  # noqa: ARG002  # as others'
        b = p["b"].flatten()
        return run(x) + op.beside(b if self.strength == 1 else self.strength * b)


@dataclass(frozen=True)
class BeftOffset(Offset):
    """What becomes of the bias."""

    name = Beft.name
