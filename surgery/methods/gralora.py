"""GraLoRA: W + scaling * D, cut into k x k blocks, each a product of its own: D_jn = B_jn A_nj, of rank r / k.

With `hybrid_r` a LoRA of that rank lies over the whole besides; the scaling is alpha / (r + hybrid_r).
https://arxiv.org/abs/2505.20355
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import exact_float64
from surgery.core.method import Additive, Dense, Params, Product, Run
from surgery.core.op import Op, Tile, in_dtype_of, onto
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.errors import ConfigError, MatchError, printable
from surgery.methods.acts_on import only_linear_or_conv1d
from surgery.methods.bias_config import BiasConfig
from surgery.methods.field_values import check_count, check_dropout, check_number
from surgery.methods.kaiming import kaiming
from surgery.methods.spreads import product_spread, unit_of

Bias = Literal["none", "all", "gralora_only"]


@dataclass(frozen=True, kw_only=True)
class GraloraConfig(BiasConfig):
    """GraLoRA's settings, named as in PEFT: W + scaling * D, of k x k blocks with a product of rank r / k each.

    A is [k, in / k, r], B is [k, r, out / k]; both count as many numbers as a LoRA's of rank `r`. With `hybrid_r` there
    is such a LoRA of the whole weight too. The scaling is alpha / (r + hybrid_r). https://arxiv.org/abs/2505.20355

    >>> GraloraConfig(r=8, alpha=24, hybrid_r=4, gralora_k=2).method("q_proj").scaling
    2.0
    """

    peft_type: ClassVar[str] = "GRALORA"
    bias_of_adapted = "gralora_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {
        "gralora_A": Spelling("A"),
        "gralora_B": Spelling("B"),
        "gralora_A_general.weight": Spelling("A general"),
        "gralora_B_general.weight": Spelling("B general"),
    }
    neutral: ClassVar[Mapping[str, Any]] = {}
    unwritten = frozenset({"exclude_modules"})

    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False  # read and written for PEFT; the op decides, see hosts
    bias: Bias = "none"  # which biases of the base are trained
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_count("hybrid_r", self.hybrid_r, 0)
        check_count("gralora_k", self.gralora_k)
        check_number("alpha", self.alpha)
        check_dropout("gralora_dropout", self.gralora_dropout)
        if self.r % self.gralora_k:
            raise ConfigError(f"r is {self.r}; it must be a multiple of gralora_k, {self.gralora_k}")

    def endings(self) -> Mapping[str, Spelling]:
        return {end: one for end, one in self.spellings.items() if self.hybrid_r or not one.role.endswith("general")}

    def told(self, name: str) -> Mapping[str, float]:  # noqa: ARG002  # the same everywhere
        return {"r": self.r, "alpha": self.alpha}

    def method(self, name: str) -> "Gralora":  # noqa: ARG002  # as above
        scaling = self.alpha / (self.r + self.hybrid_r)
        return Gralora(scaling, self.r, self.gralora_k, self.hybrid_r, self.gralora_dropout, self.init_weights)


@dataclass(frozen=True)
class Gralora(Additive):
    """A is [k, in / k, r], B is [k, r, out / k]; of a hybrid, "A general" is [hybrid, in], "B general" [out, hybrid].

    `matrices` cuts both by blocks, each of rank r / k: A to [k (of in), k (of out), r / k, in / k], B to [k (of out),
    k (of in), out / k, r / k].
    """

    r: int
    k: int
    hybrid: int = 0
    dropout: float = 0.0
    zero: bool = True  # does B begin as zeros?

    name = "GraLoRA"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear_or_conv1d(site, self.name)
        (out_features, in_features), k, r = site.shape, self.k, self.r
        if out_features % k or in_features % k:
            raise MatchError(
                f"{printable(site.name)}: [{out_features}, {in_features}], which cannot be cut into {k} blocks along "
                "each; choose another gralora_k, or exclude it"
            )
        found = {"A": Spec("gralora_A", (k, in_features // k, r)), "B": Spec("gralora_B", (k, r, out_features // k))}
        if self.hybrid:
            found["A general"] = Spec("gralora_A_general.weight", (self.hybrid, in_features))
            found["B general"] = Spec("gralora_B_general.weight", (out_features, self.hybrid))
        return found

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        shapes = {role: spec.shape for role, spec in self.tensors(site).items()}
        return {
            role: kaiming(shape, shape[1]) if role.startswith("A") or not self.zero else torch.zeros(shape)
            for role, shape in shapes.items()
        }

    def matrices(self, p: Params, site: Site) -> Params:  # noqa: ARG002  # the shapes tell all
        A, B, k, part = p["A"].mT, p["B"].mT, self.k, self.r // self.k  # [k, r, in / k], [k, out / k, r]
        return {**p, "A": A.reshape(k, k, part, A.shape[2]), "B": B.reshape(k, B.shape[1], k, part).transpose(1, 2)}

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        return self._laid(p, tile, lambda B, A, part: product(B, A, part, self.scaling))

    def directions(self, p: Params) -> Tensor:
        cut: Tensor = torch.block_diag(*p["A"].flatten(1, 2))  # type: ignore[no-untyped-call]  # [k * r, in]
        return torch.cat([cut, p["A general"]]) if self.hybrid else cut

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # As LoRA's of each product, with two more operations rounded: the sum of both, and what it is scaled by.
        unit = unit_of(*p.values())

        def apart(B: Tensor, A: Tensor, part: Tile) -> Tensor:
            return product_spread(exact_float64(B[part[0]]), exact_float64(A[:, part[1]]), unit, 2)

        return abs(self.scaling) * self._laid(p, tile, apart)

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        A, B, below = p["A"], p["B"], run(x)
        x = in_dtype_of(A, x)
        drop = self.dropout if training else 0.0
        h = (F.dropout(x, drop) if drop else x).reshape(-1, self.k, A.shape[1]).transpose(0, 1)  # [k, batch, in / k]
        h = (h @ A).view(*h.shape[:2], self.k, -1).permute(2, 1, 0, 3).flatten(2)  # [k (of out), batch, r]
        moved = (h @ B).transpose(0, 1).reshape(*x.shape[:-1], -1)  # [*batch, out]
        out = onto(below, moved, self.scaling)
        if not self.hybrid:
            return out
        x = F.dropout(x, drop) if drop else x  # apart from the other, as in PEFT
        return op.mix_onto(out, op.apply(x, p["A general"]), p["B general"], self.scaling)

    def _laid(self, p: Params, tile: Tile, made: Callable[[Tensor, Tensor, Tile], Tensor]) -> Tensor:
        """[out, in] of the tile, of what is made of each block's factors, and of the hybrid's."""
        A, B = p["A"], p["B"]
        rows, columns = _parts(tile[0], B.shape[2], self.k), _parts(tile[1], A.shape[3], self.k)
        bands = [torch.cat([made(B[j, n], A[n, j], (row, column)) for n, column in columns], 1) for j, row in rows]
        laid = torch.cat(bands)
        return laid + made(p["B general"], p["A general"], tile) if self.hybrid else laid


def _parts(cut: slice, each: int, count: int) -> list[tuple[int, slice]]:
    """The blocks that a slice over `count` of them, of `each` long, holds something of, and what of each."""
    start, stop, _ = cut.indices(each * count)
    blocks = range(start // each, -(-stop // each))
    return [(one, slice(max(start - one * each, 0), min(stop - one * each, each))) for one in blocks]
