"""Elementwise: a merge as steps that treat each element by itself, so that it can be undone and searched."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Elementwise(ABC):
    """What a merge does to each element by itself; `values` are [out, in] of a tile, or broadcast over it.

    It never decreases in w, or where `falls` never increases. Zeros count by their sign.
    """

    values: Tensor

    adds: ClassVar[bool] = False  # is it w + values?

    @abstractmethod
    def apply(self, w: Tensor) -> Tensor: ...

    @abstractmethod
    def onto(self, w: Tensor) -> Tensor:
        """`apply` in the memory of w, which is float64 and as large as the values: a pass takes what it touches."""

    @abstractmethod
    def undo(self, w: Tensor) -> Tensor: ...

    @abstractmethod
    def falls(self) -> Tensor | None:
        """Where it turns the order round; None where nowhere."""

    @abstractmethod
    def reach(self, size: Tensor) -> Tensor:
        """Before the step, of what is at most `size` after it: bounds all that float64 rounds, times 2^53."""

    @abstractmethod
    def carried(self, error: Tensor) -> Tensor:
        """What an error of its input becomes."""

    @abstractmethod
    def after(self, values: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """What it makes of w * values + added, in the same form."""

    @abstractmethod
    def rounded(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """What a plain merge rounds, by magnitude: what it holds in the weight's dtype, and its outcome."""

    def seen(self, view: Callable[[Tensor], Tensor]) -> Self:
        """The same with another view of its values."""
        return replace(self, values=view(self.values))

    def at(self, where: Tensor) -> Self:
        """The same for the elements at flat positions `where`."""
        return self.seen(lambda values: values.flatten().index_select(0, where))


@dataclass(frozen=True)
class Shift(Elementwise):
    """w + values."""

    held: Tensor | None = None  # what a plain merge rounds on the way to them, by magnitude, if more than them

    adds = True

    def apply(self, w: Tensor) -> Tensor:
        return w + self.values

    def onto(self, w: Tensor) -> Tensor:
        return w.add_(self.values)

    def undo(self, w: Tensor) -> Tensor:
        return w - self.values

    def falls(self) -> None:
        return None

    def reach(self, size: Tensor) -> Tensor:
        return size.add_(self.values.abs())

    def carried(self, error: Tensor) -> Tensor:
        return error

    def after(self, values: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        return values, added + self.values

    def rounded(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        return self.values if self.held is None else self.held, before.abs().maximum(after.abs())

    def seen(self, view: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, values=view(self.values), held=None if self.held is None else view(self.held))


@dataclass(frozen=True)
class Scale(Elementwise):
    """w * values. Where a value is zero, nothing but its sign is left of w."""

    def apply(self, w: Tensor) -> Tensor:
        return w * self.values

    def onto(self, w: Tensor) -> Tensor:
        return w.mul_(self.values)

    def undo(self, w: Tensor) -> Tensor:
        return w / self.values

    def falls(self) -> Tensor | None:
        falls = torch.signbit(self.values)
        return falls if bool(falls.any()) else None

    def reach(self, size: Tensor) -> Tensor:
        # The floor stands for what float64 rounds below its normal range.
        return size.add_(_FLOOR).div_(self.values.abs()).add_(_FLOOR)

    def carried(self, error: Tensor) -> Tensor:
        return error * self.values.abs()

    def after(self, values: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        return values * self.values, added * self.values

    def rounded(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002  # as Shift's
        return after, after


@dataclass(frozen=True)
class Affine(Elementwise):
    """w * values + added. Where a value is zero, nothing is left of w."""

    added: Tensor

    def apply(self, w: Tensor) -> Tensor:
        return w * self.values + self.added

    def onto(self, w: Tensor) -> Tensor:
        return w.mul_(self.values).add_(self.added)

    def undo(self, w: Tensor) -> Tensor:
        return (w - self.added) / self.values

    def falls(self) -> Tensor | None:
        return Scale(self.values).falls()

    def reach(self, size: Tensor) -> Tensor:
        return Scale(self.values).reach(size.add_(self.added.abs())).mul_(2)  # of two operations

    def carried(self, error: Tensor) -> Tensor:
        return error * self.values.abs()

    def after(self, values: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        return values * self.values, added * self.values + self.added

    def rounded(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        # Half an ulp of four times as much is what rounding both, and their product, may come to.
        return 4 * ((before * self.values).abs() + self.added.abs()), after

    def seen(self, view: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, values=view(self.values), added=view(self.added))


@dataclass(frozen=True)
class Growth(Elementwise):
    """w + base * values + added, of the base before any step; where it is the first, w * (1 + values) + added.

    See `chained`.
    """

    added: Tensor | None = None  # nothing
    terms: Tensor | None = None  # what is added by the magnitudes that it is a sum of, if these are more than it

    @property
    def _first(self) -> Scale | Affine:
        return Scale(1 + self.values) if self.added is None else Affine(1 + self.values, self.added)

    def apply(self, w: Tensor) -> Tensor:
        return self._first.apply(w)

    def onto(self, w: Tensor) -> Tensor:
        return self._first.onto(w)

    def undo(self, w: Tensor) -> Tensor:
        return self._first.undo(w)

    def falls(self) -> Tensor | None:
        return self._first.falls()

    def reach(self, size: Tensor) -> Tensor:
        return self._first.reach(size)

    def carried(self, error: Tensor) -> Tensor:
        return self._first.carried(error)

    def after(self, values: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        return values + self.values, added if self.added is None else added + self.added

    def rounded(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        return self._held(before), before.abs().maximum(after.abs())

    def seen(self, view: Callable[[Tensor], Tensor]) -> Self:
        others = {
            name: None if one is None else view(one) for name, one in (("added", self.added), ("terms", self.terms))
        }
        return replace(self, values=view(self.values), **others)

    def over(self, base: Tensor) -> Shift:
        """The same where the base is known, over whatever lies between."""
        grown = base * self.values
        return Shift(grown) if self.added is None else Shift(grown + self.added, self._held(base))

    def _held(self, base: Tensor) -> Tensor:
        grown = base * self.values
        if self.added is None:
            return grown
        # Each value and each number added is rounded, and their product and sum: four times u of the two magnitudes
        # at most, and half an ulp may be u / 2 of its number.
        return 8 * (grown.abs() + (self.added.abs() if self.terms is None else self.terms))


def chained(steps: Sequence[Elementwise]) -> list[Elementwise]:
    """Steps with the same outcome, none of which needs more than what the one before it gives.

    Up to the last that grows by the base over others they are one, for these may have left nothing of the base.
    """
    last = _last_over_others(steps)
    if not last:
        return list(steps)
    values, added = torch.ones_like(steps[0].values), torch.zeros_like(steps[0].values)
    for step in steps[: last + 1]:
        values, added = step.after(values, added)
    return [Affine(values, added), *steps[last + 1 :]]


def grounded(steps: Sequence[Elementwise], base: Tensor) -> list[Elementwise]:
    """A step for each of `steps`, over a base that is known: what one over others grows by is a shift then."""
    if not _last_over_others(steps):
        return list(steps)
    return [one.over(base) if at and isinstance(one, Growth) else one for at, one in enumerate(steps)]


def _last_over_others(steps: Sequence[Elementwise]) -> int:
    """0 where there is none."""
    return max((at for at, one in enumerate(steps) if isinstance(one, Growth)), default=0)


_FLOOR = 2.0**-1000
