"""Recorded: what a merged folder tells of the options that it was made with."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack, cast

from surgery.core.option_checks import check_whole
from surgery.errors import FormatError, InputError, UsageError, printable, quoted
from surgery.procedures.planning.treatment import ROUNDINGS, Treatment, TreatmentOptions
from surgery.procedures.writing.receipt import read_receipt
from surgery.procedures.writing.small_files import RECEIPT

_DERIVED_BY = ("arithmetic", "base_as", "compute_dtype", "ops")


class Recorded(NamedTuple):
    """What a merge by surgery says that it was made with."""

    options: TreatmentOptions | None = None  # of _DERIVED_BY, as the treatment tells them; None: there is no receipt
    mha_out_proj_scale: int | None = None
    rounding: str | None = None
    calibration: Mapping[str, Any] = {}  # sha256 by file

    def treatment(self, **given: Unpack[TreatmentOptions]) -> tuple[Treatment, tuple[str, ...]]:
        """By the options of _DERIVED_BY that are given, else by the recorded ones; and what a report has to say of it.

        UsageError for a value that is none.
        """
        asked = {name: value for name, value in given.items() if value}
        found, recorded, said = Treatment.of(**given).to_json(), Treatment.of(**(self.options or {})).to_json(), []
        for name in _DERIVED_BY if self.options is not None else ():
            here, there = found.get(name), recorded.get(name)
            if name in asked and here != there:
                said.append(f"{name} {_words(here)} is given, and the receipt tells {_words(there)}")
            elif here != there:
                said.append(f"{name} {_words(there)} as the receipt tells")
        options: TreatmentOptions = {**(self.options or {}), **asked}  # type: ignore[typeddict-item]  # names of both
        try:
            return replace(Treatment.of(**options), rounding=self.rounding), tuple(said)
        except UsageError as error:  # neither alone is wrong
            raise UsageError(f"verify: beside what the receipt tells: {error}") from error

    def out_proj_scale(self, given: int | None) -> tuple[int | None, tuple[str, ...]]:
        """The `mha_out_proj_scale` that is given, else the recorded one; and what a report has to say of it."""
        there = self.mha_out_proj_scale
        if there is None or given == there:
            return given, ()
        if given is None:
            return there, (f"mha_out_proj_scale {there} as the receipt tells",)
        return given, (f"mha_out_proj_scale {given} is given, and the receipt tells {there}",)

    def require_calibration(self, treatment: Treatment) -> None:
        """UsageError unless the very inputs are given that it was rounded by."""
        given = {} if treatment.calibration is None else treatment.calibration.sha256
        if self.calibration and sorted(map(str, self.calibration.values())) != sorted(given.values()):
            names = ", ".join(map(printable, self.calibration))
            raise UsageError(
                f"verify: it was rounded by calibration inputs of {names}; give `calibration`, the same by sha256"
            )


@contextmanager
def told_beside(said: Collection[str]) -> Iterator[None]:
    """What was taken from a receipt is told with a refusal, for it may be what is wrong."""
    try:
        yield
    except InputError as error:
        for one in said:
            error.add_note(one)
        raise


def recorded(folder: Path) -> Recorded:
    """Nothing of what has no receipt. FormatError for one of options that are none."""
    if not (folder / RECEIPT).is_file():
        return Recorded()
    receipt = read_receipt(folder)
    options = receipt.get("options", {})
    if not isinstance(options, dict):
        raise FormatError(f"{printable(folder / RECEIPT)}: options is no table; was it edited?")
    scales = [one.get("mha_out_proj_scale") for one in receipt["adapters"] if isinstance(one, dict)]
    scale = next((one for one in scales if one is not None), None)
    rounding = "feedback" if options.get("rounding") == "feedback" else None
    calibration = options.get("calibration")
    derived: TreatmentOptions = _derived(options)
    if options.get("rounding") not in (None, *ROUNDINGS):
        raise FormatError(f"{printable(folder / RECEIPT)}: rounding is {quoted(options['rounding'])}; was it edited?")
    try:
        Treatment.of(**derived)
        if scale is not None:
            check_whole("`mha_out_proj_scale`", scale, 1, 2)
    except UsageError as error:
        raise FormatError(f"{printable(folder / RECEIPT)}: {error}; was it edited?") from error
    return Recorded(
        derived,
        scale,
        rounding,
        calibration if isinstance(calibration, dict) and rounding else {},
    )


def _derived(options: Mapping[str, Any]) -> TreatmentOptions:
    """Those of _DERIVED_BY."""
    found: Any = {name: options[name] for name in _DERIVED_BY if name in options}
    return cast(TreatmentOptions, found)


def _words(value: object) -> str:
    pairs = [f"{name}={one}" for name, one in value.items()] if isinstance(value, dict) else [value] if value else []
    return printable(", ".join(map(str, pairs)) or "none")
