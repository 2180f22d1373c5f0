"""Recorded: what a merged folder tells of the options that it was made with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from surgery.errors import UsageError, printable
from surgery.procedures.planning.treatment import Treatment
from surgery.procedures.writing.receipt import read_receipt
from surgery.procedures.writing.small_files import RECEIPT


class Recorded(NamedTuple):
    """What a merge by surgery says that it was made with."""

    arithmetic: str = "exact"
    mha_out_proj_scale: int | None = None
    rounding: str | None = None
    calibration: Mapping[str, Any] = {}  # sha256 by file

    def require_calibration(self, treatment: Treatment) -> None:
        """UsageError unless the very inputs are given that it was rounded by."""
        given = {} if treatment.calibration is None else treatment.calibration.sha256
        if self.calibration and sorted(map(str, self.calibration.values())) != sorted(given.values()):
            names = ", ".join(map(printable, self.calibration))
            raise UsageError(
                f"verify: it was rounded by calibration inputs of {names}; give calibration, the same by sha256"
            )


def recorded(folder: Path) -> Recorded:
    """The defaults of what has no receipt."""
    if not (folder / RECEIPT).is_file():
        return Recorded()
    receipt = read_receipt(folder)
    options = receipt.get("options")
    options = options if isinstance(options, dict) else {}
    scales = [one.get("mha_out_proj_scale") for one in receipt["adapters"] if isinstance(one, dict)]
    scale = next((one for one in scales if one is not None), None)
    rounding = "feedback" if options.get("rounding") == "feedback" else None
    calibration = options.get("calibration")
    return Recorded(
        str(options.get("arithmetic", "exact")),
        scale,
        rounding,
        calibration if isinstance(calibration, dict) and rounding else {},
    )
