"""verify: every tensor of a merged checkpoint graded against what base and adapters give.

bits: derived again to the same bytes. rounding: within what correct merges may differ by. different: neither.
untouched: the bytes of the base. recorded: of the sha256 that the receipt tells.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.adapter import Weighted
from surgery.core.arithmetic import exact_float64, ulp
from surgery.core.site import Site, TensorInfo
from surgery.core.source import TILE_ELEMENTS, Source, row_tiles
from surgery.core.undo import order
from surgery.errors import CheckError, InputError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.views import Change, Merged, elementwise
from surgery.io.octets import Tally
from surgery.procedures.plan import make_plan
from surgery.procedures.receipt import read_receipt

GRADES = ("bits", "rounding", "untouched", "recorded", "different")


class Grade(NamedTuple):
    """What became of one tensor, and how far off its worst element is."""

    grade: str
    max_abs_error: float = 0.0
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """Its fields; an error that is no number is null, for JSON has no NaN."""
        return {**self._asdict(), "max_abs_error": self.max_abs_error if math.isfinite(self.max_abs_error) else None}


@dataclass(frozen=True)
class VerifyReport:
    """A grade for every tensor of base and output."""

    out: Path
    tensors: Mapping[str, Grade]

    @property
    def ok(self) -> bool:
        """Nothing is different."""
        return all(one.grade != "different" for one in self.tensors.values())

    def require(self) -> None:
        """CheckError naming the first tensor that is different."""
        wrong = [(name, one.why) for name, one in self.tensors.items() if one.grade == "different"]
        if wrong:
            name, why = wrong[0]
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise CheckError(f"{printable(self.out)}: {printable(name)} is different{more}: {why}; merge it anew")

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by grade."""
        found = Counter(one.grade for one in self.tensors.values())
        return {grade: found[grade] for grade in GRADES}

    def summary(self) -> str:
        """One line."""
        return ", ".join(f"{count} {grade}" for grade, count in self.counts.items() if count or grade == "different")

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "counts": self.counts,
            "tensors": {name: one.to_json() for name, one in self.tensors.items()},
        }


def verify_checkpoint(base: Checkpoint, adapters: Sequence[Weighted], out: Checkpoint) -> VerifyReport:
    """Grade every tensor of `out` against `adapters` merged over `base`, by any tool."""
    plan = make_plan(base, adapters)
    plan.require()
    changes = {change.site.weight.name: change for change in plan.changes}
    found = {info.name: info for info in out.tensors()}
    grades = {}
    for info in base.tensors():
        there = found.pop(info.name, None)
        grades[info.name] = _one(base, out, info, there, changes.get(info.name))
    for name in found:
        grades[name] = Grade("different", why="it is not in the base")
    base.check_unchanged()
    out.check_unchanged()
    return VerifyReport(out.path, grades)


def verify_receipt(folder: Path) -> VerifyReport:
    """Check the files of `folder` against its own receipt. InputError if it has none."""
    receipt = read_receipt(folder)
    wanted = dict(receipt["untouched"]) | {name: one["sha256"] for name, one in receipt["changed"].items()}
    grades = {}
    with Checkpoint(folder) as out:
        for file in out.files:
            tally = Tally(file.header.raw)
            for entry in file.header.entries:
                for chunk in file.chunks(entry):
                    tally.feed(chunk)
                tally.end(entry.info.name)
            for name, digest in tally.tensors.items():
                same = wanted.pop(name, None) == digest
                grades[name] = Grade("recorded") if same else Grade("different", why="its sha256 is not the receipt's")
            if receipt["files"].get(file.path.name) != tally.whole.hexdigest():
                why = "the file's sha256 is not the receipt's"
                grades[file.path.name] = Grade("different", why=why)
    for name in wanted:
        grades[name] = Grade("different", why="it is missing")
    return VerifyReport(folder, grades)


def compare(expected: Merged, other: Source, change: Change) -> Grade:
    """Grade the weight of one change in `other`, tile by tile; the worst tile counts."""
    site, worst = change.site, Grade("bits")
    for rows in row_tiles(site.weight.shape, TILE_ELEMENTS):
        wanted = expected.load(site, rows).tensors["weight"]
        found = other.load(site, rows).tensors["weight"]
        if found.dtype == wanted.dtype and torch.equal(order(found), order(wanted)):
            continue
        here = _within(expected, change, rows, found)
        error = max(here.max_abs_error, worst.max_abs_error)
        worst = Grade("different" if "different" in (here.grade, worst.grade) else "rounding", error, here.why)
    return worst


def _one(base: Checkpoint, out: Checkpoint, info: TensorInfo, there: TensorInfo | None, change: Change | None) -> Grade:
    if there is None:
        return Grade("different", why="it is missing")
    if there.shape != info.shape:
        return Grade("different", why=f"it is {list(there.shape)}, the base's is {list(info.shape)}")
    if change is None and there.dtype == info.dtype:
        same = all(a == b for a, b in zip(base.read(info.name), out.read(info.name), strict=True))
        return Grade("untouched") if same else Grade("different", why="no adapter touches it, yet it is not the base's")
    if there.dtype not in PLAIN_DTYPES or info.dtype not in PLAIN_DTYPES:
        return Grade("different", why=f"it became {str(there.dtype).removeprefix('torch.')}")
    change = change or Change(Site(info.name, {"weight": info}), info.dtype)
    change = Change(change.site, there.dtype, change.layers, change.saved)
    try:
        return compare(Merged(base, [change]), out, change)
    except InputError as error:
        return Grade("different", why=f"it cannot be derived: {error}")


def _within(expected: Merged, change: Change, rows: slice, found: Tensor) -> Grade:
    """Whether each element lies within half an ulp of the result and of each delta, plus the spread."""
    site, op = change.site, change.site.op
    value = exact_float64(expected.source.load(site, rows).tensors["weight"])
    if change.saved is not None:
        value = exact_float64(change.saved[rows if site.weight.shape else ...])
    size, allowed = value.abs(), torch.zeros_like(value)
    for layer, step in zip(change.layers, elementwise(change, rows) or (), strict=True):
        assert op is not None
        value = step.apply(value)
        size = torch.maximum(size, value.abs())
        allowed += op.stored(layer.method.spread(layer.params, op.tile(rows)))
        allowed += ulp(step.shift, site.weight.dtype) / 2
    allowed += ulp(size, change.dtype) / 2 * max(1, len(change.layers))
    apart = (exact_float64(found) - value).abs()
    close = bool((apart <= allowed).all())  # false for NaN
    why = "" if close else "further off than rounding explains"
    return Grade("rounding" if close else "different", float(apart.max()), why)
