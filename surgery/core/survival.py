"""Survival: how much of a change is left where a format cannot hold all of it, and what came beside it.

retained = <dW, d> / <d, d> and noise = |dW - retained d| / |d|, of the change d that was wanted and dW that became of
it. Both are needed: of what is rounded by chance all seems retained, and the noise tells.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.core.arithmetic import EXPONENT_LIMIT, ExactProduct
from surgery.core.option_checks import is_finite, is_number
from surgery.core.sums import exact_sum, row_sums
from surgery.errors import UsageError, ValueRangeError, quoted

Sum = Fraction | float
_NO_NUMBERS = ("nan", "inf", "-inf")
_TOGETHER = 1 << 18  # elements that are looked at together: what is made of them stays in the cache


@dataclass(frozen=True)
class Bounds:
    """How much of a change has to be left, and how much may come beside it. UsageError for what is no number."""

    min_retained: float = 0.5
    max_noise: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("min_retained", self.min_retained), ("max_noise", self.max_noise)):
            if not (is_finite(value) or (is_number(value) and abs(value) == math.inf)):
                raise UsageError(f"`{name}` is {quoted(value)}; a number is wanted, such as {getattr(Bounds, name)}")

    def admit(self, survival: "Survival") -> bool:
        return survival.retained >= self.min_retained and survival.noise <= self.max_noise

    def __str__(self) -> str:
        return f"retained from {self.min_retained:g} on and noise up to {self.max_noise:g}"


class Survival(NamedTuple):
    """Sums over elements, which add up over tiles and over weights; the last two over the outputs of probes.

    The sum of a row is taken in a fixed order, and the sums of rows are added exactly: so the same figures come of any
    tiles, threads and machines. A sum is a float where something is no finite number.
    """

    wanted: Sum = Fraction()  # <d, d>
    along: Sum = Fraction()  # <dW, d>
    moved: Sum = Fraction()  # <dW, dW>
    missed: Sum = Fraction()  # |(dW - d) x|^2
    effect: Sum = Fraction()  # |d x|^2

    @classmethod
    def of(cls, before: Tensor, wanted: Tensor, after: Tensor, probes: Tensor | None = None) -> "Survival":
        """All float64, of one shape [out, in]; `probes` are inputs x [in, n]."""
        columns = max(1, math.prod(before.shape[1:]))
        before, wanted, after = (one.reshape(-1, columns) for one in (before, wanted, after))
        together = max(1, _TOGETHER // columns)
        parts = zip(*(torch.split(one, together) for one in (before, wanted, after)), strict=True)
        sums = [torch.cat(rows) for rows in zip(*(_rows(*part) for part in parts), strict=True)]
        if probes is not None:
            product = ExactProduct()  # which keeps the grid of the probes
            outputs = (_outputs(change, probes, product) for change in (after - wanted, wanted - before))
            sums += [row_sums(one * one) for one in outputs]
        return cls(*map(exact_sum, sums))

    @classmethod
    def read(cls, told: Sequence[str]) -> "Survival":
        """What `words` tells."""
        return cls(*(float(one) if one in _NO_NUMBERS else Fraction(one) for one in told))

    def words(self) -> list[str]:
        """The sums, exactly."""
        return [str(one) for one in self]

    def plus(self, other: "Survival") -> "Survival":
        return Survival(*map(_plus, self, other))

    @property
    def retained(self) -> float:
        """1 where all is there, and where nothing was wanted."""
        return _float(_ratio(self.along, self.wanted)) if self.wanted else 1.0

    @property
    def noise(self) -> float:
        """In proportion to the change that was wanted."""
        if not self.wanted:
            return math.inf if self.moved else 0.0
        along = _ratio(self.along, self.wanted)
        square = _float(_plus(_ratio(self.moved, self.wanted), -along * along))
        return 0.0 if square < 0 else math.sqrt(square)  # NaN stays NaN, which nothing admits

    @property
    def output_error(self) -> float | None:
        """In proportion to the effect that was wanted on the outputs; None without probes."""
        return math.sqrt(_float(_ratio(self.missed, self.effect))) if self.effect else None

    def __str__(self) -> str:
        error = "" if self.output_error is None else f", output error {self.output_error:.3g} of the effect"
        return f"retained {self.retained:.3g}, noise {self.noise:.3g}{error}"

    def to_json(self) -> dict[str, float | None]:
        """Six digits of each."""
        found = {"retained": self.retained, "noise": self.noise}
        found |= {} if self.output_error is None else {"output_error": self.output_error}
        return {key: float(f"{value:.6g}") if math.isfinite(value) else None for key, value in found.items()}


def _rows(before: Tensor, wanted: Tensor, after: Tensor) -> tuple[Tensor, ...]:
    """The first three sums, by rows, [rows]."""
    d, moved = wanted - before, after - before
    return row_sums(d * d), row_sums(moved * d), row_sums(moved * moved)


def _outputs(change: Tensor, probes: Tensor, product: ExactProduct) -> Tensor:
    """[rows, n], to the 22 bits of an exact product; infinities where it holds no row, zeros where one is too small.

    Of each row by itself: what it takes of others it takes of these too.
    """
    try:
        return product(change, probes)
    except ValueRangeError:
        largest, most = change.abs().amax(1, keepdim=True), 2.0**EXPONENT_LIMIT
        held = torch.where((largest < most) & (largest >= 0.5 / most), change, 0)
        return product(held, probes) + torch.where(largest < most, 0, math.inf)


def _plus(a: Sum, b: Sum) -> Sum:
    """What is no finite number stays so: a float is never one, and a rational may be beyond every float."""
    if isinstance(a, Fraction):
        return a + b if isinstance(b, Fraction) else b
    return a if isinstance(b, Fraction) else a + b


def _ratio(a: Sum, b: Sum) -> Sum:
    """NaN where either is no finite number: a sum that float64 does not hold tells nothing of the other's part."""
    return a / b if isinstance(a, Fraction) and isinstance(b, Fraction) else math.nan


def _float(ratio: Sum) -> float:
    """Rounded once."""
    try:
        return float(ratio)
    except OverflowError:
        return math.inf if ratio > 0 else -math.inf


def total(told: Mapping[str, Survival]) -> Survival:
    """Of all weights, added in the order of their names, whichever was measured first: the same bits each time."""
    return reduce(Survival.plus, (told[name] for name in sorted(told)), Survival())
