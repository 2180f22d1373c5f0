"""Treatment: what is done to a base besides laying adapters over it, as options say it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from surgery.codecs import FORMS
from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.as_peft import Arithmetic
from surgery.errors import UsageError, printable
from surgery.hosts.calibration import Calibration
from surgery.ops.linear import LAYOUTS

LIVE_FORMS = ("nf4", "nf4-double", "fp4", "fp4-double", "int8", "fp8_block")  # those that layers in memory hold, too
# Those that loaders read: transformers 5.23 loads no packed zero points, not even those of compressed-tensors itself.
HELD_IN = tuple(form for form in FORMS if form != "w4a16-asym")
_MOST_PROBES = 4096
ROUNDINGS = ("nearest", "feedback")
INTO = ("16bit", "keep", *HELD_IN)


@dataclass(frozen=True)
class Treatment:
    """What is done to a base besides laying adapters over it; all of it affects the bytes."""

    dtype: torch.dtype | None = None  # None keeps each tensor's own
    tied: Literal["refuse", "untie"] = "refuse"  # where an adapter changes one of two tied tensors
    ops: Mapping[str, str] = field(default_factory=dict)  # by the end of a site's name: linear or conv1d
    compute_dtype: torch.dtype | None = None  # what quantized weights are decoded to; None: as they are computed with
    into: str | None = None  # one of INTO: what weights are written as; None: 16bit where they are quantized
    fallback: str | None = None  # "16bit": so written is what would keep too little of its change there
    rounding: str | None = None  # "feedback": to other codes than the nearest, where the adapters' inputs ask for them
    base_as: str | None = None  # the form in which the adapters were trained over this plain base
    arithmetic: Arithmetic = "exact"
    calibration: Calibration | None = None  # inputs that tell what feedback is for; None: the adapters' own directions

    @classmethod
    def of(  # noqa: PLR0913, PLR0917  # one argument an option
        cls,
        dtype: str | torch.dtype | None = None,
        tied: str = "refuse",
        ops: Mapping[str, str] | None = None,
        compute_dtype: str | torch.dtype | None = None,
        into: str | None = None,
        base_as: str | None = None,
        arithmetic: str = "exact",
        fallback: str | None = None,
        rounding: str | None = None,
    ) -> "Treatment":
        """What the options of a call say. UsageError for a value that is none."""
        if tied not in ("refuse", "untie"):
            raise UsageError(f"tied is {printable(tied)!r}; refuse or untie is wanted")
        for name, op in (ops or {}).items():
            if op not in LAYOUTS:
                raise UsageError(f"op of {printable(name)} is {printable(op)!r}; one of {', '.join(LAYOUTS)} is wanted")
        untie: Literal["refuse", "untie"] = "untie" if tied == "untie" else "refuse"
        if into not in (None, *INTO):
            raise UsageError(f"into is {printable(into)!r}; one of {', '.join(INTO)} is wanted")
        if base_as not in (None, *FORMS):
            raise UsageError(f"base_as is {printable(base_as)!r}; one of {', '.join(FORMS)} is wanted")
        how = check_arithmetic(arithmetic)
        if into in HELD_IN and (how != "exact" or base_as is not None):
            raise UsageError(f"into is {into!r}: it takes no base_as, and exact arithmetic alone; leave the others out")
        if base_as is not None and how != "exact":
            raise UsageError(f"base_as is given, and arithmetic is {how!r}; PEFT merges no such base so; leave one out")
        _check_fallback(fallback, into)
        if rounding not in (None, *ROUNDINGS):
            raise UsageError(f"rounding is {printable(rounding)!r}; one of {', '.join(ROUNDINGS)} is wanted")
        if rounding is not None and into in (None, "16bit"):
            raise UsageError("rounding is for merges into a format; give into, or leave it out")
        return cls(
            check_dtype(dtype),
            untie,
            dict(ops or {}),
            check_dtype(compute_dtype),
            into,
            fallback,
            None if rounding == ROUNDINGS[0] else rounding,
            base_as,
            how,
        )

    def calibrated_by(self, calibration: Calibration) -> "Treatment":
        """With inputs that tell what feedback is for. UsageError where none is asked for."""
        if self.rounding != "feedback":
            raise UsageError("calibration is for rounding 'feedback'; give that too, or leave it out")
        return replace(self, calibration=calibration)

    def to_json(self) -> dict[str, Any]:
        told = {"arithmetic": self.arithmetic, "dtype": _word(self.dtype), "tied": self.tied}
        more: dict[str, Any] = {"compute_dtype": _word(self.compute_dtype), "into": self.into, "base_as": self.base_as}
        more |= {"fallback": self.fallback, "rounding": self.rounding}
        more |= {} if self.calibration is None else {"calibration": dict(self.calibration.sha256)}
        kept = {key: value for key, value in more.items() if value is not None}
        return told | {"ops": dict(sorted(self.ops.items()))} | kept


def _check_fallback(fallback: str | None, into: str | None) -> None:
    if fallback == "int8":
        raise UsageError(
            f"fallback int8: a config.json names one format, and no loader reads int8 beside {printable(into)}; "
            "give fallback 16bit, or into int8"
        )
    if fallback not in (None, "16bit"):
        raise UsageError(f"fallback is {printable(fallback)!r}; 16bit is wanted")
    if fallback is not None and into in (None, "16bit"):
        raise UsageError("fallback is for merges into a format; give into, or leave it out")


def check_probes(probes: object) -> int:
    """UsageError for no number of inputs."""
    if not isinstance(probes, int) or not 0 <= probes <= _MOST_PROBES:
        raise UsageError(f"probes is {printable(probes)!r}; a number of inputs up to {_MOST_PROBES} is wanted")
    return probes


def check_arithmetic(arithmetic: object) -> Arithmetic:
    """UsageError for one that is not known."""
    known: tuple[Arithmetic, ...] = get_args(Arithmetic)
    for one in known:
        if one == arithmetic:
            return one
    raise UsageError(f"arithmetic is {printable(arithmetic)!r}; one of {', '.join(known)} is wanted")


def check_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """The plain dtype of that name. UsageError for another."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in PLAIN_DTYPES}
    if name is None or name in PLAIN_DTYPES:
        return name if isinstance(name, torch.dtype) else None
    if name not in known:
        raise UsageError(f"dtype {printable(name)!r} is not known; one of {', '.join(known)} is wanted")
    return known[str(name)]


def _word(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
