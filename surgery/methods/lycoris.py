"""What LoHa and LoKr share, which PEFT took from LyCORIS: fields, dropouts, and factors that may be products."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.core.arithmetic import exact_float64
from surgery.core.config import AdapterConfig
from surgery.core.method import Params, Product
from surgery.core.op import WHOLE
from surgery.core.select import pattern_value
from surgery.core.site import Site
from surgery.errors import MatchError, printable
from surgery.methods.field_values import check_count, check_counts, check_dropout, check_number, check_numbers
from surgery.methods.spreads import product_spread, unit_of

Rows = slice | Tensor  # of a matrix, or their indices


@dataclass(frozen=True, kw_only=True)
class LycorisConfig(AdapterConfig):
    """The settings of both, named as in PEFT; the scaling is alpha / r."""

    neutral: ClassVar[Mapping[str, Any]] = {}

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0  # how often training leaves out an output of the delta
    module_dropout: float = 0.0  # how often it leaves out the delta of a layer
    use_effective_conv2d: bool = False  # Tucker's form of a convolution's kernel
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_number("alpha", self.alpha)
        check_dropout("rank_dropout", self.rank_dropout)
        check_dropout("module_dropout", self.module_dropout)
        check_counts("rank_pattern", self.rank_pattern)
        check_numbers("alpha_pattern", self.alpha_pattern)

    def told(self, name: str) -> Mapping[str, float]:
        return dict(zip(("r", "alpha"), self.numbers(name), strict=True))

    def numbers(self, name: str) -> tuple[int, float]:
        """r and alpha of a site."""
        alpha = pattern_value(self.alpha_pattern, name, float(self.alpha))
        return pattern_value(self.rank_pattern, name, self.r), alpha


@dataclass(frozen=True)
class Dropouts:
    """What training leaves out of a delta."""

    rank: float = 0.0
    module: float = 0.0
    scaled: bool = True  # does what is left of a delta count for what is gone?

    def kept(self, outputs: int, like: Tensor) -> Tensor | None:
        """[out]: what the outputs of the delta are multiplied by, drawn anew; None for none."""
        found = None
        if self.module:
            found = (torch.rand(1, device=like.device) > self.module).to(like.dtype).expand(outputs)
        if self.rank:
            left = (torch.rand(outputs, device=like.device) > self.rank).to(like.dtype)
            if self.scaled:  # where none is left PEFT divides by 0
                left = left / left.mean().clamp(min=1 / outputs)
            found = left if found is None else found * left
        return found


NONE = Dropouts()


def check_op(site: Site, name: str) -> None:
    """MatchError for an op that PEFT's layers of this method do not act on."""
    op = site.acting
    if op.name == "linear" or (op.name == "convolution" and len(op.kernel) < 3):
        return
    axes = f" over {len(op.kernel)} axes" if op.kernel else ""
    raise MatchError(
        f"{printable(site.name)}: its op is {op.name}{axes}; {name} acts on Linear, Conv1d and Conv2d, as in PEFT; "
        "exclude it"
    )


def is_tucker(kernel: tuple[int, ...]) -> bool:
    """Has it more than one place, so that `use_effective_conv2d` is heeded?"""
    return max(kernel, default=1) > 1


def as_matrices(p: Params) -> Params:
    """Factors as `factor` takes them: each of [out, in], [out, r] or [r, in]; Tucker's core t as [r, r * places]."""
    tucker = {f"w{role[1:]}_a" for role in p if role.startswith("t")}
    return {role: values.T if role in tucker else values.flatten(1) for role, values in p.items()}


def factor(p: Params, one: str, rows: Rows, product: Product) -> Tensor:
    """Rows of w1 or w2 (`one` is "1" or "2"), [rows, in]: w, or a b, or by Tucker's form a t b in each place."""
    if f"w{one}" in p:
        return product.held(p[f"w{one}"][rows], f"w{one}")
    a, b, t = p[f"w{one}_a"][rows], p[f"w{one}_b"], p.get(f"t{one}")
    if t is None:
        return product(a, b, WHOLE, 1.0)
    mixed = by_place(product(a, t, WHOLE, 1.0), len(b))
    return over_places(product(mixed, b, WHOLE, 1.0), len(a))


def by_place(mixed: Tensor, r: int) -> Tensor:
    """[rows, r * places] -> [rows * places, r]"""
    return mixed.view(len(mixed), r, -1).mT.reshape(-1, r)


def over_places(values: Tensor, rows: int) -> Tensor:
    """[rows * places, in] -> [rows, in * places]"""
    return values.view(rows, -1, values.shape[1]).mT.flatten(1)


def factor_spread(p: Params, one: str, rows: Rows) -> Tensor:
    """Of `factor`, [rows, in], or what broadcasts over it: how far two correct ones may lie apart."""
    if f"w{one}" in p:
        return torch.zeros((), dtype=torch.float64, device=exact_float64(p[f"w{one}"][:0]).device)
    a, b, t = (exact_float64(p[role]).abs() if role in p else None for role in (f"w{one}_a", f"w{one}_b", f"t{one}"))
    assert a is not None
    assert b is not None
    a, unit = a[rows], unit_of(*p.values())
    if t is None:
        return _apart(a, torch.zeros_like(a), b, unit)
    off = by_place(_apart(a, torch.zeros_like(a), t, unit), len(b))
    return over_places(_apart(by_place(a @ t, len(b)), off, b, unit), len(a))


def _apart(B: Tensor, off: Tensor, A: Tensor, unit: float) -> Tensor:
    """Of two products of B, which may be `off` by so much, and A, both as magnitudes: what B carries besides."""
    return off @ A + product_spread(B + off, A, unit)
