"""unmerge_checkpoint: the original bytes out of a reversible merge, without the base at hand."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.core.site import Site
from surgery.core.source import TILE_ELEMENTS, copy, default_workers
from surgery.errors import CheckError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.shards import CheckpointSink
from surgery.hosts.views import Change, Unmerged
from surgery.io.octets import Tally
from surgery.io.staging import Staging, refuse_overlap
from surgery.procedures.plan import make_plan
from surgery.procedures.receipt import read_receipt
from surgery.procedures.small_files import file_sha256
from surgery.procedures.undo_record import FOLDER, UndoRecord


@dataclass(frozen=True)
class UnmergeReport:
    """The files written, each with the sha256 that the original had."""

    out: Path
    files: dict[str, str]

    def summary(self) -> str:
        """One line."""
        return f"{printable(self.out)}: {len(self.files)} files, each with the sha256 of the original"

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), "files": self.files}


def unmerge_checkpoint(
    merged: Path, out: Path, *, overwrite: bool = False, tile_elements: int = TILE_ELEMENTS
) -> UnmergeReport:
    """Write the base of the merged folder `merged` to `out`.

    CheckError, and nothing is left behind, if the merged files or the record are not what the merge wrote.
    """
    refuse_overlap(out, [merged])
    record, receipt = UndoRecord(merged), read_receipt(merged)
    record.check()
    with Checkpoint(merged) as source, Staging(out, overwrite) as staging:
        changes = _changes(source, record)
        read = source.tally()
        with CheckpointSink(source, staging, record.dtypes, record.headers, tile_elements) as sink:
            copy(Unmerged(source, changes, record.undo), sink, default_workers())
        source.check_unchanged()
        names = [file.path.name for file in source.files]
        _compare("merged file", merged, dict(zip(names, map(_digest, read), strict=True)), receipt["files"])
        found = {name: _digest(tally) for name, tally in sink.tallies.items()}
        for name in record.files.keys() - found.keys():
            path = merged / FOLDER / "files" / name if name in record.displaced else merged / name
            if not path.is_file():
                raise CheckError(f"{printable(path)}: it is missing; the original cannot be restored whole")
            staging.carry(path, name)
            found[name] = file_sha256(staging.folder / name)
        _compare("restored file", merged, found, record.files)
    return UnmergeReport(out, found)


def _digest(tally: Tally) -> str:
    return tally.whole.hexdigest()


def _changes(source: Checkpoint, record: UndoRecord) -> list[Change]:
    """The changes that were made, planned anew over the merged weights."""
    plan = make_plan(source, record.adapters())
    plan.require()
    laid = {change.site.weight.name: change for change in plan.changes}
    found = []
    for info in source.tensors():
        if info.name in record.tensors:
            before = laid.get(info.name, Change(Site(info.name, {"weight": info}), info.torch_dtype))
            found.append(Change(before.site, record.dtypes[info.name], before.layers))
    return found


def _compare(what: str, folder: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    for name in sorted(wanted):
        if found.get(name) != wanted[name]:
            raise CheckError(
                f"{printable(folder)}: {what} {printable(name)} has sha256 {found.get(name)}, recorded is "
                f"{printable(wanted[name])}; it was changed after the merge; nothing was written"
            )
