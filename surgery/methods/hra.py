"""HRA: W H, for H = H_1 ... H_r of reflections H_i = I - 2 u_i u_i^T / |u_i|^2. https://arxiv.org/abs/2405.17484"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from surgery.core.arithmetic import all_finite, exact_float64
from surgery.core.config import AdapterConfig, Spelling
from surgery.core.method import Dense, Mixing, Params, Product, Run, Spec
from surgery.core.op import Op, Tile
from surgery.core.site import Site
from surgery.core.sums import row_sums
from surgery.errors import ConfigError, MatchError, ValueRangeError, printable
from surgery.methods.lora_fields import check_count
from surgery.methods.rotations import inverse, times

HraBias = Literal["none", "all", "hra_only"]
_GRID = 2.0**-42  # of the exact product, see arithmetic


@dataclass(frozen=True, kw_only=True)
class HRAConfig(AdapterConfig):
    """HRA's settings, named as in PEFT: `r` reflections of a layer's inputs, by vectors U [in, r].

    An even r starts with pairs of equal ones, which change nothing; an odd r, and `init_weights=False`, with random
    ones, which do. https://arxiv.org/abs/2405.17484

    >>> HRAConfig(r=4, target_modules=["q_proj"]).method("q_proj").r
    4
    """

    peft_type: ClassVar[str] = "HRA"
    spellings: ClassVar[Mapping[str, Spelling]] = {"hra_u": Spelling("U")}
    neutral: ClassVar[Mapping[str, Any]] = {"apply_GS": False}
    reasons: ClassVar[Mapping[str, str]] = {
        "apply_GS": "of the equal vectors that it starts with, Gram-Schmidt leaves what was rounded, which differs from "
        "machine to machine; merge it in PEFT"
    }

    r: int = 8
    bias: HraBias = "none"  # which biases of the base are trained
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        if self.bias not in get_args(HraBias):
            raise ConfigError(f"bias is {printable(self.bias)!r}; 'none', 'all' or 'hra_only' is wanted")

    def biases(self) -> str:
        return self.bias

    def method(self, name: str) -> "Hra":  # noqa: ARG002  # all sites are alike
        return Hra(self.r, paired=self.init_weights and self.r % 2 == 0)


class _Turn(NamedTuple):
    """H = I + L C, of [in, r] and [r, in]."""

    L: Tensor
    C: Tensor


@dataclass(frozen=True)
class Hra(Mixing):
    """U is [in, r]. Two reflections by equal vectors cancel to the bit.

    At another strength than 1 it goes so much of the way from the base to the merge.
    """

    r: int
    paired: bool = True
    strength: float = 1.0

    name = "HRA"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        op = site.acting
        if op.name != "linear" and (op.kernel != (1, 1) or op.groups > 1):
            found = (
                f"a convolution over {list(op.kernel)}, in {op.groups} groups" if op.kernel else f"its op is {op.name}"
            )
            raise MatchError(
                f"{printable(site.name)}: {found}; HRA acts on Linear and Conv2d of one place in one group; exclude it"
            )
        return {"U": Spec("hra_u", (site.shape[1], self.r))}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        (spec,) = self.tensors(site).values()
        U = torch.empty(spec.shape[0], self.r // 2 if self.paired else self.r)
        bound = max(1, U.shape[1]) ** -0.5  # Kaiming's uniform start, with a = sqrt(5)
        U.uniform_(-bound, bound)
        return {"U": U.repeat_interleave(2, 1) if self.paired else U}

    def prepared(self, p: Params, product: Product) -> Params:
        """With "L" and "C"."""
        if not all_finite(p["U"].detach()):
            raise ValueRangeError("U holds NaN or infinity; finite numbers are wanted; train or save it again")
        V = _units(exact_float64(p["U"]))
        if not all_finite(V.detach()):
            raise ValueRangeError("a vector of U is zero, or beyond what can be squared; it reflects nothing; train it")
        L, R = _pairs(V, lambda u, v: product(u.unsqueeze(1), v.unsqueeze(2), _WHOLE, 1.0, fine=True).flatten(1))
        C = times(product, inverse(_ahead(times(product, R.T, L)), product), R.T)
        return {**p, "L": L, "C": C}

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:  # noqa: ARG002  # of whole rows
        p, weight = p if "C" in p else self.prepared(p, product), base.weight
        if not all_finite(weight):  # it stays so, which those who read it refuse
            return base
        moved = times(product, times(product, weight.to(p["L"].dtype), p["L"]), p["C"])
        return base._replace(weight=weight + self.strength * moved)

    def strayed(self, base: Tensor, error: Tensor, p: Params, tile: Tile) -> Tensor:  # noqa: ARG002  # of whole rows
        # Each reflection multiplies what came before by u, sums of `n` products, takes that from it, and has a norm of
        # as many; what came before and comes after is at most I + |L| |C|. Then n products are summed, of a weight
        # that is rounded to the factors' dtype, and the outcome is rounded to it. The last term is the exact product's.
        V, L, C = _units(exact_float64(p["U"])).abs(), p["L"].abs(), p["C"].abs()
        unit, n = torch.finfo(p["U"].dtype).eps / 2, len(V)
        before, after = V + L @ (C @ V), V.T + (V.T @ L) @ C
        W, through = base.abs(), base.abs() @ L
        own = 4 * (n + 5) * unit * ((W @ before) @ after) + (n + self.r + 2) * unit * (W + through @ C)
        grid = (n + self.r) * _GRID * n * W.amax(1, keepdim=True) * L.amax() * self.r * C.amax()
        return error + abs(self.strength) * ((error @ L) @ C + own + grid)

    def settings(self) -> Mapping[str, str]:
        return {"r": str(self.r), "strength": self.strength.hex()}

    def weighted(self, weight: float) -> Self:
        return replace(self, strength=self.strength * weight)

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:  # noqa: ARG002  # as others'
        U = p["U"].to(torch.promote_types(p["U"].dtype, torch.float32))
        with torch.autocast(U.device.type, enabled=False):
            L, R = _pairs(_units(U), lambda u, v: (u * v).sum(1, keepdim=True))
            C = torch.linalg.solve_triangular(_ahead(R.T @ L), R.T, upper=True, unitriangular=True)
        wide = x.to(torch.promote_types(x.dtype, C.dtype))
        L, C = L.to(wide.dtype), C.to(wide.dtype)
        rows = wide.movedim(-3, -1) if op.kernel else wide  # [*batch, in]
        moved = (rows @ C.T) @ (L.T if self.strength == 1 else self.strength * L.T)
        return run((wide + (moved.movedim(-1, -3) if op.kernel else moved)).to(x.dtype))


_WHOLE: Tile = (slice(None), slice(None))


def _units(U: Tensor) -> Tensor:
    """Its columns at length 1, each by the same operations, so that equal ones stay so."""
    rows = U.T.contiguous()  # [r, in]
    return (rows / row_sums(rows * rows).sqrt().unsqueeze(1)).T


def _pairs(V: Tensor, dot: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """L and R [in, r], of which I + L_j R_j^T is two reflections, by u and v = u + w; the last is alone if r is odd.

    (I - 2 u u^T) (I - 2 v v^T) = I + u (2 w + 4 (u . w) v)^T - w (2 v)^T, which is I to the bit where w is zero.
    """
    rows, paired = V.T, V.shape[1] // 2 * 2
    u, v = rows[0:paired:2], rows[1:paired:2]  # [r / 2, in]
    w = v - u
    L = torch.stack([u, w], 1).flatten(0, 1)
    R = torch.stack([2 * w + 4 * dot(u, w) * v, -2 * v], 1).flatten(0, 1)
    return torch.cat([L, rows[paired:]]).T, torch.cat([R, -2 * rows[paired:]]).T


def _ahead(products: Tensor) -> Tensor:
    """I - N, of R^T L [r, r]; N is what pairs make of later ones: (I + L_1 R_1^T) (I + L_2 R_2^T) has R_1^T L_2."""
    r = len(products)
    pair = torch.arange(r, device=products.device) // 2
    later = pair.unsqueeze(1) < pair
    return torch.eye(r, dtype=products.dtype, device=products.device) - products.masked_fill(~later, 0)
