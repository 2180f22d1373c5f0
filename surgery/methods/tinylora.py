"""TinyLoRA: W + U (v[0] P[0] + v[1] P[1] + ...) V, where U and V are parts of W as it began, and v alone is trained.

https://arxiv.org/abs/2602.04118
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import exact_float64, factor_bytes
from surgery.core.method import Additive, Dense, Params, Product, Run
from surgery.core.op import Op, Tile, in_dtype_of
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.core.sums import added
from surgery.errors import StateError, ValueRangeError, printable
from surgery.methods.acts_on import only_matrices
from surgery.methods.spreads import product_spread, unit_of


@dataclass(frozen=True)
class TinyLora(Additive):
    """U is [out, r], V [r, in], P [u, r, r], v [groups, u]; `group` [1] says which row of v is the site's.

    Of an embedding, which is stored transposed, U is [in, r] and V [r, out]: as PEFT has it, and as who sees no more
    than the stored weight takes it for a Linear's.
    """

    r: int
    u: int
    seed: int
    dropout: float = 0.0

    name = "TinyLoRA"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_matrices(site, self.name)
        r = rank_of(site, self.r)
        high, wide = site.shape[::-1] if _is_embedding(site.acting) else site.shape
        return {
            "U": Spec("tinylora_B", (high, r), fixed=True),
            "V": Spec("tinylora_A", (r, wide), fixed=True),
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
        stored = weight.T if _is_embedding(site.acting) else weight
        U, S, Vh = torch.linalg.svd(stored.float(), full_matrices=False)
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

    def matrices(self, p: Params, site: Site) -> Params:
        """`left` and `right` are the factors; with `turned`, whatever it holds, those of the transposed delta."""
        U, V = (exact_float64(p[role]) for role in "UV")
        R = added(v * exact_float64(P) for v, P in zip(_own(p).to(U), p["P"], strict=True))  # [r, r]
        left = added(column.unsqueeze(1) * row for column, row in zip(U.T, R, strict=True))  # [high, r]
        found = {**p, "left": left, "right": V}  # [r, wide]
        return {**found, "turned": p["group"]} if _is_embedding(site.acting) else found

    def work_bytes(self, site: Site) -> int:
        return 2 * factor_bytes(site.shape, rank_of(site, self.r))

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        if "turned" in p:
            return product(p["left"], p["right"], tile[::-1], self.scaling).mT
        return product(p["left"], p["right"], tile, self.scaling)

    def directions(self, p: Params) -> Tensor | None:
        return None if "turned" in p else p["right"]

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # Each element of U R is a sum of r products of sums of u products, all rounded, on either side.
        rows, columns = tile[::-1] if "turned" in p else tile
        unit, right = unit_of(*(p[role] for role in "UVPv")), p["right"][:, columns]
        U, P = (exact_float64(p[role]).abs() for role in "UP")
        R = (_own(p).to(P).abs().view(-1, 1, 1) * P).sum(0)  # [r, r]
        off = 2 * (len(P) + len(R) + 2) * unit * (U[rows] @ R)
        found = abs(self.scaling) * (off @ right.abs() + product_spread(p["left"][rows], right, unit))
        return found.mT if "turned" in p else found

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        below, U, V, P = run(x), p["U"], p["V"], p["P"]
        dropped = self.dropout if training else 0.0
        R = (_own(p).to(P.device) @ P.flatten(1)).view(P.shape[1:])  # [r, r]; v may be of layers on several devices
        if _is_embedding(op):
            h = F.dropout(op.apply(x, U.T), dropped)  # [*batch, r]
            return op.mix_onto(below, F.linear(h, R.T), V.T, self.scaling)
        x = in_dtype_of(V, x)
        x = F.dropout(x, dropped) if dropped else x
        return op.mix_onto(below, F.linear(op.apply(x, V), R), U, self.scaling)


def rank_of(site: Site, r: int) -> int:
    """No more than the weight has."""
    return min(r, *site.shape)


def projections(u: int, r: int, seed: int, dtype: torch.dtype) -> Tensor:
    """[u, r, r]: normal numbers, by PEFT's calls of torch, and rounded as there to the dtype of the weight."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.normal(mean=0.0, std=1.0 / (r**0.5), size=(u, r, r), generator=generator)
    return drawn.to(dtype).to(drawn.dtype) if dtype.is_floating_point else drawn


def _is_embedding(op: Op) -> bool:
    return op.name == "embedding"


def _own(p: Params) -> Tensor:
    """[u]: the row of v that is the site's."""
    return p["v"].index_select(0, p["group"].to(p["v"].device)).squeeze(0)
