"""Recorded: what a merged folder tells of the options that it was made with."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from surgery.errors import UsageError, printable
from surgery.procedures.planning.treatment import Treatment, TreatmentOptions
from surgery.procedures.writing.receipt import read_receipt
from surgery.procedures.writing.small_files import RECEIPT

_DERIVED_BY = ("arithmetic", "base_as", "compute_dtype", "ops")


class Recorded(NamedTuple):
    """What a merge by surgery says that it was made with."""

    options: Mapping[str, Any] | None = None  # of _DERIVED_BY, as the treatment tells them; None: there is no receipt
    mha_out_proj_scale: int | None = None
    rounding: str | None = None
    calibration: Mapping[str, Any] = {}  # sha256 by file

    def treatment(self, **given: Unpack[TreatmentOptions]) -> tuple[Treatment, tuple[str, ...]]:
        """By the options of _DERIVED_BY that are given, else by the recorded ones; and what a report has to say of it.

        UsageError for a value that is none.
        """
        asked = {name: value for name, value in given.items() if value}
        told, said = Treatment.of(**given).to_json(), []
        for name in _DERIVED_BY if self.options is not None else ():
            here, there = told.get(name), (self.options or {}).get(name)
            if name in asked and here != there:
                said.append(f"{name} {_words(here)} is given, and the receipt tells {_words(there)}")
            elif here != there:
                said.append(f"{name} {_words(there)} as the receipt tells")
        options: TreatmentOptions = {**(self.options or {}), **asked}  # type: ignore[typeddict-item]  # names of both
        return replace(Treatment.of(**options), rounding=self.rounding), tuple(said)

    def require_calibration(self, treatment: Treatment) -> None:
        """UsageError unless the very inputs are given that it was rounded by."""
        given = {} if treatment.calibration is None else treatment.calibration.sha256
        if self.calibration and sorted(map(str, self.calibration.values())) != sorted(given.values()):
            names = ", ".join(map(printable, self.calibration))
            raise UsageError(
                f"verify: it was rounded by calibration inputs of {names}; give `calibration`, the same by sha256"
            )


def recorded(folder: Path) -> Recorded:
    """Nothing of what has no receipt."""
    if not (folder / RECEIPT).is_file():
        return Recorded()
    receipt = read_receipt(folder)
    options = receipt.get("options")
    options = options if isinstance(options, dict) else {}
    scales = [one.get("mha_out_proj_scale") for one in receipt["adapters"] if isinstance(one, dict)]
    rounding = "feedback" if options.get("rounding") == "feedback" else None
    calibration = options.get("calibration")
    return Recorded(
        {name: options[name] for name in _DERIVED_BY if _is_spelled(options.get(name))},
        next((one for one in scales if one is not None), None),
        rounding,
        calibration if isinstance(calibration, dict) and rounding else {},
    )


def _is_spelled(value: object) -> bool:
    """Is it a value of an option, as a receipt has it?"""
    values = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(one, str) for one in values)


def _words(value: object) -> str:
    pairs = [f"{name}={one}" for name, one in value.items()] if isinstance(value, dict) else [value] if value else []
    return printable(", ".join(map(str, pairs)) or "none")
