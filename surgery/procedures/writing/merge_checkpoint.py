"""merge_checkpoint: adapters merged into a checkpoint, streaming, into a new folder."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.core.adapter import Weighted
from surgery.core.report import Report
from surgery.core.survival import Bounds, Survival
from surgery.errors import EnvironmentFault, printable
from surgery.hosts.change import MergedTile
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.layout import Layout, layout_like
from surgery.hosts.reading import Reading
from surgery.hosts.shards import FilePart
from surgery.io.place import refuse_overlap
from surgery.io.staging import Staging
from surgery.io.strict_json import json_bytes
from surgery.io.weight_files import INDEX
from surgery.procedures.planning.covering import can_leave_plain
from surgery.procedures.planning.plan import Plan, describe, make_plan
from surgery.procedures.planning.treatment import Treatment
from surgery.procedures.writing.expected import check_base
from surgery.procedures.writing.filling import Pace, fill
from surgery.procedures.writing.receipt import VERSION, Receipt
from surgery.procedures.writing.small_files import RECEIPT, SmallFiles, small_files
from surgery.procedures.writing.surviving import refuse_lost, survivals
from surgery.procedures.writing.undo_record import FOLDER
from surgery.procedures.writing.undo_writer import UndoWriter


@dataclass(frozen=True)
class Options:
    """How a merge is made. `treatment` and `max_shard_bytes` affect the bytes, `reversible` adds files.

    `bounds` are for what is left of the change where a format cannot hold all of it.
    `beside` writes other files into the folder, once the weights lie there, and returns their sha256 by name.
    `resume` false starts anew where a run was cut short, true asks that there be one to go on with.
    """

    treatment: Treatment = field(default_factory=Treatment)
    max_shard_bytes: int | None = None  # None: files like the base's
    reversible: bool = False
    overwrite: bool = False
    resume: bool | None = None
    expect_base_sha256: str | None = None
    probes: int = 0  # inputs by which is measured what a format does to the outputs
    bounds: Bounds = field(default_factory=Bounds)
    pace: Pace = field(default_factory=Pace)
    beside: Callable[[Staging], Mapping[str, str]] | None = None

    def paced(self) -> Pace:
        """One file at a time where PEFT is followed: with all threads, as it would run, and one whole weight."""
        return self.pace if self.treatment.arithmetic == "exact" else replace(self.pace, workers=1)


@dataclass(frozen=True, repr=False)
class MergeReport(Report):
    """What a merge has written: the folder, the plan it followed, and its receipt, as JSON, with the sha256 of all."""

    out: Path
    plan: Plan
    receipt: dict[str, Any]
    pushed: str | None = None  # owner/name@commit on the Hub

    def summary(self) -> str:
        """One line."""
        merged, untouched = len(self.receipt["changed"]), len(self.receipt["untouched"])
        survived = self.receipt.get("survived")
        more = f"; retained {survived['retained']}, noise {survived['noise']}" if survived else ""
        more += f"; pushed as {self.pushed}" if self.pushed else ""
        return f"{printable(self.out)}: {merged} tensors changed, {untouched} carried as bytes{more}"

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), "receipt": self.receipt} | ({"pushed": self.pushed} if self.pushed else {})


def merge_checkpoint(
    base: Checkpoint, adapters: Sequence[Weighted], out: Path, options: Options | None = None
) -> MergeReport:
    """Merge `adapters` over `base` into the new folder `out`; complete, or `out` stays as it is.

    Raises InputError for what cannot be merged, OutputExistsError, EnvironmentFault.
    """
    options = options or Options()
    refuse_overlap(out, [base.path, *(Path(one.adapter.where) for one in adapters)])
    plan, fallen = _settled(base, adapters, options)
    plan = plan.probed(options.probes)
    layout = layout_like(base, plan.written(), plan.headers(base), options.max_shard_bytes)
    files = small_files(base, [Path(one.adapter.where) for one in adapters])
    key = _key(base, adapters, plan, layout, options)
    with Staging(out, overwrite=options.overwrite, key=key, resume=options.resume) as staging, ExitStack() as stack:
        undo = stack.enter_context(UndoWriter(base, staging, layout)) if options.reversible else None
        books = _Books(Receipt(base, adapters, plan), undo, files.size)
        readings, written = fill(base, plan.view(base, books), staging, layout, books, options.paced())
        check_base(base, adapters, plan, readings, options.expect_base_sha256)
        _check_survival(books.receipt.survival, base, options)
        _write_small(files, plan, layout, staging)
        if options.beside is not None:
            files.sha256 |= options.beside(staging)
        record = undo.finish(plan.laid, _originals(base, readings, files), files.displaced) if undo else None
        told = books.receipt.finish(readings, written, files, options.treatment, record)
        told |= {"fallback": {name: one.to_json() for name, one in fallen.items()}} if fallen else {}
        staging.write(RECEIPT, json_bytes(told))
        _reopen(staging, layout)
    return MergeReport(out, plan, told)


def _settled(base: Checkpoint, adapters: Sequence[Weighted], options: Options) -> tuple[Plan, Mapping[str, Survival]]:
    """The plan, and what would have been left of the weights that fall back. What was refused is raised."""
    plan = make_plan(base, adapters, options.treatment)
    plan.require()
    if options.treatment.fallback is None:
        return plan, {}
    told = survivals(plan.source(base), plan.changes, options.paced().workers)
    fallen = {name: one for name, one in told if not options.bounds.admit(one)}
    plan = make_plan(base, adapters, options.treatment, fallen)
    plan.require()
    return plan, fallen


class _Books:
    """All that is kept of a merge: the receipt, and the undo record if there is one."""

    def __init__(self, receipt: Receipt, undo: UndoWriter | None, small_bytes: int) -> None:
        self.receipt, self.undo, self.small_bytes = receipt, undo, small_bytes

    def __call__(self, tile: MergedTile) -> None:
        self.receipt(tile)
        if self.undo is not None:
            self.undo(tile)

    def beside(self, parts: Collection[str]) -> int:
        plan = self.receipt.plan
        return self.small_bytes + (self.undo.least_bytes(plan.changes, plan.laid, parts) if self.undo else 0)

    def close(self, part: str) -> Mapping[str, str]:
        one = None if self.undo is None else self.undo.close(part)
        return {f"{FOLDER}/{one.name}": one.sha256} if one is not None and one.tensors else {}

    def told(self, part: FilePart) -> Any:
        largest = {name: value.hex() for name in part.order if (value := self.receipt.largest.get(name)) is not None}
        survival = {name: self.receipt.survival[name].words() for name in part.order if name in self.receipt.survival}
        undo = None if self.undo is None else self.undo.files[part.name].told()
        return {"largest": largest, "survival": survival, "undo": undo}

    def take(self, part: str, told: Any) -> None:
        self.receipt.largest |= {name: float.fromhex(value) for name, value in told["largest"].items()}
        for name, sums in told["survival"].items():
            self.receipt.survival[name] = Survival.read(sums)
        if self.undo is not None:
            self.undo.files[part].take(told["undo"])


def _check_survival(told: Mapping[str, Survival], base: Checkpoint, options: Options) -> None:
    """CheckError where too little of the adapters is left, or too much came beside it."""
    falling = ", `fallback=16bit` does where it is needed" if _can_fall_back(told, base, options) else ""
    whole = "`into=16bit`" if base.packed else "a merge without `into`"
    step = f"{whole} keeps all of it{falling}, and `min_retained` and `max_noise` let it pass"
    refuse_lost(told, options.bounds, f"merge into {options.treatment.into}", step)


def _can_fall_back(told: Mapping[str, Survival], base: Checkpoint, options: Options) -> bool:
    """Would single weights in 16 bits be of use, and does config.json tell of them?"""
    if options.treatment.fallback is not None:
        return False
    if options.treatment.into == "keep":
        return can_leave_plain(base.config)
    return any(map(options.bounds.admit, told.values()))


_JOURNAL = 2  # what the parts of a run that was cut short tell is of this format


def _key(base: Checkpoint, adapters: Sequence[Weighted], plan: Plan, layout: Layout, options: Options) -> str:
    """Stands for all that decides what is written, but for the base's data, which is hashed when a run goes on."""
    decided = {
        "surgery": VERSION,
        "journal": _JOURNAL,
        "base": {file.path.name: hashlib.sha256(file.header.raw).hexdigest() for file in base.files},
        "adapters": [[dict(one.sha256), weight.hex(), one.mha_out_proj_scale] for one, weight in adapters],
        "changes": [describe(change) for change in plan.changes],
        "files": {file.name: hashlib.sha256(file.raw).hexdigest() for file in layout.files},
        "treatment": options.treatment.to_json(),
        "reversible": options.reversible,
        "probes": options.probes,
    }
    return hashlib.sha256(json_bytes(decided)).hexdigest()


def _write_small(files: SmallFiles, plan: Plan, layout: Layout, staging: Staging) -> None:
    """Write what stands beside the weights."""
    if plan.config is not None:
        files.put("config.json", json_bytes(plan.config))
    if layout.index is not None or INDEX in files.contents:
        files.put(INDEX, layout.index)
    for name, source in files.contents.items():
        files.sha256[name] = staging.put(name, source)


def _originals(base: Checkpoint, readings: Sequence[Reading], files: SmallFiles) -> dict[str, str]:
    """sha256 of the files of the base, as they were read: all that an unmerge gives back, but what is displaced."""
    found = {base.written_name(file): one.whole() for file, one in zip(base.files, readings, strict=True)}
    return found | {name: files.sha256[name] for name in files.originals if name not in files.displaced}


def _reopen(staging: Staging, layout: Layout) -> None:
    """Read the headers and the index of what was written, as a loader will."""
    with Checkpoint(staging.folder) as written:
        found = [(file.path.name, file.header.raw) for file in written.files]
    if sorted(found) != sorted((file.name, file.raw) for file in layout.files):
        raise EnvironmentFault(f"{printable(staging.out)}: what was written reads back otherwise; see to the disk")
