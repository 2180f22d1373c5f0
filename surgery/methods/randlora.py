"""RandLoRA: W + scaling * B (L * A * G), of full rank: L and G are trained, B and A random and the same at all sites.

scaling = alpha / r. https://arxiv.org/abs/2502.00987
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import exact_float64, factor_bytes
from surgery.core.method import Additive, Dense, Params, Product, Run
from surgery.core.op import Op, Tile, in_dtype_of, onto
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.methods.acts_on import only_linear_or_conv1d
from surgery.methods.field_values import check_count, check_number
from surgery.methods.projections import ProjectionsConfig, held_beside, largest
from surgery.methods.spreads import product_spread, unit_of


@dataclass(frozen=True, kw_only=True)
class RandLoraConfig(ProjectionsConfig):
    """RandLoRA's settings, named as in PEFT: W + randlora_alpha / r * B (L * A * G), as many bases as give full rank.

    Of a weight whose smaller side is `low` and whose larger is `high`, there are n = ceil(low / r) bases: L is [r, n]
    and G [n, low]. A [r, 1, low] and B [high, n, r] are one pair for all modules, as large as these ask together.
    `sparse` and `very_sparse` ones are made of -1, 0 and 1, before all is divided by its deviation.
    https://arxiv.org/abs/2502.00987

    >>> import surgery, torch
    >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 6), "down": torch.nn.Linear(6, 3)})
    >>> model = surgery.inject(model, RandLoraConfig(r=2, target_modules=["up", "down"]))
    >>> [list(model["down"].randlora_lambda["default"].shape), list(model["down"].randlora_gamma["default"].shape)]
    [[2, 2], [2, 3]]
    >>> model["up"].randlora_B["default"] is model["down"].randlora_B["default"]
    True
    """

    peft_type: ClassVar[str] = "RANDLORA"
    spellings: ClassVar[Mapping[str, Spelling]] = {"randlora_lambda": Spelling("L"), "randlora_gamma": Spelling("G")}
    shared: ClassVar[Mapping[str, str]] = {f"randlora_{role}": role for role in "AB"}
    repeats_shared: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, Any]] = {}
    dropout_field = "randlora_dropout"
    bias_of_adapted = "randlora_only"

    r: int = 32
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    randlora_alpha: float = 640

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_number("randlora_alpha", self.randlora_alpha)

    def told(self, name: str) -> Mapping[str, float]:  # noqa: ARG002  # the same at all sites
        return {"r": self.r}

    def drawn(self, sites: Collection[Site]) -> Mapping[str, Tensor]:
        low, high = sorted(largest(sites))
        bases = bases_of(low, self.r)
        if self.sparse or self.very_sparse:
            A, B = self._signs((self.r, 1, low), (high, bases, self.r), math.sqrt(low) if self.very_sparse else 3)
        else:
            A, B = self._uniform((self.r, 1, low), (high, 1, self.r), bases)
        return held_beside({"A": A / A.std(), "B": B / B.std()}, sites)

    def _uniform(self, a: tuple[int, ...], b: tuple[int, ...], bases: int) -> tuple[Tensor, Tensor]:
        """In bfloat16, as PEFT draws them wherever the machine has it."""
        generator = self.generator()
        first, *others = (_kaiming(shape, generator) for shape in (a, *(b for _ in range(bases))))
        return first, torch.cat(others, dim=1)

    def _signs(self, a: tuple[int, ...], b: tuple[int, ...], sparsity: float) -> tuple[Tensor, Tensor]:
        """-1 and 1 once in `sparsity` elements, together; else 0."""
        generator = self.generator()
        first, second = torch.rand(a, generator=generator), torch.rand(b, generator=generator)
        part = 1 / (2 * sparsity)
        return _signs_of(first, part), _signs_of(second, part)

    def method(self, name: str) -> "RandLora":  # noqa: ARG002  # the same at all sites
        return RandLora(self.randlora_alpha / self.r, self.r, self.randlora_dropout, self.init_weights)


def bases_of(low: int, r: int) -> int:
    """How many products of rank r give full rank."""
    return -(-low // r)


@dataclass(frozen=True)
class RandLora(Additive):
    """L is [r, n], G is [n, low]; A is [r, 1, low] and B [high, n, r], or larger; low and high are the weight's sides.

    PEFT lays the bases of A, flat, beside those of B, flat in another order; they are random in any.
    """

    r: int
    dropout: float = 0.0
    zero: bool = True  # does L begin as zeros?

    name = "RandLoRA"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear_or_conv1d(site, self.name)
        return _specs(self.r, min(site.shape), max(site.shape))

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        specs = self.tensors(site)
        G = torch.ones(specs["G"].shape)
        if self.zero:
            return {"L": torch.zeros(specs["L"].shape), "G": G / max(G.shape)}
        return {"L": torch.randn(specs["L"].shape), "G": G / max(site.shape)}

    def matrices(self, p: Params, site: Site) -> Params:
        wide = {role: exact_float64(values) for role, values in _cut(p, site.shape).items()}
        bases = (wide["L"].unsqueeze(2) * wide["A"]).mul_(wide["G"])  # [r, n, low]
        left, right = _turned(wide["B"].flatten(1), bases.flatten(0, 1), site.shape)
        return {**p, "left": left, "right": right}  # [out, k], [k, in]

    def work_bytes(self, site: Site) -> int:
        return factor_bytes(site.shape, self.r * bases_of(min(site.shape), self.r))

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        return product(p["left"], p["right"], tile, self.scaling)

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # As LoRA's of rank k, with two more operations rounded: L * A, and its product with G.
        unit = unit_of(*(p[role] for role in "LGAB"))
        return abs(self.scaling) * product_spread(p["left"][tile[0]], p["right"][:, tile[1]], unit, 2)

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        below = run(x)
        shape = below.shape[-1], x.shape[-1]
        cut = {role: values.to(x.device) for role, values in _cut(p, shape).items()}  # of layers on several devices
        bases: Tensor = _Bases.apply(cut["A"], cut["L"], cut["G"])  # type: ignore[no-untyped-call]
        left, right = _turned(cut["B"].flatten(1), bases.flatten(0, 1), shape)
        x = in_dtype_of(right, x)
        if training and self.dropout:
            x = F.dropout(x, self.dropout)
        return onto(below, op.mix(op.apply(x, right), left), self.scaling)


class _Bases(torch.autograd.Function):
    """[r, n, low] of L * A * G, of which backward needs no more than these three."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, L: Tensor, G: Tensor) -> Tensor:
        ctx.save_for_backward(A, L, G)
        return L.unsqueeze(2) * A * G

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        A, L, G = (values.to(grad.dtype) for values in ctx.saved_tensors)
        by_A = torch.einsum("rnj,rn,nj->rj", grad, L, G).unsqueeze(1) if ctx.needs_input_grad[0] else None
        along = grad * A
        return by_A, torch.einsum("rnj,nj->rn", along, G), torch.einsum("rnj,rn->nj", along, L)


def _cut(p: Params, shape: tuple[int, int]) -> Params:
    """What of the tensors a weight of this shape uses."""
    low, high, bases = min(shape), max(shape), len(p["G"])
    return {"L": p["L"], "G": p["G"], "A": p["A"][..., :low], "B": p["B"][:high, :bases]}


def _turned(B: Tensor, A: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[high, k] and [k, low], turned where a weight has more inputs than outputs: [out, k] and [k, in]."""
    out_features, in_features = shape
    return (B, A) if in_features <= out_features else (A.mT, B.mT)


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


def _signs_of(drawn: Tensor, part: float) -> Tensor:
    signs = torch.zeros(drawn.shape)
    signs[drawn < part] = -1
    signs[drawn > 1 - part] = 1
    return signs


@lru_cache
def _specs(r: int, low: int, high: int) -> Mapping[str, Spec]:
    bases = bases_of(low, r)
    return {
        "L": Spec("randlora_lambda", (r, bases)),
        "G": Spec("randlora_gamma", (bases, low)),
        "A": Spec("randlora_A", (r, 1, low), fixed=True, shared=True, longer=(2,)),
        "B": Spec("randlora_B", (high, bases, r), fixed=True, shared=True, longer=(0, 1)),
    }
