"""Treatment: what is done to a base besides laying adapters over it, as options say it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypedDict, Unpack, cast, get_args

import torch

from surgery.codecs import FORMS
from surgery.codecs.formats import UNMADE_FORMS
from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.as_peft import Arithmetic
from surgery.core.names import nearest
from surgery.core.option_checks import check_whole
from surgery.core.survival import Bounds
from surgery.errors import UsageError, printable, quoted
from surgery.hosts.calibration import Calibration
from surgery.ops.linear import LAYOUTS

LIVE_FORMS = ("nf4", "nf4-double", "fp4", "fp4-double", "int8", "fp8_block")  # those that layers in memory hold, too
# Those that loaders read: transformers 5.23 loads no packed zero points, not even those of compressed-tensors itself.
HELD_IN = tuple(form for form in FORMS if form != "w4a16-asym")
# What may well be asked for and is not made, by option and value, and why.
UNMADE: Mapping[tuple[str, str], str] = {
    **{(option, form): why for option in ("into", "base_as") for form, why in UNMADE_FORMS.items()},
    ("into", "mxfp4"): "kernels for GPUs make it, whose codes could not be compared with any here; give mxfp4a16, or "
    "'keep' for a base in mxfp4",
    ("into", "w4a16-asym"): "transformers loads no packed zero points; give w4a16",
    ("fallback", "int8"): "a config.json names one format, and no loader reads int8 beside another; give "
    "`fallback=16bit`, or `into=int8`",
}
_MOST_PROBES = 4096
ROUNDINGS = ("nearest", "feedback")
INTO = ("16bit", "keep", *HELD_IN)


class TreatmentOptions(TypedDict, total=False):
    """How the options of a call spell a Treatment."""

    dtype: str | torch.dtype | None
    tied: str
    ops: Mapping[str, str] | None
    compute_dtype: str | torch.dtype | None
    into: str | None
    fallback: str | None
    rounding: str | None
    base_as: str | None
    arithmetic: str | None


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
    def of(cls, **options: Unpack[TreatmentOptions]) -> "Treatment":
        """What the options of a call say; None is as if it were left out. UsageError for a value that is none."""
        for name in options.keys() - _READ.keys():
            close = ", ".join(nearest(name, _READ))
            raise UsageError(f"option {quoted(name)} is not known; nearest: {close}; help() of the function tells")
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        found = cls(**{name: _READ[name](value) for name, value in given.items()})
        found._refuse_clashes()
        return found if found.rounding != ROUNDINGS[0] else replace(found, rounding=None)

    def _refuse_clashes(self) -> None:
        """UsageError for options that do not go together."""
        into, how = self.into, self.arithmetic
        if into in HELD_IN and (how != "exact" or self.base_as is not None):
            raise UsageError(f"`into={into}` takes no `base_as`, and exact `arithmetic` alone; leave the others out")
        if self.base_as is not None and how != "exact":
            raise UsageError(f"`base_as` is given, and `arithmetic={how}`; PEFT merges no such base so; leave one out")
        for name, value in (("fallback", self.fallback), ("rounding", self.rounding)):
            if value is not None and into in (None, "16bit"):
                raise UsageError(f"`{name}` is for merges into a format; give `into`, or leave it out")

    def calibrated_by(self, calibration: Calibration) -> "Treatment":
        """With inputs that tell what feedback is for. UsageError where none is asked for."""
        if self.rounding != "feedback":
            raise UsageError("`calibration` is for `rounding=feedback`; give that too, or leave it out")
        return replace(self, calibration=calibration)

    def bounds(self, min_retained: float | None, max_noise: float | None, probes: int = 0) -> Bounds:
        """What has to be left of a change; None is as usual. UsageError where nothing can be lost."""
        given = {"min_retained": min_retained, "max_noise": max_noise}
        told = {name: value for name, value in given.items() if value is not None}
        for name in (*told, *(["probes"] if probes else [])):
            if self.into in (None, "16bit"):
                raise UsageError(
                    f"`{name}` is for merges into a format, which 16 bits are not; give `into`, or leave it out"
                )
        return Bounds(**told)

    def to_json(self) -> dict[str, Any]:
        told = {"arithmetic": self.arithmetic, "dtype": _word(self.dtype), "tied": self.tied}
        more: dict[str, Any] = {"compute_dtype": _word(self.compute_dtype), "into": self.into, "base_as": self.base_as}
        more |= {"fallback": self.fallback, "rounding": self.rounding}
        more |= {} if self.calibration is None else {"calibration": dict(self.calibration.sha256)}
        kept = {key: value for key, value in more.items() if value is not None}
        return told | {"ops": dict(sorted(self.ops.items()))} | kept


def check_probes(probes: object) -> int:
    """UsageError for no number of inputs."""
    return check_whole("`probes`", probes, 0, _MOST_PROBES)


def check_arithmetic(arithmetic: object) -> Arithmetic:
    """UsageError for one that is not known."""
    return cast(Arithmetic, _one_of("arithmetic", get_args(Arithmetic), arithmetic))


def _check_dtype(option: str, name: object) -> torch.dtype:
    """The plain dtype of that name. UsageError for another."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in PLAIN_DTYPES}
    found = name if isinstance(name, torch.dtype) else known.get(name) if isinstance(name, str) else None
    if found not in PLAIN_DTYPES:
        raise UsageError(f"`{option}` is {quoted(name)}; one of {', '.join(known)} is wanted")
    return found


def _check_ops(ops: object) -> Mapping[str, str]:
    if not isinstance(ops, Mapping):
        raise UsageError(f"`ops` is {quoted(ops)}; a layout by name is wanted, such as {{'q_proj': 'linear'}}")
    for name, op in ops.items():
        if op not in LAYOUTS:
            raise UsageError(f"`ops`: {quoted(op)} for {printable(name)}; one of {', '.join(LAYOUTS)} is wanted")
    return dict(ops)


def _one_of(option: str, known: Sequence[str], value: object) -> str:
    """The value, which is one that is known. UsageError for another, with the reason where it may well be asked for."""
    if value in known:
        return str(value)
    if why := UNMADE.get((option, str(value))):
        raise UsageError(f"`{option}={value}`: {why}")
    wanted = known[0] if len(known) == 1 else f"one of {', '.join(known)}"
    raise UsageError(f"`{option}` is {quoted(value)}; {wanted} is wanted")


_READ: Mapping[str, Callable[[Any], Any]] = {
    "dtype": partial(_check_dtype, "dtype"),
    "tied": partial(_one_of, "tied", ("refuse", "untie")),
    "ops": _check_ops,
    "compute_dtype": partial(_check_dtype, "compute_dtype"),
    "into": partial(_one_of, "into", INTO),
    "base_as": partial(_one_of, "base_as", tuple(FORMS)),
    "arithmetic": check_arithmetic,
    "fallback": partial(_one_of, "fallback", ("16bit",)),
    "rounding": partial(_one_of, "rounding", ROUNDINGS),
}


def _word(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
