"""VeRA: W + (b * B) (d * A): b and d are trained, B and A random and the same at all sites.

https://arxiv.org/abs/2310.11454
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import exact_float64, factor_bytes
from surgery.core.method import Additive, Dense, Params, Product, Run
from surgery.core.op import Op, Tile, in_dtype_of
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.methods.acts_on import only_linear_or_conv1d
from surgery.methods.field_values import check_count, check_number
from surgery.methods.projections import ProjectionsConfig, held_beside, kaiming_of_seed, largest
from surgery.methods.spreads import product_spread, unit_of


@dataclass(frozen=True, kw_only=True)
class VectorsConfig(ProjectionsConfig):
    """What the configs of VeRA and PVeRA have."""

    halves: ClassVar[int] = 1  # as many times r are the rows of A, and the numbers of d

    r: int = 256
    d_initial: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_number("d_initial", self.d_initial)

    def told(self, name: str) -> Mapping[str, float]:  # noqa: ARG002  # the same at all sites
        return {"r": self.r}

    def drawn(self, sites: Collection[Site]) -> Mapping[str, Tensor]:
        (out_features, in_features), generator = largest(sites), self.generator()
        A = kaiming_of_seed((self.halves * self.r, in_features), generator)
        return held_beside({"A": A, "B": kaiming_of_seed((out_features, self.r), generator)}, sites)


@dataclass(frozen=True, kw_only=True)
class VeraConfig(VectorsConfig):
    """VeRA's settings, named as in PEFT: W + (b * B) (d * A), of b [out], d [r], B [out, r] and A [r, in].

    B and A are one pair for all modules, as large as the largest of them asks, of which each uses the first rows and
    columns. They are drawn from `projection_prng_key`, and files hold them unless `save_projection` is False.
    https://arxiv.org/abs/2310.11454

    >>> import surgery, torch
    >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 6), "down": torch.nn.Linear(6, 3)})
    >>> model = surgery.inject(model, VeraConfig(r=2, target_modules=["up", "down"]))
    >>> [list(model["down"].vera_A["default"].shape), list(model["down"].vera_B["default"].shape)]
    [[2, 6], [6, 2]]
    >>> model["up"].vera_A["default"] is model["down"].vera_A["default"]
    True
    """

    peft_type: ClassVar[str] = "VERA"
    spellings: ClassVar[Mapping[str, Spelling]] = {f"vera_lambda_{role}": Spelling(role) for role in "bd"}
    shared: ClassVar[Mapping[str, str]] = {f"vera_{role}": role for role in "AB"}
    neutral: ClassVar[Mapping[str, Any]] = {}
    dropout_field = "vera_dropout"
    bias_of_adapted = "vera_only"

    vera_dropout: float = 0.0

    def method(self, name: str) -> "Vera":  # noqa: ARG002  # the same at all sites
        return Vera(1.0, self.r, self.vera_dropout, float(self.d_initial) if self.init_weights else None)


@dataclass(frozen=True)
class Vectors(Additive):
    """b is [out], d is [r]; A is [r, in] and B is [out, r], or larger."""

    r: int
    dropout: float = 0.0
    d_initial: float | None = 0.1  # None: b and d begin with effect, as PEFT has it without init_weights

    prefix: ClassVar[str]
    halves: ClassVar[int]  # as many times r are the rows of A, and the numbers of d; the first of them count

    @abstractmethod
    def hidden(self, h: Tensor, training: bool) -> Tensor:
        """[*batch, r] out of what d and A make of an input, [*batch, halves * r]."""

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear_or_conv1d(site, self.name)
        return _specs(self.prefix, self.r, self.halves, site.shape)

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        out_features, rows = site.shape[0], self.halves * self.r
        if self.d_initial is None:
            return {"b": torch.ones(out_features), "d": torch.randn(rows)}
        return {"b": torch.zeros(out_features), "d": torch.full((rows,), self.d_initial)}

    def matrices(self, p: Params, site: Site) -> Params:
        out_features, in_features = site.shape
        b, d = exact_float64(p["b"]).unsqueeze(1), exact_float64(p["d"][: self.r]).unsqueeze(1)  # [out, 1], [r, 1]
        B, A = exact_float64(p["B"][:out_features]), exact_float64(p["A"][: self.r, :in_features])
        # In float64 both are exact, where the factors have 24 bits or fewer.
        return {**p, "bB": b * B, "dA": d * A}

    def work_bytes(self, site: Site) -> int:
        return factor_bytes(site.shape, self.r)

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        return product(p["bB"], p["dA"], tile, self.scaling)

    def directions(self, p: Params) -> Tensor:
        return p["dA"]

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # As LoRA's, with two more operations rounded: b * B and d * A.
        unit = unit_of(*(p[role] for role in "bdAB"))
        return abs(self.scaling) * product_spread(p["bB"][tile[0]], p["dA"][:, tile[1]], unit, 2)

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        below, b = run(x), p["b"]
        A, B = p["A"][:, : x.shape[-1]].to(x.device), p["B"][: len(b)].to(x.device)  # of layers on several devices
        x = in_dtype_of(A, x)
        if training and self.dropout:
            x = F.dropout(x, self.dropout)
        moved = op.mix(self.hidden(op.apply(x, A) * p["d"], training), B)
        if torch.compiler.is_compiling() or not below.dtype == moved.dtype == b.dtype:
            return below + self.scaling * (b * moved)
        return torch.addcmul(below, moved, b, value=self.scaling)


@dataclass(frozen=True)
class Vera(Vectors):
    """W + (b * B) (d * A)."""

    name = "VeRA"
    prefix = "vera"
    halves = 1

    def hidden(self, h: Tensor, training: bool) -> Tensor:  # noqa: ARG002  # the same in both
        return h


@lru_cache
def _specs(prefix: str, r: int, halves: int, shape: tuple[int, int]) -> Mapping[str, Spec]:
    out_features, in_features = shape
    return {
        "b": Spec(f"{prefix}_lambda_b", (out_features,)),
        "d": Spec(f"{prefix}_lambda_d", (halves * r,)),
        "A": Spec(f"{prefix}_A", (halves * r, in_features), fixed=True, shared=True, longer=(1,)),
        "B": Spec(f"{prefix}_B", (out_features, r), fixed=True, shared=True, longer=(0,)),
    }
