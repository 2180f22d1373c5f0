"""unmerge_checkpoint: the original bytes out of a reversible merge, without the base at hand."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.core.report import Report
from surgery.errors import CheckError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.layout import Layout
from surgery.hosts.shards import FilePart
from surgery.hosts.unmerged import Unmerged
from surgery.io.place import refuse_overlap
from surgery.io.regular import contained
from surgery.io.staging import Staging
from surgery.io.strict_json import json_bytes
from surgery.procedures.writing.filling import Pace, fill
from surgery.procedures.writing.receipt import VERSION, read_receipt
from surgery.procedures.writing.undo_record import FOLDER, RECORD, UndoRecord


@dataclass(frozen=True, repr=False)
class UnmergeReport(Report):
    """The files written, each with the sha256 that the original had."""

    out: Path
    files: dict[str, str]

    def summary(self) -> str:
        """One line."""
        return f"{printable(self.out)}: {len(self.files)} files, each with the sha256 of the original"

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), "files": self.files}


def unmerge_checkpoint(
    merged: Path, out: Path, *, overwrite: bool = False, resume: bool | None = None, pace: Pace | None = None
) -> UnmergeReport:
    """Write the base of the merged folder `merged` to `out`.

    CheckError, and `out` stays as it is, if the merged files or the record are not what the merge wrote.
    """
    refuse_overlap(out, [merged])
    record, receipt = UndoRecord(merged), read_receipt(merged)
    if record.sha256 != receipt.get("undo_record"):
        raise CheckError(
            f"{printable(record.folder)}: {RECORD} is not the one of the receipt; it was changed after the merge, "
            "which cannot be undone; bring back a copy of it"
        )
    record.check()
    key = hashlib.sha256(json_bytes([VERSION, record.files, record.streams_sha256])).hexdigest()
    with Checkpoint(merged) as source, Staging(out, overwrite=overwrite, key=key, resume=resume) as staging:
        view = Unmerged(source, record.changes(source), record.undo)
        small = {name: _carried(merged, name, record) for name in record.files.keys() - _names(record.layout)}
        books = _NoBooks(sum(path.stat().st_size for path in small.values()))
        readings, written = fill(source, view, staging, record.layout, books, pace or Pace())
        names = [file.path.name for file in source.files]
        _compare("merged file", merged, {n: r.whole() for n, r in zip(names, readings, strict=True)}, receipt["files"])
        found = {name: one.sha256 for name, one in written.items()}
        for name, path in small.items():
            found[name] = staging.carry(contained(merged, path.relative_to(merged)), name)
        _compare("restored file", merged, found, record.files)
    return UnmergeReport(out, found)


def _names(layout: Layout) -> set[str]:
    return {file.name for file in layout.files}


def _carried(merged: Path, name: str, record: UndoRecord) -> Path:
    """Where a small file of the base lies. CheckError if it is not there."""
    kept = merged / FOLDER / "files" / name  # also what a push has put its model card in place of
    path = kept if name in record.displaced or kept.is_file() else merged / name
    if not path.is_file():
        raise CheckError(f"{printable(path)}: it is missing; the original cannot be restored whole")
    return path


class _NoBooks:
    """An unmerge keeps nothing but the files, the small ones among them."""

    def __init__(self, small_bytes: int) -> None:
        self.small_bytes = small_bytes

    def beside(self, _: Collection[str]) -> int:
        return self.small_bytes

    def close(self, _: str) -> Mapping[str, str]:
        return {}

    def told(self, _: FilePart) -> Any:
        return None

    def take(self, _: str, __: Any) -> None:
        pass


def _compare(what: str, folder: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    for name in sorted(wanted):
        if found.get(name) != wanted[name]:
            raise CheckError(
                f"{printable(folder)}: {what} {printable(name)} has sha256 {found.get(name)}, recorded is "
                f"{printable(wanted[name])}; it was changed after the merge; nothing was written"
            )
