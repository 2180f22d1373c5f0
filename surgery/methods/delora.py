"""DeLoRA: W + B diag(lambda / r / (|A_i| |B_i|)) A * w, for w the norms of W's inputs as it began.

Each norm counts as 1e-4 at least. https://arxiv.org/abs/2503.18225
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import divided, exact_float64
from surgery.core.method import Additive, Dense, Params, Product, Run
from surgery.core.op import Factors, Op, Tile, in_dtype_of, is_many
from surgery.core.site import Site
from surgery.core.source import TILE_ELEMENTS, row_tiles
from surgery.core.spec import Spec
from surgery.core.sums import TreeSum, row_sums
from surgery.errors import StateError, printable
from surgery.methods.acts_on import only_linear
from surgery.methods.kaiming import kaiming
from surgery.methods.spreads import product_spread, unit_of

_LEAST = 1e-4  # what a norm counts as


@dataclass(frozen=True)
class Delora(Additive):
    """A is [r, in], B is [out, r], l (lambda) is [1], and w is [in], which training leaves as it is.

    `matrices` adds "wide B", and "scaled A", which is all but B, in float64.
    """

    r: int
    bound: float = 15.0  # what lambda begins as
    dropout: float = 0.0
    zero: bool = True  # does B begin as zeros?

    name = "DeLoRA"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear(site, self.name)
        out_features, in_features = site.shape
        return {
            "A": Spec("delora_A", (self.r, in_features)),
            "B": Spec("delora_B", (out_features, self.r)),
            "l": Spec("delora_lambda", (1,)),
            "w": Spec("delora_w_norm", (in_features,), fixed=True),
        }

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:
        weight, shapes = base().weight, {role: spec.shape for role, spec in self.tensors(site).items()}
        if weight.is_meta:
            raise StateError(
                f"{printable(site.name)}: it is on the meta device, and DeLoRA keeps the norms of its weight; give the "
                "model its weights first"
            )
        A = kaiming(shapes["A"])
        B = torch.zeros(shapes["B"]) if self.zero else kaiming(shapes["B"])
        return {"A": A, "B": B, "l": torch.full(shapes["l"], self.bound), "w": _norms(weight).to(torch.float32)}

    def matrices(self, p: Params, site: Site) -> Params:  # noqa: ARG002  # the shapes tell all
        return {**p, "wide B": exact_float64(p["B"]), "scaled A": self._scaled(p)}

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        return product(p["wide B"], p["scaled A"], tile, self.scaling)

    def directions(self, p: Params) -> Tensor:
        return p["scaled A"]

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        return p["B"] * self.scaling, self._scaled(p).to(p["A"].dtype)

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # As LoRA's, with eight more operations rounded: two norms, their product, lambda / r, the quotient, and what
        # it and w are multiplied with. The squares of a norm are added in any order, in float32 at least, and the
        # root halves what they are off by.
        B, A = p["wide B"][tile[0]], p["scaled A"][:, tile[1]]
        exact = max(torch.finfo(torch.promote_types(p[role].dtype, torch.float32)).eps / 2 for role in "AB")
        norms = (p["A"].shape[1] + p["B"].shape[0]) / 2 * exact * (B.abs() @ A.abs())  # [out, in]
        return abs(self.scaling) * (product_spread(B, A, unit_of(*(p[role] for role in "ABlw")), 8) + norms)

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        A, B = self._short(p), p["B"]
        drops = training and self.dropout > 0
        if is_many(x) and not drops:
            plain = run.plain()
            out = None if plain is None else op.apply_with(x, *plain, Factors(A, B, self.scaling))
            if out is not None:
                return out
        below, x = run(x), in_dtype_of(A, x)
        return op.mix_onto(below, op.apply(F.dropout(x, self.dropout) if drops else x, A), B, self.scaling)

    def _short(self, p: Params) -> Tensor:
        """`_scaled` as the forward pass computes it, in A's dtype."""
        wide = torch.promote_types(p["A"].dtype, torch.float32)
        of_A, of_B = (
            torch.linalg.vector_norm(p[role], dim=dim, dtype=wide).clamp(min=_LEAST)
            for role, dim in (("A", 1), ("B", 0))
        )
        scaled: Tensor = p["A"] * (p["l"] / self.r / (of_A * of_B)).unsqueeze(1) * p["w"]  # [r, in]
        return scaled.to(p["A"].dtype)

    def _scaled(self, p: Params) -> Tensor:
        """[r, in], in float64, by sums of one order."""
        A, B, most, w = (exact_float64(p[role]) for role in "ABlw")
        of_A, of_B = (row_sums(one.square()).sqrt().clamp(min=_LEAST) for one in (A, B.mT))
        return A * (divided(most, self.r) / (of_A * of_B)).unsqueeze(1) * w


def _norms(weight: Tensor) -> Tensor:
    """[in], of each input's weights, in float64."""
    tree = TreeSum()
    for rows in row_tiles(weight.shape, TILE_ELEMENTS):
        tree.feed(exact_float64(weight[rows].detach().cpu()).square())
    return tree.total().sqrt()
