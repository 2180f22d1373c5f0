"""VerifyReport: the grades of a merged checkpoint, and how far its outputs are those that are wanted."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from surgery.core.agreement import Agreements, in_words
from surgery.core.survival import Survival
from surgery.errors import CheckError, printable, visible
from surgery.procedures.checking.grade import GRADES, Grade
from surgery.procedures.checking.report import Case, CaseReport

_LISTED = frozenset({"rounding", "different"})


@dataclass(frozen=True, repr=False)
class VerifyReport(CaseReport):
    """A grade for every tensor of base and output; and how far the outputs of both models agree, if it was asked.

    `ok` says whether nothing is "different", and `require` raises CheckError otherwise. The other grades: "bits", the
    same bytes when it is derived anew; "rounding", as near as correct merges are; "untouched", the base's bytes;
    "recorded", the sha256 of the receipt.
    """

    out: Path
    tensors: Mapping[str, Grade]
    outputs: Agreements | None = None
    notes: tuple[str, ...] = ()  # on the options that the merge was derived by, where its receipt tells of them

    @property
    def ok(self) -> bool:
        """Nothing is different."""
        same = all(one.grade != "different" for one in self.tensors.values())
        return same and (self.outputs is None or self.outputs.ok)

    def require(self) -> None:
        """CheckError naming the first tensor that is different, or the first output."""
        wrong = [(name, one.why) for name, one in self.tensors.items() if one.grade == "different"]
        if wrong:
            name, why = wrong[0]
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise CheckError(
                f"{printable(self.out)}: {printable(name)} is different{more}: {why}; merge it anew, or name what it "
                "was made with: the same base, adapters, weights and `base_as`"
            )
        if self.outputs is not None and not self.outputs.ok:
            raise CheckError(f"{printable(self.out)}: outputs: {visible(self.outputs.why)}; the table has the figures")

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by grade, and outputs."""
        found = Counter(one.grade for one in self.tensors.values())
        told = {} if self.outputs is None else Counter(_verdict(one.ok) for one in self.outputs.outputs)
        return {grade: found[grade] for grade in GRADES} | {verdict: told[verdict] for verdict in told}

    def summary(self) -> str:
        """One line."""
        counts = ", ".join(f"{count} {grade}" for grade, count in self.counts.items() if count or grade == "different")
        survived = [one.survival for one in self.tensors.values() if one.survival is not None]
        told = [counts, *([str(reduce(Survival.plus, survived))] if survived else []), *self.notes]
        told += [f"outputs: {self.outputs.why}"] if self.outputs is not None and self.outputs.why else []
        return "; ".join(told)

    @property
    def title(self) -> str:
        return f"surgery verify {self.out}"

    @property
    def columns(self) -> Sequence[str]:
        return "tensor", "grade", "max abs error", "why"

    def cases(self) -> Iterator[Case]:
        """The tensors, of which those are listed that are not as good as can be; then the outputs."""
        for name, one in self.tensors.items():
            failure = (one.why or one.grade) if one.grade == "different" else ""
            error = f"{one.max_abs_error:.3g}" if one.is_measured else ""
            yield Case(name, one.grade, (error, one.why), one.grade in _LISTED, failure)
        for output in () if self.outputs is None else self.outputs.outputs:
            error = f"{output.found.error:.3g} of the largest"
            name, verdict = f"output {output.name}", _verdict(output.ok)
            yield Case(name, verdict, (error, in_words(output)), True, output.why)
        if self.outputs is not None and not self.outputs.ok and all(one.ok for one in self.outputs.outputs):
            yield Case("outputs", _verdict(False), ("", self.outputs.why), True, self.outputs.why)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "counts": self.counts,
            "notes": list(self.notes),
            "tensors": {name: one.to_json() for name, one in self.tensors.items()},
        } | ({} if self.outputs is None else {"outputs": self.outputs.to_json()})


def _verdict(agrees: bool) -> str:
    return "equivalent" if agrees else "apart"
