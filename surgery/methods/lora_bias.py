"""LoRA whose B has a bias: W + scaling * B A, and bias + scaling * b. As `lora_bias` in PEFT."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from surgery.core.arithmetic import exact_float64
from surgery.core.as_peft import AsPeft
from surgery.core.elementwise import Shift
from surgery.core.method import Additive, Dense, Method, Params, Product, Run
from surgery.core.op import Op, Tile
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.errors import MatchError, printable
from surgery.methods.kaiming import kaiming
from surgery.methods.lora import Lora
from surgery.methods.spreads import unit_of

_OPS = frozenset({"linear", "conv1d", "convolution"})


@dataclass(frozen=True)
class LoraBias(Method, AsPeft):
    """LoRA's tensors, and b [out]."""

    lora: Lora

    name = "lora_bias"
    couples = frozenset()

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        if site.acting.name not in _OPS:
            raise MatchError(
                f"{printable(site.name)}: its op is {site.acting.name}; lora_bias is supported over Linear, Conv1D and "
                "convolutions; exclude it, or leave lora_bias out"
            )
        return {**self.lora.tensors(site), **self.for_bias().tensors(site)}

    def matrices(self, p: Params, site: Site) -> Params:
        return self.lora.matrices(p, site)

    def refuse_merge(self, site: Site) -> None:
        self.lora.refuse_merge(site)
        if "bias" not in site.tensors:
            raise MatchError(
                f"{printable(site.name)}: it has no bias, and this adapter adds one (lora_bias), for which a model of "
                "this kind has no place; leave it unmerged, or train without lora_bias"
            )

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:
        shape = self.tensors(site)["b"].shape
        b = kaiming(shape, self.lora.r) if self.lora.start is False else torch.zeros(shape)
        return {**self.lora.init(site, base), "b": b}

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        merged = self.lora.merge(base, p, tile, product)
        if base.bias is None:
            return merged
        column = Dense(base.bias.unsqueeze(1))  # [out, 1]
        return merged._replace(bias=self.for_bias().merge(column, p, tile, product).weight.squeeze(1))

    def directions(self, p: Params) -> Tensor | None:
        return self.lora.directions(p)

    def merge_as_peft(self, stored: Tensor, p: Params, site: Site, safe: bool) -> Tensor:
        return self.lora.merge_as_peft(stored, p, site, safe)

    def steps(self, p: Params, tile: Tile, product: Product) -> Shift:
        return self.lora.steps(p, tile, product)

    def for_bias(self) -> "Offset":
        return Offset(self.lora.scaling)

    def spread(self, p: Params, tile: Tile) -> Tensor:
        return self.lora.spread(p, tile)

    def settings(self) -> Mapping[str, str]:
        return self.lora.settings()

    def weighted(self, weight: float) -> Self:
        return replace(self, lora=self.lora.weighted(weight))

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        return self.lora.branch(x, run, op, p, training) + op.beside(self.lora.scaling * p["b"])


@dataclass(frozen=True)
class Offset(Additive, AsPeft):
    """What becomes of the bias, as a matrix [out, 1]; b is [out], or [1, out]."""

    name = LoraBias.name

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        return {"b": Spec("lora_B.bias", (site.shape[0],))}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # as others'
        return {"b": torch.zeros(site.shape[0])}

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        return (product.held(p["b"].flatten()[tile[0]], "b") * self.scaling).unsqueeze(1)

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # One product, rounded.
        unit = unit_of(p["b"])
        return unit * abs(self.scaling) * exact_float64(p["b"].flatten()[tile[0]]).abs().unsqueeze(1)

    def merge_as_peft(self, stored: Tensor, p: Params, site: Site, safe: bool) -> Tensor:  # noqa: ARG002  # one way
        return (stored + p["b"].flatten() * self.scaling).to(stored.dtype)

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:  # noqa: ARG002  # as others'
        return run(x) + op.beside(self.scaling * p["b"])
