"""merge_checkpoint: adapters merged into a checkpoint, streaming, into a new folder."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from surgery.core.source import TILE_ELEMENTS, copy, default_workers
from surgery.errors import printable
from surgery.hosts.checkpoint import INDEX, Checkpoint
from surgery.hosts.shards import CheckpointSink
from surgery.hosts.views import Merged, MergedTile, Watch
from surgery.io.octets import Tally
from surgery.io.staging import Staging, refuse_overlap
from surgery.io.strict_json import json_bytes
from surgery.procedures.plan import Plan, Weighted, make_plan
from surgery.procedures.receipt import Receipt
from surgery.procedures.small_files import RECEIPT, SmallFiles, file_sha256, small_files, true_config
from surgery.procedures.undo_record import UndoWriter


@dataclass(frozen=True)
class Options:
    """How a merge is made. `dtype` None keeps each tensor's own; only `dtype` affects the bytes."""

    reversible: bool = False
    dtype: torch.dtype | None = None
    overwrite: bool = False
    tile_elements: int = TILE_ELEMENTS
    workers: int = field(default_factory=default_workers)  # files at once


@dataclass(frozen=True)
class MergeReport:
    """What a merge has written, and its receipt."""

    out: Path
    plan: Plan
    receipt: dict[str, Any]

    def summary(self) -> str:
        """One line."""
        merged, untouched = len(self.receipt["changed"]), len(self.receipt["untouched"])
        return f"{printable(self.out)}: {merged} tensors changed, {untouched} carried as bytes"

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), "receipt": self.receipt}


def merge_checkpoint(
    base: Checkpoint, adapters: Sequence[Weighted], out: Path, options: Options | None = None
) -> MergeReport:
    """Merge `adapters` over `base` into the new folder `out`; complete, or nothing is left behind.

    Raises InputError for what cannot be merged, OutputExistsError, EnvironmentFault.
    """
    options = options or Options()
    refuse_overlap(out, [base.path, *(Path(one.adapter.where) for one in adapters)])
    plan = make_plan(base, adapters, options.dtype)
    plan.require()
    files = small_files(base, [Path(one.adapter.where) for one in adapters])
    with Staging(out, options.overwrite) as staging, ExitStack() as stack:
        receipt = Receipt(base, adapters, plan)
        watches: list[Watch] = [receipt]
        undo = stack.enter_context(UndoWriter(base, staging)) if options.reversible else None
        watches += [undo] if undo is not None else []
        read = base.tally()
        changed = {c.site.weight.name: c.dtype for c in plan.changes if c.dtype != c.site.weight.dtype}
        with CheckpointSink(base, staging, changed, tile_elements=options.tile_elements) as sink:
            copy(Merged(base, plan.changes, _all(watches)), sink, options.workers)
        base.check_unchanged()
        index = sink.index()
        if index is not None:
            staging.write(INDEX, index)
        _carry(base, files, options, staging)
        if undo is not None:
            changed_files = [INDEX] if base.index is not None and changed else []
            changed_files += ["config.json"] if true_config(base, options.dtype) is not None else []
            undo.finish(adapters, _originals(base, read, files), sorted({*files.displaced, *changed_files}))
        told = receipt.finish(read, sink.tallies, files, options.dtype, options.reversible)
        staging.write(RECEIPT, json_bytes(told))
    return MergeReport(out, plan, told)


def _all(watches: Sequence[Watch]) -> Watch:
    def watch(tile: MergedTile) -> None:
        for one in watches:
            one(tile)

    return watch


def _carry(base: Checkpoint, files: SmallFiles, options: Options, staging: Staging) -> None:
    """Write the small files."""
    config = true_config(base, options.dtype)
    for name, path in files.carried.items():
        if name == "config.json" and config is not None:
            staging.write(name, config)
        else:
            staging.carry(path, name)


def _originals(base: Checkpoint, read: Sequence[Tally], files: SmallFiles) -> dict[str, str]:
    """sha256 of each file of the base that an unmerge gives back."""
    found = {base.written_name(file): tally.whole.hexdigest() for file, tally in zip(base.files, read, strict=True)}
    kept = [name for name in files.carried if name not in files.added] + ([INDEX] if base.index else [])
    return found | {name: file_sha256(base.folder / name) for name in kept}
