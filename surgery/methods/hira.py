"""HiRA: W + W0 * (B A), by elements, of the base W0 before any adapter. https://openreview.net/forum?id=TwJrTz9cRS"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import exact_float64
from surgery.core.config import AdapterConfig
from surgery.core.elementwise import Growth
from surgery.core.method import AtStrength, Dense, Params, Product, Run
from surgery.core.op import Op, Tile, in_dtype_of, is_many
from surgery.core.rounding import ulp
from surgery.core.select import pattern_value
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.errors import ConfigError, MatchError, printable, quoted
from surgery.methods.field_values import check_count, check_counts, check_dropout
from surgery.methods.kaiming import kaiming
from surgery.methods.spreads import product_spread, unit_of

Init = bool | Literal["gaussian"] | None
_OPS = frozenset({"linear", "conv1d", "embedding", "convolution"})


@dataclass(frozen=True, kw_only=True)
class HiraConfig(AdapterConfig):
    """HiRA's settings, named as in PEFT: W + W0 * (B A), by elements, of A [r, in] and B [out, r].

    W0 is the base, also where other adapters lie between. https://openreview.net/forum?id=TwJrTz9cRS

    >>> HiraConfig(r=8, rank_pattern={"v_proj": 2}).method("layers.0.v_proj").r
    2
    """

    peft_type: ClassVar[str] = "HIRA"
    spellings: ClassVar[Mapping[str, Spelling]] = {
        "hira_A": Spelling("A"),
        "hira_B": Spelling("B"),
        "hira_embedding_A": Spelling("A", "embedding"),
        "hira_embedding_B": Spelling("B", "embedding"),
    }
    neutral: ClassVar[Mapping[str, Any]] = {}

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False  # read and written for PEFT; the op decides, see hosts
    init_weights: Init = True
    rank_pattern: Mapping[str, int] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_dropout("hira_dropout", self.hira_dropout)
        if self.init_weights is not None and self.init_weights not in (True, False, "gaussian"):
            raise ConfigError(f"init_weights is {quoted(self.init_weights)}; true, false, null or 'gaussian' is wanted")
        check_counts("rank_pattern", self.rank_pattern or {})

    def told(self, name: str) -> Mapping[str, float]:
        return {"r": self._rank(name)}

    def as_shaped(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Self:
        """PEFT gives a model's first adapter `r` everywhere, whatever its `rank_pattern` says."""
        return replace(self, rank_pattern={}) if {one["A"][0] for one in shapes.values()} == {self.r} else self

    def method(self, name: str) -> "Hira":
        return Hira(self._rank(name), self.hira_dropout, self.init_weights)

    def _rank(self, name: str) -> int:
        return pattern_value(self.rank_pattern or {}, name, self.r)


@dataclass(frozen=True)
class Hira(AtStrength):
    """A is [r, in], B is [out, r]; over a convolution [r, channels, *kernel] and [out, r, 1, ...].

    Over other adapters it adds to what they have made what it makes of the base, as several of its kind do in PEFT.
    """

    r: int
    dropout: float = 0.0
    start: Init = True

    name = "HiRA"
    of_base = True
    couples = frozenset()

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        op = site.acting
        if op.name not in _OPS or op.groups > 1 or op.alone:
            found = f"an {op.name}" if op.groups == 1 else f"a convolution in {op.groups} groups"
            raise MatchError(
                f"{printable(site.name)}: {found}; HiRA acts on Linear, Conv1D, Embedding and convolutions in one "
                "group, as in PEFT; exclude it"
            )
        out_features, in_features = site.shape
        a = (self.r, op.channels(in_features), *op.kernel)
        prefix = "hira_embedding_" if op.name == "embedding" else "hira_"
        return {
            "A": Spec(f"{prefix}A", a),
            "B": Spec(f"{prefix}B", (out_features, self.r, *(1 for _ in op.kernel))),
        }

    def matrices(self, p: Params, site: Site) -> Params:  # noqa: ARG002  # the shapes tell all
        return {role: values.flatten(1) for role, values in p.items()}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        A, B = (torch.zeros(spec.shape) for spec in self.tensors(site).values())
        if site.acting.name == "embedding":  # as PEFT, to whom null means the same as true there
            B.normal_()
            return {"A": A.normal_() if self.start is False else A, "B": B}
        if not self.start:
            return {"A": A.normal_(), "B": B.normal_()}
        if self.start == "gaussian" and not site.acting.kernel:  # which PEFT heeds over no convolution
            A.normal_(std=1 / self.r)
        else:
            A = kaiming(A.shape)
        return {"A": A, "B": B}

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        return base._replace(weight=self.steps(p, tile, product).apply(base.weight))

    def steps(self, p: Params, tile: Tile, product: Product) -> Growth:
        return Growth(product(p["B"], p["A"], tile, self.strength))

    def spread(self, p: Params, tile: Tile) -> Tensor:
        return torch.zeros_like(p["A"][:1, tile[1]], dtype=torch.float64)  # all is in proportion to the base

    def spread_over(self, base: Tensor, outcome: Tensor, p: Params, tile: Tile, dtype: torch.dtype) -> Tensor:  # noqa: ARG002  # as others'
        # As LoRA's, and half an ulp of B A in the weight's dtype. PEFT adds two such up before it multiplies: their
        # sum, of twice the larger at most, is off by an ulp of that more.
        A, B = exact_float64(p["A"][:, tile[1]]), exact_float64(p["B"][tile[0]])
        moved = self.strength * (B @ A)  # [out, in]
        off = abs(self.strength) * product_spread(B, A, unit_of(p["A"], p["B"])) + 1.5 * ulp(moved, dtype)
        return off * base.abs()

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        A, B = p["A"].flatten(1), p["B"].flatten(1)
        B = B if self.strength == 1 else B * self.strength
        if op.name == "embedding":  # an input chooses one column of both, so that no other is made
            return run(x) + op.apply(x, run.base().weight) * op.mix(F.embedding(x, A.T), B)
        grown, drops = B @ A, training and self.dropout > 0  # [out, in]
        # One pass less over a large input is worth more than one over the weight.
        plain = run.plain() if is_many(x) and not drops else None
        if plain is not None and plain.weight.dtype == grown.dtype == x.dtype:
            return op.apply(x, torch.addcmul(plain.weight, plain.weight, grown), plain.bias)
        below, grown = run(x), run.base().weight * grown
        x = in_dtype_of(grown, x)
        return below + op.apply(F.dropout(x, self.dropout) if drops else x, grown)
