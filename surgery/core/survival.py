"""Survival: how much of a change is left where a format cannot hold all of it, and what came beside it.

retained = <dW, d> / <d, d> and noise = |dW - retained d| / |d|, of the change d that was wanted and dW that became of
it. Both are needed: of what is rounded by chance all seems retained, and the noise tells.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from torch import Tensor

from surgery.core.arithmetic import tree_sum
from surgery.errors import UsageError, printable


@dataclass(frozen=True)
class Bounds:
    """How much of a change has to be left, and how much may come beside it. UsageError for what is no number."""

    min_retained: float = 0.5
    max_noise: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("min_retained", self.min_retained), ("max_noise", self.max_noise)):
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise UsageError(f"{name} is {printable(value)!r}; a number is wanted, such as {getattr(Bounds, name)}")

    def admit(self, survival: "Survival") -> bool:
        return survival.retained >= self.min_retained and survival.noise <= self.max_noise

    def __str__(self) -> str:
        return f"retained from {self.min_retained:g} on and noise up to {self.max_noise:g}"


class Survival(NamedTuple):
    """Sums over elements, which add up over tiles and over weights; the last two over the outputs of probes."""

    wanted: float = 0.0  # <d, d>
    along: float = 0.0  # <dW, d>
    moved: float = 0.0  # <dW, dW>
    missed: float = 0.0  # |(dW - d) x|^2
    effect: float = 0.0  # |d x|^2

    @classmethod
    def of(cls, before: Tensor, wanted: Tensor, after: Tensor, probes: Tensor | None = None) -> "Survival":
        """All float64, of one shape [out, in]; `probes` are inputs x [in, n]."""
        d, moved = (wanted - before).flatten(), (after - before).flatten()
        sums = tree_sum(d * d), tree_sum(moved * d), tree_sum(moved * moved)
        if probes is None:
            return cls(*sums)
        outputs = ((one @ probes).flatten() for one in (after - wanted, wanted - before))
        return cls(*sums, *(tree_sum(one * one) for one in outputs))

    def plus(self, other: "Survival") -> "Survival":
        return Survival(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def retained(self) -> float:
        """1 where all is there, and where nothing was wanted."""
        return self.along / self.wanted if self.wanted else 1.0

    @property
    def noise(self) -> float:
        """In proportion to the change that was wanted."""
        if not self.wanted:
            return math.inf if self.moved else 0.0
        return math.sqrt(max(0.0, self.moved / self.wanted - self.retained**2))

    @property
    def output_error(self) -> float | None:
        """In proportion to the effect that was wanted on the outputs; None without probes."""
        return math.sqrt(self.missed / self.effect) if self.effect else None

    def __str__(self) -> str:
        error = "" if self.output_error is None else f", output error {self.output_error:.3g} of the effect"
        return f"retained {self.retained:.3g}, noise {self.noise:.3g}{error}"

    def to_json(self) -> dict[str, float | None]:
        """Six digits of each: the sums are taken by tiles."""
        found = {"retained": self.retained, "noise": self.noise}
        found |= {} if self.output_error is None else {"output_error": self.output_error}
        return {key: float(f"{value:.6g}") if math.isfinite(value) else None for key, value in found.items()}


def total(told: Mapping[str, Survival]) -> Survival:
    """Of all weights, added in the order of their names, whichever was measured first: the same bits each time."""
    return reduce(Survival.plus, (told[name] for name in sorted(told)), Survival())
