"""HRA: W H, for H = H_1 ... H_r of reflections H_i = I - 2 u_i u_i^T / |u_i|^2. https://arxiv.org/abs/2405.17484"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from surgery.core.arithmetic import all_finite, exact_float64, require_finite
from surgery.core.method import AtStrength, Dense, Mixing, Params, Product, Run
from surgery.core.op import WHOLE, Op, Tile
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.core.sums import row_sums
from surgery.errors import ConfigError, MatchError, ValueRangeError, printable
from surgery.methods.bias_config import BiasConfig
from surgery.methods.field_values import check_count
from surgery.methods.hra_spread import reflected, slanted
from surgery.methods.kaiming import kaiming
from surgery.methods.rotations import COPIES, FINE, inverse, times
from surgery.methods.spreads import unit_of

Bias = Literal["none", "all", "hra_only"]
Dot = Callable[[Tensor, Tensor], Tensor]
_NEAR = 2.0**-12  # what Gram-Schmidt has to leave of a vector, in float32 of which it is rounded to 2^-24
_SIGMAS = 8


@dataclass(frozen=True, kw_only=True)
class HRAConfig(BiasConfig):
    """HRA's settings, named as in PEFT: `r` reflections of a layer's inputs, by vectors U [in, r].

    An even r starts with pairs of equal ones, which change nothing; an odd r, and `init_weights=False`, with random
    ones, which do. `apply_GS` makes them orthogonal first, by Gram-Schmidt. https://arxiv.org/abs/2405.17484

    >>> HRAConfig(r=4, target_modules=["q_proj"]).method("q_proj").r
    4
    """

    peft_type: ClassVar[str] = "HRA"
    bias_of_adapted = "hra_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {"hra_u": Spelling("U")}
    neutral: ClassVar[Mapping[str, Any]] = {}

    r: int = 8
    apply_GS: bool = False  # noqa: N815  # PEFT's spelling
    bias: Bias = "none"  # which biases of the base are trained
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)

    def method(self, name: str) -> "Hra":  # noqa: ARG002  # all sites are alike
        return Hra(self.r, orthogonal=self.apply_GS, paired=self.init_weights and self.r % 2 == 0)

    def check_fresh(self) -> None:
        if self.apply_GS and self.init_weights and self.r % 2 == 0:
            raise ConfigError(
                f"apply_GS is true and r is {self.r}, which starts with pairs of equal vectors; of their second ones "
                "Gram-Schmidt leaves what was rounded; give init_weights=False, or leave apply_GS out"
            )


@dataclass(frozen=True)
class Hra(AtStrength, Mixing):
    """U is [in, r]. Two reflections by equal vectors cancel to the bit.

    At another strength than 1 it goes so much of the way from the base to the merge.
    """

    r: int
    orthogonal: bool = False  # are the vectors made so first?
    paired: bool = True

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

    def work_bytes(self, site: Site) -> int:
        return 8 * COPIES * self.r * max(site.shape[1], self.r)

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        (spec,) = self.tensors(site).values()
        U = kaiming((spec.shape[0], self.r // 2 if self.paired else self.r))
        return {"U": U.repeat_interleave(2, 1) if self.paired else U}

    def prepared(self, p: Params, product: Product) -> Params:
        """With "L" and "C"."""
        require_finite(p["U"], "U")
        dot = partial(_dot, product)
        rest = self._rest(exact_float64(p["U"]), dot)
        V = _units(rest)
        if not all_finite(V.detach()) or (self.orthogonal and bool((_norms(rest) < _NEAR).any())):
            raise ValueRangeError(
                "a vector of U is zero, or beyond what can be squared, or apply_GS leaves less than 2^-12 of it beside "
                "those before; what it reflects is not told; train it again"
            )
        L, R = _pairs(V, dot)
        C = times(product, inverse(_ahead(times(product, R.T, L)), product), R.T)
        return {**p, "L": L, "C": C}

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:  # noqa: ARG002  # of whole rows
        p, weight = p if "C" in p else self.prepared(p, product), base.weight
        if not all_finite(weight):  # it stays so, which those who read it refuse
            return base
        moved = times(product, times(product, weight.to(p["L"].dtype), p["L"]), p["C"])
        return base._replace(weight=weight + self.strength * moved)

    def strayed(self, base: Tensor, error: Tensor, p: Params, tile: Tile) -> Tensor:  # noqa: ARG002  # of whole rows
        # Not a sure bound. Each rounding counts as a number of mean zero, whatever those before it were, which is not
        # so of numbers that are chosen against it. Where it is, a sum of them is beyond _SIGMAS times the root of the
        # sum of their squares, each at its largest, once in 10^13 (Azuma and Hoeffding: 2 exp(-_SIGMAS^2 / 2)). A sure
        # bound adds up what this squares: n roundings of a sum of n products, and over a row what those are off by.
        # With r = 8 and random vectors that is 9 times as much for n = 64, 55 times for n = 1024 and 113 times for
        # n = 4096, about 1.7 sqrt(n); and it is 4 % of a weight there, as much as training changes.
        U, unit, n = exact_float64(p["U"]), unit_of(p["U"]), len(p["U"])
        V = self._vectors(U, _plain_dot)
        A, W, L, C, Y = V.abs(), base.abs(), p["L"].abs(), p["C"].abs(), V
        grid = (n + self.r) * FINE * n * W.amax(1, keepdim=True) * L.amax() * self.r * C.amax()
        if self.orthogonal:
            squares, slant = slanted(V, torch.triu(V.T @ _units(U)), base)
            grid = grid + slant
        else:
            squares, Y = reflected(V, W, base)
        # W H is a sum of n products, H is rounded, W to the factors' dtype, and the outcome to it.
        squares = squares + (2 * n + self.r + 2) * (W + 2 * (W @ Y.abs()) @ A.T).square()
        return error + abs(self.strength) * (2 * (error @ Y.abs()) @ A.T + _SIGMAS * unit * squares.sqrt() + grid)

    def _vectors(self, U: Tensor, dot: Dot) -> Tensor:
        """The columns at length 1, and orthogonal if they are to be."""
        return _units(self._rest(U, dot))

    def _rest(self, U: Tensor, dot: Dot) -> Tensor:
        """The columns, or what Gram-Schmidt leaves of each at length 1 beside those before."""
        if not self.orthogonal:
            return U
        before: list[Tensor] = []
        left: list[Tensor] = []
        for u in _units(U).T.unsqueeze(1):  # [1, in]
            rest = u
            for v in before:
                rest = rest - dot(v, rest) * v
            left.append(rest)
            before.append(_units(rest.T).T)
        return torch.cat(left).T

    def settings(self) -> Mapping[str, str]:
        vectors = {"vectors": "orthogonal"} if self.orthogonal else {}
        return {"r": str(self.r), **vectors, **super().settings()}

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:  # noqa: ARG002  # as others'
        U = p["U"].to(torch.promote_types(p["U"].dtype, torch.float32))
        with torch.autocast(U.device.type, enabled=False):
            L, R = _pairs(self._vectors(U, _plain_dot), _plain_dot)
            C = torch.linalg.solve_triangular(_ahead(R.T @ L), R.T, upper=True, unitriangular=True)
        wide = x.to(torch.promote_types(x.dtype, C.dtype))
        L, C = L.to(wide.dtype), C.to(wide.dtype)
        rows = wide.movedim(-3, -1) if op.kernel else wide  # [*batch, in]
        moved = (rows @ C.T) @ (L.T if self.strength == 1 else self.strength * L.T)
        return run((wide + (moved.movedim(-1, -3) if op.kernel else moved)).to(x.dtype))


def _units(U: Tensor) -> Tensor:
    """Its columns at length 1, each by the same operations, so that equal ones stay so."""
    rows = U.T.contiguous()  # [r, in]
    return (rows / row_sums(rows * rows).sqrt().unsqueeze(1)).T


def _norms(U: Tensor) -> Tensor:
    """[r], of its columns, by sums of one order."""
    rows = U.detach().T.contiguous()
    return row_sums(rows * rows).sqrt()


def _dot(product: Product, u: Tensor, v: Tensor) -> Tensor:
    """Of rows: [n, in] each -> [n, 1]."""
    return product(u.unsqueeze(1), v.unsqueeze(2), WHOLE, 1.0, fine=True).flatten(1)


def _plain_dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum(1, keepdim=True)


def _pairs(V: Tensor, dot: Dot) -> tuple[Tensor, Tensor]:
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
