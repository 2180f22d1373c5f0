"""AdaLoRA: W + scaling * B (A * E), whose ranks are allotted in training. https://arxiv.org/abs/2303.10512

The scaling is alpha / (init_r + 1e-5), as in PEFT: of the rank that it began with, however many triplets are left.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import exact_float64
from surgery.core.as_peft import AsPeft
from surgery.core.method import Additive, Dense, Params, Product, Run
from surgery.core.op import Op, Tile, in_dtype_of, onto
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.errors import MatchError, printable
from surgery.methods.spreads import product_spread, unit_of

BESIDE_RANK = 1e-5  # what PEFT adds to the rank that it divides by
_OPS = frozenset({"linear", "conv1d", "convolution"})


@dataclass(frozen=True)
class AdaLora(Additive, AsPeft):
    """A is [r, in], E is [r, 1], B is [out, r]: as many triplets; r may be 0. Over a Conv2d, in is flat, as in PEFT."""

    r: int
    alpha: float  # of which the scaling is made, and the rank that it began with
    init_r: int
    dropout: float = 0.0
    zero: bool = True  # does E begin as zeros?

    name = "AdaLoRA"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        op = site.acting
        if op.name not in _OPS or len(op.kernel) not in (0, 2) or op.groups > 1:
            axes = f" over {len(op.kernel)} axes in {op.groups} groups" if op.kernel else ""
            raise MatchError(
                f"{printable(site.name)}: its op is {op.name}{axes}; AdaLoRA acts on Linear, Conv1D of transformers, "
                "and Conv2d in one group, as in PEFT; exclude it"
            )
        out_features, in_features = site.shape
        shapes = {"A": (self.r, in_features), "E": (self.r, 1), "B": (out_features, self.r)}
        return {role: Spec(f"lora_{role}", shape) for role, shape in shapes.items()}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        fresh = {role: torch.randn(spec.shape) for role, spec in self.tensors(site).items()}
        return {"A": fresh["A"] * 0.02, "E": fresh["E"] * 0, "B": fresh["B"] * 0.02} if self.zero else fresh

    def matrices(self, p: Params, site: Site) -> Params:  # noqa: ARG002  # the shapes tell all
        # In float64 A * E is exact, where the factors have 24 bits or fewer. Triplets that are gone, which files leave
        # out, have no part in the grid that B is rounded to either.
        B = exact_float64(p["B"]).masked_fill(p["E"].T == 0, 0)
        return {**p, "wide B": B, "AE": exact_float64(p["A"]) * exact_float64(p["E"])}

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        return product(p["wide B"], p["AE"], tile, self.scaling)

    def directions(self, p: Params) -> Tensor:
        return p["AE"]  # of which those are zero that have lost their rank

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        return p["B"] * self.scaling, p["A"] * p["E"]

    def weighted(self, weight: float) -> Self:
        return replace(self, scaling=self.scaling * weight, alpha=self.alpha * weight)

    def merge_as_peft(self, stored: Tensor, p: Params, site: Site, safe: bool) -> Tensor:  # noqa: ARG002  # one way
        began = torch.full((1,), float(self.init_r), dtype=p["E"].dtype, device=p["E"].device)
        delta = site.acting.stored(p["B"] @ (p["A"] * p["E"])) * self.alpha / (began + BESIDE_RANK)
        return (stored + delta).to(stored.dtype)

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # As LoRA's, with three more operations rounded: A * E, the rank's 1e-5, and the division by it.
        B, AE = p["wide B"][tile[0]], p["AE"][:, tile[1]]
        if not self.r:
            return B @ AE
        return abs(self.scaling) * product_spread(B, AE, unit_of(*(p[role] for role in "AEB")), 3)

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        below = run(x)
        A = p["A"] * p["E"]  # [r, in]
        x = in_dtype_of(A, x)
        if training and self.dropout:
            x = F.dropout(x, self.dropout)
        return onto(below, op.mix(op.apply(x, A), p["B"]), self.scaling)
