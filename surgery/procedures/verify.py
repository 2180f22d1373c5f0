"""verify: every tensor of a merged checkpoint graded against what base and adapters give.

bits: derived again to the same bytes. rounding: within what correct merges may differ by. different: neither.
untouched: the bytes of the base. recorded: of the sha256 that the receipt tells.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.arithmetic import exact_float64, ulp
from surgery.core.site import Site, TensorInfo
from surgery.core.source import TILE_ELEMENTS, default_workers, row_tiles
from surgery.core.workers import in_order
from surgery.errors import CheckError, ValueRangeError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.views import Change, Merged, MergedTile
from surgery.io.octets import Tally
from surgery.io.tensor_file import TensorFile
from surgery.procedures.plan import Weighted, make_plan
from surgery.procedures.receipt import read_receipt
from surgery.procedures.spans import read_span, spans

GRADES = ("bits", "rounding", "untouched", "recorded", "different")
_BADNESS = {"bits": 0, "untouched": 0, "recorded": 0, "rounding": 1, "different": 2}


class Grade(NamedTuple):
    """What became of one tensor, and how far off its worst element is."""

    grade: str
    max_abs_error: float = 0.0
    why: str = ""

    def worse(self, other: "Grade") -> "Grade":
        """Of two tiles of a tensor: the worse grade, its reason, the larger error."""
        worst = other if _BADNESS[other.grade] > _BADNESS[self.grade] else self
        return worst._replace(max_abs_error=max(self.max_abs_error, other.max_abs_error, key=_size))

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


class Piece(NamedTuple):
    """A tile of a tensor of the output, and how to grade it."""

    name: str
    grade: Callable[[], Grade]


def verify_checkpoint(
    base: Checkpoint, adapters: Sequence[Weighted], out: Checkpoint, workers: int | None = None
) -> VerifyReport:
    """Grade every tensor of `out` against `adapters` merged over `base`, by any tool; `workers` tiles at once."""
    plan = make_plan(base, adapters)
    plan.require()
    grades: dict[str, Grade] = {}
    for name, grade in in_order(_graded, _pieces(base, out, plan.changes), workers or default_workers()):
        grades[name] = grades[name].worse(grade) if name in grades else grade
    base.check_unchanged()
    out.check_unchanged()
    return VerifyReport(out.path, grades)


def verify_receipt(folder: Path, workers: int | None = None) -> VerifyReport:
    """Check the files of `folder`, `workers` at once, against its own receipt. InputError if it has none."""
    receipt = read_receipt(folder)
    wanted = dict(receipt["untouched"]) | {name: one["sha256"] for name, one in receipt["changed"].items()}
    grades = {}
    with Checkpoint(folder) as out:
        for file, tally in zip(out.files, _tallies(out.files, workers or default_workers()), strict=True):
            for name, digest in tally.tensors.items():
                same = wanted.pop(name, None) == digest
                grades[name] = Grade("recorded") if same else Grade("different", why="its sha256 is not the receipt's")
            if receipt["files"].get(file.path.name) != tally.whole.hexdigest():
                why = "the file's sha256 is not the receipt's"
                grades[file.path.name] = Grade("different", why=why)
        out.check_unchanged()
    for name in wanted:
        grades[name] = Grade("different", why="it is missing")
    return VerifyReport(folder, grades)


def _graded(piece: Piece) -> tuple[str, Grade]:
    return piece.name, piece.grade()


def _pieces(base: Checkpoint, out: Checkpoint, changes: Iterable[Change]) -> Iterator[Piece]:
    """All tensors in the base's order, then those that a change adds, then those that nothing explains."""
    changed = {change.site.weight.name: change for change in changes}
    wanted = {info.name: info for info in base.tensors()}
    wanted |= {name: change.site.weight for name, change in changed.items()}
    found = {info.name: info for info in out.tensors()}
    for name, info in wanted.items():
        there, change = found.pop(name, None), changed.get(name)
        refused = _refused(info, there, change)
        if there is None or refused:
            yield Piece(name, partial(Grade, "different", why=refused))
        elif change is None and there.dtype == info.dtype:
            yield from (Piece(name, partial(_carried, base, out, name, span)) for span in spans(info))
        else:
            change = replace(change or Change(Site(name, {"weight": info}), info.dtype), dtype=there.dtype)
            for rows in row_tiles(info.shape, TILE_ELEMENTS):
                yield Piece(name, partial(_derived, base, out, change, rows))
    for name in found:
        yield Piece(name, partial(Grade, "different", why="it is not in the base"))


def _refused(info: TensorInfo, there: TensorInfo | None, change: Change | None) -> str:
    """Why a tensor is different by its header alone, or nothing."""
    if there is None:
        return "it is missing"
    if there.shape != info.shape:
        return f"it is {list(there.shape)}, {list(info.shape)} is wanted"
    cast = change is not None or there.dtype != info.dtype
    if cast and not {there.dtype, info.dtype} <= set(PLAIN_DTYPES):
        return f"it became {str(there.dtype).removeprefix('torch.')}"
    return ""


def _carried(base: Checkpoint, out: Checkpoint, name: str, span: slice) -> Grade:
    same = read_span(base, name, span) == read_span(out, name, span)
    return Grade("untouched") if same else Grade("different", why="no adapter touches it, yet it is not the base's")


def _derived(base: Checkpoint, out: Checkpoint, change: Change, rows: slice) -> Grade:
    """Grade some rows of a change: their bytes first, the tolerance only where these are others."""
    tiles: list[MergedTile] = []
    found = out.load(change.site, rows).tensors["weight"]
    try:
        Merged(base, [change], tiles.append).load(change.site, rows)
        return Grade("bits") if _equal_bytes(found, tiles[0].merged) else _within(tiles[0], found)
    except ValueRangeError as error:
        return Grade("different", why=f"it cannot be derived: {error}")


def _equal_bytes(a: Tensor, b: Tensor) -> bool:
    """Have two tensors of floats the same dtype and bytes? Compared as integers, for which NaN equals NaN."""
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.int16), b.flatten().view(torch.int16))


def _within(tile: MergedTile, found: Tensor) -> Grade:
    """Whether each element lies within half an ulp of the result and of each delta, plus the spread."""
    change = tile.change
    value = exact_float64(tile.original if change.saved is None else _saved(change, tile.rows))
    size, allowed = value.abs(), torch.zeros_like(value)
    for layer, step in zip(change.layers, tile.steps or (), strict=True):
        op = change.site.acting
        value = step.apply(value)
        size = torch.maximum(size, value.abs())
        allowed += op.stored(layer.method.spread(layer.params, op.tile(tile.rows)))
        allowed += ulp(step.shift, change.site.weight.dtype) / 2
    allowed += ulp(size, change.dtype) / 2 * max(1, len(change.layers))
    apart = (exact_float64(found) - value).abs()
    close = bool((apart <= allowed).all())  # false for NaN
    why = "" if close else "further off than rounding explains"
    return Grade("rounding" if close else "different", float(apart.max()), why)


def _saved(change: Change, rows: slice) -> Tensor:
    assert change.saved is not None
    shape = change.site.weight.shape
    return change.saved.view(shape)[rows if shape else ...]


def _tallies(files: Sequence[TensorFile], workers: int) -> Iterator[Tally]:
    stop = Event()
    return in_order(partial(_tally, stop), files, min(workers, len(files)), stop)


def _tally(stop: Event, file: TensorFile) -> Tally:
    """The hashes of a file, unless another has failed meanwhile: then of a part of it."""
    tally = Tally(file.header.raw)
    for entry in file.header.entries:
        for chunk in file.chunks(entry):
            if stop.is_set():
                return tally
            tally.feed(chunk)
        tally.end(entry.info.name)
    return tally


def _size(error: float) -> float:
    """NaN is larger than any error."""
    return math.inf if math.isnan(error) else error
