"""TinyLoRA: W + U (v[0] P[0] + v[1] P[1] + ...) V, where U and V are parts of W as it began, and v alone is trained.

https://arxiv.org/abs/2602.04118
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import exact_float64, factor_bytes
from surgery.core.method import Additive, Dense, Params, Product, Run, Spec
from surgery.core.op import Op, Tile, in_dtype_of
from surgery.core.site import Site
from surgery.errors import StateError, ValueRangeError, printable
from surgery.methods.acts_on import only_linear_or_conv1d
from surgery.methods.spreads import product_spread, unit_of


@dataclass(frozen=True)
class TinyLora(Additive):
    """U is [out, r], V [r, in], P [u, r, r], v [groups, u]; `group` [1] says which row of v is the site's."""

    r: int
    u: int
    seed: int
    dropout: float = 0.0

    name = "TinyLoRA"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear_or_conv1d(site, self.name)
        (out_features, in_features), r = site.shape, rank_of(site, self.r)
        return {
            "U": Spec("tinylora_B", (out_features, r), fixed=True),
            "V": Spec("tinylora_A", (r, in_features), fixed=True),
            "P": Spec("tinylora_P", (self.u, r, r), fixed=True, dealt=True),
            "group": Spec("tinylora_group", (1,), fixed=True, dealt=True),
            "v": Spec("tinylora_v", (1, self.u), shared=True, longer=(0,)),
        }

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:
        """As of an adapter over this site alone; each step is PEFT's, and rounded to the weight's dtype as there."""
        weight, r = base().weight.detach(), rank_of(site, self.r)
        if weight.is_meta:
            raise StateError(
                f"{printable(site.name)}: it is on the meta device, and TinyLoRA begins with parts of its weight; give "
                "the model its weights first"
            )
        U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
        U, S, V = (part.to(weight.dtype) for part in (U[:, :r], S[:r], Vh[:r]))
        root = S.sqrt()
        return {
            "U": (U * root).float().contiguous(),
            "V": (root.unsqueeze(1) * V).float().contiguous(),
            "P": projections(self.u, r, self.seed, weight.dtype),
            "group": torch.zeros(1, dtype=torch.int32),
        }

    def check_values(self, p: Params, site: Site, where: str) -> None:
        group, groups = int(p["group"]), len(p["v"])
        if not 0 <= group < groups:
            raise ValueRangeError(
                f"{printable(where)}: {printable(site.name)}: its vector is tinylora_v.{group}, and there are "
                f"{groups}; the file is incomplete, or of other modules; save it again"
            )

    def matrices(self, p: Params, site: Site) -> Params:  # noqa: ARG002  # the tensors tell
        U, V, P = (exact_float64(p[role]) for role in "UVP")
        R = _in_order(_own(p).to(P).view(-1, 1, 1) * P)  # [r, r]
        return {**p, "UR": _in_order(U.T.unsqueeze(2) * R.unsqueeze(1)), "wide V": V}  # [out, r], [r, in]

    def work_bytes(self, site: Site) -> int:
        return 2 * factor_bytes(site.shape, rank_of(site, self.r))

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        return product(p["UR"], p["wide V"], tile, self.scaling)

    def directions(self, p: Params) -> Tensor:
        return p["wide V"]

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # Each of U R is a sum of r products of sums of u products, all rounded, on either side.
        unit, V = unit_of(*(p[role] for role in "UVPv")), p["wide V"][:, tile[1]]
        U, P = (exact_float64(p[role]).abs() for role in "UP")
        R = (_own(p).to(P).abs().view(-1, 1, 1) * P).sum(0)  # [r, r]
        off = 2 * (len(P) + len(R) + 2) * unit * (U[tile[0]] @ R)
        return abs(self.scaling) * (off @ V.abs() + product_spread(p["UR"][tile[0]], V, unit))

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        below, U, V, P = run(x), p["U"], p["V"], p["P"]
        v = _own(p).to(P.device)  # of layers on several devices
        R = (v @ P.flatten(1)).view(P.shape[1:])  # [r, r]
        x = in_dtype_of(V, x)
        if training and self.dropout:
            x = F.dropout(x, self.dropout)
        return op.mix_onto(below, F.linear(op.apply(x, V), R), U, self.scaling)


def rank_of(site: Site, r: int) -> int:
    """No more than the weight has."""
    return min(r, *site.shape)


def projections(u: int, r: int, seed: int, dtype: torch.dtype) -> Tensor:
    """[u, r, r]: normal numbers, by PEFT's calls of torch, and rounded as there to the dtype of the weight."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.normal(mean=0.0, std=1.0 / (r**0.5), size=(u, r, r), generator=generator)
    return drawn.to(dtype).to(drawn.dtype) if dtype.is_floating_point else drawn


def _own(p: Params) -> Tensor:
    """[u]: the row of v that is the site's."""
    return p["v"].index_select(0, p["group"].to(p["v"].device)).squeeze(0)


def _in_order(values: Tensor) -> Tensor:
    """The sum along the first axis, from its first element on."""
    total = values[0]
    for one in values[1:]:
        total = total + one
    return total
