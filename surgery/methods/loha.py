"""LoHa: W + scaling * (w1_a w1_b) * (w2_a w2_b), element by element. https://arxiv.org/abs/2108.06098"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.core.arithmetic import exact_product
from surgery.core.method import Additive, Dense, Params, Product, Run
from surgery.core.one_step import is_eager
from surgery.core.op import Op, Tile, adds_up, in_dtype_of
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.methods.kaiming import kaiming
from surgery.methods.lycoris import (
    NONE,
    Dropouts,
    LycorisConfig,
    as_matrices,
    by_place,
    check_op,
    factor,
    factor_spread,
    is_tucker,
    over_places,
)
from surgery.methods.spreads import unit_of

_ALWAYS = frozenset({"w1_a", "w1_b", "w2_a", "w2_b"})
_TUCKER = ("t1", "t2")


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(LycorisConfig):
    """LoHa's settings, named as in PEFT: W + alpha / r * (w1_a w1_b) * (w2_a w2_b), element by element.

    w1_a and w2_a are [out, r], w1_b and w2_b are [r, in]. With `use_effective_conv2d`, a convolution of more than one
    place has t1 and t2 [r, r, *kernel] besides, and [r, out] and [r, channels]. https://arxiv.org/abs/2108.06098

    >>> LoHaConfig(r=4, alpha=2, target_modules=["q_proj"]).method("q_proj").scaling
    0.5
    """

    peft_type: ClassVar[str] = "LOHA"
    spellings: ClassVar[Mapping[str, Spelling]] = {
        f"hada_{role}": Spelling(role) for role in ("w1_a", "w1_b", "w2_a", "w2_b", *_TUCKER)
    }

    init_weights: bool = True

    def forms(self) -> Collection[frozenset[str]]:
        return [_ALWAYS, _ALWAYS.union(_TUCKER)]

    def method(self, name: str) -> "LoHa":
        r, alpha = self.numbers(name)
        dropouts = Dropouts(self.rank_dropout, self.module_dropout)
        return LoHa(alpha / r, r, self.use_effective_conv2d, dropouts, zero=self.init_weights)


@dataclass(frozen=True)
class LoHa(Additive):
    """Over a convolution, in is flat, as in PEFT; or by Tucker's form it is a sum over i and j in each place of the
    kernel: w_a[i, out] t[i, j] w_b[j, channel]."""

    r: int
    effective: bool = False  # is a kernel in Tucker's form?
    dropouts: Dropouts = NONE
    zero: bool = True  # does w2_b begin as zeros?

    name = "LoHa"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        check_op(site, self.name)
        (out_features, in_features), kernel, r = site.shape, site.acting.kernel, self.r
        shapes: dict[str, tuple[int, ...]] = {"a": (out_features, r), "b": (r, in_features)}
        tucker = self.effective and is_tucker(kernel)
        if tucker:
            places = torch.Size(kernel).numel()
            shapes = {"a": (r, out_features), "b": (r, in_features // places)}
        found = {f"w{one}_{role}": shape for one in (1, 2) for role, shape in shapes.items()}
        if tucker:  # over one axis as over two, as in PEFT
            found |= dict.fromkeys(_TUCKER, (r, r, *kernel, *(1 for _ in range(2 - len(kernel)))))
        return {role: Spec(f"hada_{role}", shape) for role, shape in found.items()}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        fresh = {role: kaiming(spec.shape) for role, spec in self.tensors(site).items()}
        return {**fresh, "w2_b": torch.zeros_like(fresh["w2_b"])} if self.zero else fresh

    def matrices(self, p: Params, site: Site) -> Params:  # noqa: ARG002  # the shapes tell all
        return as_matrices(p)

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        rows, columns = tile
        first, second = (factor(p, one, rows, product) for one in "12")
        return (first * second * self.scaling)[:, columns]

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # What each of the two may be off by, at what the other is; then their product and its scaling are rounded, and
        # the scaling itself, which PEFT holds in float32 whatever the factors are.
        rows, columns = tile
        first, second = (factor(p, one, rows, exact_product).abs() for one in "12")
        off, other = (factor_spread(p, one, rows) for one in "12")
        apart = off * (second + other) + other * first + (3 * unit_of(*p.values()) + 2.0**-24) * first * second
        return (abs(self.scaling) * apart)[:, columns]

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        kept = self.dropouts.kept(p["w1_a"].shape[1 if "t1" in p else 0], p["w1_a"]) if training else None
        delta = self._dense(as_matrices(p), kept)
        plain = run.plain()
        if plain is not None and adds_up(x, plain.weight, delta):
            return op.apply(x, plain.weight + delta, plain.bias)
        return run(x) + op.apply(in_dtype_of(delta, x), delta)

    def _dense(self, p: Params, kept: Tensor | None) -> Tensor:
        """The delta, [out, in], of which `kept` tells what is left."""
        outputs, factors = len(p["w1_a"]), dict(p)
        if kept is not None:
            factors["w1_a"] = p["w1_a"] * kept.unsqueeze(1)
        if "t1" in p:
            for one in "12":
                factors[f"w{one}_a"] = by_place(factors[f"w{one}_a"] @ p[f"t{one}"], len(p[f"w{one}_b"]))
        given = tuple(factors[role] for role in ("w1_a", "w1_b", "w2_a", "w2_b"))
        scaled = (given[0] * self.scaling, *given[1:])
        found: Tensor = _Hadamard.apply(*scaled) if is_eager(*given) else hadamard(*scaled)  # type: ignore[no-untyped-call]
        return over_places(found, outputs) if "t1" in p else found


def hadamard(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
    """(B1 A1) * (B2 A2), [out, in]"""
    return (B1 @ A1) * (B2 @ A2)


class _Hadamard(torch.autograd.Function):
    """The same, of which backward computes anew what is as large as the weight."""

    @staticmethod
    def forward(ctx: Any, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
        ctx.save_for_backward(B1, A1, B2, A2)
        return hadamard(B1, A1, B2, A2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        B1, A1, B2, A2 = ctx.saved_tensors
        first, second = grad * (B2 @ A2), grad * (B1 @ A1)
        return first @ A1.T, B1.T @ first, second @ A2.T, B2.T @ second
