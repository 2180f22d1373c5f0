"""DoRA: m * V / |V| for V = W + scaling * B A, a norm for each output. https://arxiv.org/abs/2402.09353"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import exact_float64, exact_product, require_finite
from surgery.core.elementwise import Affine
from surgery.core.method import AtStrength, Dense, Params, Product, Run
from surgery.core.op import Op, Tile, in_dtype_of
from surgery.core.site import Site
from surgery.core.source import TILE_ELEMENTS, row_tiles
from surgery.core.spec import Spec
from surgery.core.sums import sum_rows
from surgery.errors import MatchError, StateError, ValueRangeError, printable
from surgery.methods.lora import Lora
from surgery.methods.spreads import unit_of

_OPS = frozenset({"linear", "conv1d", "embedding", "convolution"})
_LEAST, _SMALLEST = 2.0**-1022, 2.0**-800  # of a square that counts, of a sum that has lost nothing


@dataclass(frozen=True)
class Dora(AtStrength):
    """A and B are LoRA's, m is [out], or [1, out, 1, ...] over a convolution. The norm counts as a constant: no
    gradient passes through it.

    Over other adapters it scales what they have made of W, by the norm of W + scaling * B A alone, as in PEFT.
    At another strength it goes so much of the way from there to its merge.
    """

    lora: Lora  # without dropout
    dropout: float = 0.0

    name = "DoRA"
    couples = frozenset({"in"})

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        op, out_features = site.acting, site.shape[0]
        if op.name not in _OPS or op.groups > 1:
            found = f"its op is {op.name}" if op.groups == 1 else f"it is a convolution in {op.groups} groups"
            raise MatchError(
                f"{printable(site.name)}: {found}; DoRA is supported over Linear, Conv1D, Embedding and convolutions "
                "in one group; exclude it, or leave use_dora out"
            )
        shape = (1, out_features, *(1 for _ in op.kernel)) if op.kernel else (out_features,)
        # PEFT's files have kept the name that it had before it became a module's weight.
        m = Spec("lora_magnitude_vector", shape, live="lora_magnitude_vector.weight")
        return {**self.lora.tensors(site), "m": m}

    def matrices(self, p: Params, site: Site) -> Params:
        return {**self.lora.matrices(p, site), "m": p["m"].flatten()}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:
        shape = self.tensors(site)["m"].shape
        fresh, weight = self.lora.init(site, base), base().weight
        if weight.is_meta:
            raise StateError(
                f"{printable(site.name)}: it is on the meta device, and DoRA starts from the norms of its weight; "
                "give the model its weights first"
            )
        factors = self.lora.matrices(fresh, site)
        norms = [self._norm(weight[rows].cpu(), factors, rows) for rows in row_tiles(site.shape, TILE_ELEMENTS)]
        m = torch.cat(norms).to(torch.promote_types(weight.dtype, torch.float32))
        if not m.any():
            raise StateError(
                f"{printable(site.name)}: its weight is zero everywhere, and DoRA scales what is there, so that "
                "nothing could be trained; give the model its weights first, exclude it, or leave use_dora out"
            )
        return {**fresh, "m": m.view(shape)}

    def terms(self, base: Tensor, p: Params, tile: Tile, product: Product) -> Tensor:
        V = exact_float64(base.detach()) + self.lora.steps(p, tile, product).values.detach()
        return V.square().clamp_(min=_LEAST).mul_(V != 0)

    def directions(self, p: Params) -> Tensor | None:
        return self.lora.directions(p)

    def told(self, p: Params, sums: Tensor) -> Params:
        sums = sums.to(exact_float64(p["m"]).device)
        # As finely as m is: of a fresh adapter they are equal then, and its factor is 1.
        return {**p, "norm": sums.sqrt().to(_wide(p["m"])).to(torch.float64), "sums": sums}

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        told = p if "norm" in p else self.told(p, sum_rows(self.terms(base.weight, p, tile, product)))
        step = self.steps(told, tile, product)
        assert step is not None
        return base._replace(weight=step.apply(base.weight))

    def steps(self, p: Params, tile: Tile, product: Product) -> Affine | None:
        require_finite(p["m"], "m")
        delta = self.lora.steps(p, tile, product).values
        if "norm" not in p:
            return None
        factor = self._factor(p, tile)
        return Affine(1 + self.strength * (factor - 1), self.strength * factor * delta)

    def spread(self, p: Params, tile: Tile) -> Tensor:
        return abs(self.strength) * self._factor(p, tile).abs() * self.lora.spread(p, tile)

    def spread_over(self, base: Tensor, outcome: Tensor, p: Params, tile: Tile, dtype: torch.dtype) -> Tensor:  # noqa: ARG002  # as others'
        # Of the norm: a sum of squares in any order, halved by the root; what the elements of V are off by; and four
        # roundings, of V, of the norm, of the quotient and of the product.
        A, B = exact_float64(p["A"]), exact_float64(p["B"][tile[0]]).abs()
        unit = unit_of(p["A"], p["B"], p["m"])
        exact = torch.finfo(_wide(p["m"])).eps / 2
        grid = 2.0**-21 * self.lora.r * B.amax(1) * A.abs().amax(0).square().sum().sqrt()  # [out]
        off = abs(self.lora.scaling) * (grid + (self.lora.r + 1) * unit * (B @ A.square().sum(1).sqrt()))
        norm = p["norm"][tile[0]]
        relative = (A.shape[1] / 2 + 2) * exact + 4 * unit + off / norm.clamp(min=_LEAST)
        return self.spread(p, tile) + abs(self.strength) * relative.unsqueeze(1) * outcome.abs()

    def settings(self) -> Mapping[str, str]:
        return {**self.lora.settings(), **super().settings()}

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        weight, bias = run.base().weight, run.bias()
        if op.kernel:
            p = {"A": p["A"].flatten(1), "B": p["B"].flatten(1), "m": p["m"].flatten()}
        factor = op.beside(self._live_factor(weight, p))
        constant = None if bias is None else (1 - factor) * op.beside(bias)  # a bias is not scaled
        drops = training and self.dropout > 0 and op.accepts_dropout()
        if not drops and self.strength == 1:
            return _scaled(self.lora.branch(x, run, op, p, training), factor, constant)
        below = run(x)
        if drops:  # of what the base alone makes, so much is dropped too
            x = F.dropout(x.to(p["A"].dtype), self.dropout)
            plain = op.apply(x, weight.to(x.dtype))
            out = below + (self._low_rank(x, plain, op, p) * factor - plain)
        else:
            out = _scaled(self._low_rank(x, below, op, p), factor, constant)
        return out if self.strength == 1 else below + self.strength * (out - below)

    def _low_rank(self, x: Tensor, below: Tensor, op: Op, p: Params) -> Tensor:
        """below + scaling * B A x"""
        A, B = p["A"], p["B"]
        if op.accepts_dropout():
            x = in_dtype_of(A, x)
        return op.mix_onto(below, op.apply(x, A), B, self.lora.scaling)

    def _live_factor(self, weight: Tensor, p: Params) -> Tensor:
        """m / |V|, [out], where m alone has a gradient."""
        m, dtype = p["m"], torch.promote_types(weight.dtype, p["A"].dtype)
        W, A, B = (values.detach().to(dtype) for values in (weight, p["A"], p["B"]))
        with torch.autocast(weight.device.type, enabled=False):
            V = torch.addmm(W, B, A, alpha=self.lora.scaling)
        if V.dtype == torch.float64:  # whose last bits show the order of a sum
            norm = sum_rows(V.square()).sqrt()
        else:
            norm = torch.linalg.vector_norm(V, dim=1, dtype=torch.float64).to(_wide(m))
        zero = norm == 0
        return torch.where(zero, 1, m / norm.masked_fill(zero, 1))

    def _factor(self, p: Params, tile: Tile) -> Tensor:
        """m / |V| of the tile, [out, 1]; 1 where V is zero."""
        m, norm, sums = exact_float64(p["m"][tile[0]]), p["norm"][tile[0]], p["sums"][tile[0]]
        sound = torch.isfinite(norm) & (((sums == 0) & (norm == 0)) | ((sums > _SMALLEST) & (norm > 0)))
        if not bool(sound.all()):
            raise ValueRangeError(
                "the norm of an output's weights is beyond 2^±400, or holds NaN or infinity; DoRA divides by it; "
                "check the base"
            )
        return torch.where(norm == 0, 1, m / norm).unsqueeze(1)

    def _norm(self, weight: Tensor, p: Params, rows: slice) -> Tensor:
        return sum_rows(self.terms(weight, p, (rows, slice(None)), exact_product)).sqrt()


def _scaled(values: Tensor, factor: Tensor, constant: Tensor | None) -> Tensor:
    return values * factor if constant is None else torch.addcmul(constant, values, factor)


def _wide(m: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(m.dtype, torch.float32)
