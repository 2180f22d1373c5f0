"""LoRA: W + scaling * B A, with scaling = alpha / r, or alpha / sqrt(r). https://arxiv.org/abs/2106.09685"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import exact_float64
from surgery.core.as_peft import AsPeft
from surgery.core.method import Additive, Dense, Params, Product, Run
from surgery.core.op import Factors, Op, Tile, in_dtype_of, is_many
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.errors import ConfigError, MatchError, printable
from surgery.methods import stacks
from surgery.methods.kaiming import kaiming
from surgery.methods.lora_as_peft import delta_as_peft, rounds_first
from surgery.methods.spreads import product_spread, unit_of

OUT_PROJ = ".base_layer.out_proj"
"""How PEFT spells the out_proj of an adapted nn.MultiheadAttention, whose delta it adds twice."""

Init = bool | str


@dataclass(frozen=True)
class Lora(Additive, AsPeft):
    """A is [r, in], B is [out, r].

    Over a convolution, as PEFT has it, A is a convolution of the whole input, [r, channels, *kernel], and B mixes
    in each place, [out, r / groups, 1, ...].
    """

    r: int
    dropout: float = 0.0
    start: Init = True
    halves: bool = False  # PEFT adds half of its delta, twice: see OUT_PROJ

    name = "LoRA"
    turns = True

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        op = site.acting
        if op.stack:
            return {role: Spec(f"lora_{role}.weight", shape) for role, shape in stacks.shapes(site, self.r).items()}
        if self.r % op.groups:
            raise MatchError(
                f"{printable(site.name)}: a convolution in {op.groups} groups, which r = {self.r} is no multiple of, "
                "as PEFT asks; choose another r (rank_pattern), or exclude it"
            )
        out_features, in_features = site.shape
        return _specs(op.name, op.kernel, (self.r, op.channels(in_features)), (out_features, self.r // op.groups))

    def matrices(self, p: Params, site: Site) -> Params:
        if site.acting.stack:
            return stacks.by_expert(p, site.acting)
        return {role: _as_matrix(values) for role, values in p.items()}

    def refuse_merge(self, site: Site) -> None:
        if site.acting.groups > 1:
            raise MatchError(
                f"{printable(site.name)}: a convolution in groups, each of which sees a part of the channels, while "
                "this LoRA makes each output depend on all of them; no weight of this shape holds that; "
                "leave it unmerged, or exclude it"
            )

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        self.check_start(site)
        A, B = (torch.zeros(spec.shape) for spec in self.tensors(site).values())
        if self.start == "orthogonal":
            return _orthogonal(A, B)
        if site.acting.name == "embedding":  # as PEFT: an embedding's A is zero and its B is not
            B.normal_()
            if self.start is False:
                A.normal_()
        elif self.start == "gaussian":
            A.normal_(std=1 / self.r)
        else:
            A = kaiming(A.shape)
            if self.start is False:
                B = kaiming(B.shape)
        return {"A": A, "B": B}

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        if p["A"].dim() > 2:
            return stacks.delta(p, tile, product, self.scaling)
        return product(p["B"], p["A"], tile, self.scaling)

    def directions(self, p: Params) -> Tensor | None:
        return p["A"] if p["A"].dim() == 2 else None

    def factors(self, p: Params) -> tuple[Tensor, Tensor] | None:
        return (p["B"] * self.scaling, p["A"]) if p["A"].dim() == 2 else None

    def merge_as_peft(self, stored: Tensor, p: Params, site: Site, safe: bool) -> Tensor:
        delta = delta_as_peft(p, site.acting, self.scaling / 2 if self.halves else self.scaling)
        rounded = delta.to(stored.dtype)
        if self.halves:  # the attention layer adds it, then its out_proj once more, which is never told to be safe
            return (stored + rounded + delta).to(stored.dtype)
        return (stored + (rounded if safe or rounds_first(site.acting) else delta)).to(stored.dtype)

    def spread(self, p: Params, tile: Tile) -> Tensor:
        if p["A"].dim() > 2:
            each = stacks.parts(tile, p["B"].shape[1])
            return torch.cat([self.spread({role: p[role][one] for role in "AB"}, part) for one, part in each])
        A, B = exact_float64(p["A"][:, tile[1]]), exact_float64(p["B"][tile[0]])
        return abs(self.scaling) * product_spread(B, A, unit_of(p["A"], p["B"]))

    def check_run(self, site: Site) -> None:
        if self.dropout and site.acting.roles:
            raise ConfigError(
                f"{printable(site.name)}: lora_dropout is {self.dropout}, and weights that a module reads by itself "
                "have no input that it could act on; set it to 0"
            )

    def check_start(self, site: Site) -> None:
        """ConfigError for settings that would not begin, or train, as they say at this site."""
        self.check_run(site)
        if self.start == "orthogonal" and site.acting.stack:
            raise ConfigError(
                f"{printable(site.name)}: the orthogonal init is of one matrix, and this is a stack of them; start "
                "with True or 'gaussian'"
            )

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        A, B = p["A"], p["B"]
        if is_many(x) and not (training and self.dropout):
            plain = run.plain()
            out = None if plain is None else op.apply_with(x, *plain, Factors(A, B, self.scaling))
            if out is not None:
                return out
        below = run(x)
        if op.kernel:
            A, B = A.flatten(1), B.flatten(1)  # [r, channels * kernel], [out, r / groups]
        if op.accepts_dropout():
            x = in_dtype_of(A, x)
            if training and self.dropout:
                x = F.dropout(x, self.dropout)
        return op.mix_onto(below, op.apply(x, A), B, self.scaling)


@lru_cache
def _specs(op: str, kernel: tuple[int, ...], a: tuple[int, int], b: tuple[int, int]) -> Mapping[str, Spec]:
    """Of A and B, whose first two axes are `a` and `b`. Kept: a model has thousands of sites of few shapes."""
    prefix, suffix = ("lora_embedding_", "") if op == "embedding" else ("lora_", ".weight")
    found = {
        "A": Spec(f"{prefix}A{suffix}", (*a, *kernel)),
        "B": Spec(f"{prefix}B{suffix}", (*b, *(1 for _ in kernel))),
    }
    return MappingProxyType(found)


def _as_matrix(values: Tensor) -> Tensor:
    """A factor of a convolution, [rows, channels, *kernel], as [rows, in]."""
    return values.flatten(1) if values.dim() > 2 else values


def _orthogonal(A: Tensor, B: Tensor) -> Params:
    """Of the shapes of A and B, random, with B A = 0: their inner rows come from disjoint halves of one rotation."""
    r, mixed = A.shape[0], B.shape[1]
    if r % 2 or mixed != r:
        wanted = "an even r" if mixed == r else "a convolution in one group"
        raise ConfigError(f"r is {r}; the orthogonal init needs {wanted}")
    rotation = torch.linalg.qr(torch.randn(r, r)).Q
    first = rotation[0::2].T @ torch.randn(r // 2, _as_matrix(A).shape[1]) / 10  # [r, in]
    second = torch.randn(B.shape[0], r // 2) @ rotation[1::2] / 10  # [out, r]
    return {"A": first.view(A.shape), "B": second.view(B.shape)}
