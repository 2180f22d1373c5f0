"""Fidelity: how near an adapter that was made comes to what it stands for, site by site and in all."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from surgery.errors import printable
from surgery.procedures.checking.report import Case, CaseReport


@dataclass(frozen=True)
class Fidelity:
    """One site: its rank, ||exact||, and ||what was written - exact||, both Frobenius."""

    r: int
    exact_norm: float
    error_norm: float

    @property
    def relative_error(self) -> float | None:
        """None where the exact change is zero and the outcome is not."""
        return _ratio(self.error_norm, self.exact_norm)


@dataclass(frozen=True, repr=False)
class FidelityReport(CaseReport):
    """What was written, how, and how far it is from the exact change."""

    out: Path
    method: str
    sites: Mapping[str, Fidelity]

    title: ClassVar[str]
    columns: ClassVar = ("site", "verdict", "r", "relative error")

    @property
    @abstractmethod
    def reproducible(self) -> bool:
        """Whether another machine writes the same bits."""

    @property
    def relative_error(self) -> float | None:
        """Of all sites as one vector; None where the exact change is zero and the outcome is not."""
        errors = math.hypot(*(one.error_norm for one in self.sites.values()))
        return _ratio(errors, math.hypot(*(one.exact_norm for one in self.sites.values())))

    @property
    def counts(self) -> Mapping[str, int]:
        return {self.method: len(self.sites)}

    def cases(self) -> Iterator[Case]:
        """Every site."""
        for name, one in self.sites.items():
            yield Case(name, self.method, (str(one.r), _shown(one.relative_error)), listed=True)

    def summary(self) -> str:
        """One line."""
        error = _shown(self.relative_error)
        return f"{printable(self.out)}: {len(self.sites)} sites by {self.method}; relative error {error} in all"

    def to_json(self) -> dict[str, Any]:
        sites = {
            name: {"r": one.r, "exact_norm": one.exact_norm, "relative_error": one.relative_error}
            for name, one in self.sites.items()
        }
        return {
            "out": str(self.out),
            "method": self.method,
            "relative_error": self.relative_error,
            "reproducible": self.reproducible,
            "sites": sites,
        }


def _ratio(error: float, whole: float) -> float | None:
    if whole:
        return error / whole
    return None if error else 0.0


def _shown(error: float | None) -> str:
    return "of a change that is zero" if error is None else f"{error:.3g}"
