"""merge_checkpoint: adapters merged into a checkpoint, streaming, into a new folder."""

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.core.method import Elementwise
from surgery.core.source import copy
from surgery.errors import ConfigError, printable
from surgery.hosts.checkpoint import INDEX, Checkpoint
from surgery.hosts.shards import TILE_ELEMENTS, CheckpointSink
from surgery.hosts.views import Change, Merged, Watch
from surgery.io.octets import Tally
from surgery.io.staging import Staging
from surgery.io.strict_json import json_bytes
from surgery.procedures.plan import Plan, Weighted, describe, make_plan
from surgery.procedures.small_files import RECEIPT, file_sha256, small_files, true_config
from surgery.procedures.undo_record import FOLDER, UndoWriter

RECEIPT_FORMAT = 1


@dataclass(frozen=True)
class Options:
    """How a merge is made. `dtype` None keeps each tensor's own; only `dtype` affects the bytes."""

    reversible: bool = False
    dtype: torch.dtype | None = None
    overwrite: bool = False
    tile_elements: int = TILE_ELEMENTS


@dataclass(frozen=True)
class MergeReport:
    """What a merge has written, and its receipt."""

    out: Path
    plan: Plan
    receipt: dict[str, Any]

    def summary(self) -> str:
        """One line."""
        merged, untouched = len(self.receipt["changed"]), len(self.receipt["untouched"])
        return f"{self.out}: {merged} tensors changed, {untouched} carried as bytes"

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), "receipt": self.receipt}


def merge_checkpoint(
    base: Checkpoint, adapters: Sequence[Weighted], out: Path, options: Options | None = None
) -> MergeReport:
    """Merge `adapters` over `base` into the new folder `out`; complete, or nothing is left behind.

    Raises InputError for what cannot be merged, OutputExistsError, EnvironmentFault.
    """
    options = options or Options()
    _refuse_overlap(base, adapters, out)
    plan = make_plan(base, adapters, options.dtype)
    plan.require()
    with Staging(out, options.overwrite) as staging, ExitStack() as stack:
        largest = LargestChange()
        watches: list[Watch] = [largest]
        undo = stack.enter_context(UndoWriter(base, staging)) if options.reversible else None
        watches += [undo] if undo is not None else []
        read = base.tally()
        changed = {c.site.weight.name: c.dtype for c in plan.changes if c.dtype != c.site.weight.dtype}
        with CheckpointSink(base, staging, changed, tile_elements=options.tile_elements) as sink:
            copy(Merged(base, plan.changes, _all(watches)), sink)
        base.check_unchanged()
        beside = _carry(base, adapters, options, staging, undo, read)
        receipt = make_receipt(base, adapters, plan, options, read, sink.tallies, largest.values, beside)
        staging.write(RECEIPT, json_bytes(receipt))
    return MergeReport(out, plan, receipt)


class LargestChange:
    """A watch that keeps, by tensor, the largest |merged - original|."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def __call__(
        self,
        change: Change,
        rows: slice,
        original: Tensor,
        merged: Tensor,
        steps: Sequence[Elementwise] | None,
    ) -> None:
        del rows, steps
        name = change.site.weight.name
        apart = (merged.to(torch.float64) - original.to(torch.float64)).abs()
        here = float(apart.max()) if apart.numel() else 0.0
        self.values[name] = max(here, self.values.get(name, 0.0))


def _all(watches: Sequence[Watch]) -> Watch:
    def watch(
        change: Change, rows: slice, original: Tensor, merged: Tensor, steps: Sequence[Elementwise] | None
    ) -> None:
        for one in watches:
            one(change, rows, original, merged, steps)

    return watch


def _refuse_overlap(base: Checkpoint, adapters: Sequence[Weighted], out: Path) -> None:
    """An output inside an input, or over it, would destroy what it is made of."""
    target = out.resolve()
    for path in (base.folder, *(Path(one.adapter.where) for one in adapters)):
        inside = (
            target == path.resolve() or path.resolve() in target.parents or target in path.resolve().parents
        )
        if inside:
            raise ConfigError(
                f"{printable(out)}: it overlaps with {printable(path)}, which is read; name another folder"
            )


def _carry(
    base: Checkpoint,
    adapters: Sequence[Weighted],
    options: Options,
    staging: Staging,
    undo: UndoWriter | None,
    read: Sequence[Tally],
) -> dict[str, Any]:
    """Write the small files and finish the undo record; returns what the receipt says of them."""
    files = small_files(base, [Path(one.adapter.where) for one in adapters])
    config = true_config(base, options.dtype)
    for name, path in files.carried.items():
        if name == "config.json" and config is not None:
            staging.write(name, config)
        else:
            staging.carry(path, name)
    if undo is not None:
        displaced = [*files.displaced, *(["config.json"] if config is not None else [])]
        displaced += [INDEX] if base.index is not None else []
        originals = {
            file.path.name: tally.whole.hexdigest() for file, tally in zip(base.files, read, strict=True)
        }
        kept = [
            *(name for name in files.carried if name not in files.added),
            *([INDEX] if base.index else []),
        ]
        originals |= {name: file_sha256(base.folder / name) for name in kept}
        undo.finish(adapters, originals, sorted(set(displaced)))
    return {"left_out": files.left_out, "carried": sorted(files.carried)}


def make_receipt(
    base: Checkpoint,
    adapters: Sequence[Weighted],
    plan: Plan,
    options: Options,
    read: Sequence[Tally],
    written: dict[str, Tally],
    largest: dict[str, float],
    beside: dict[str, Any],
) -> dict[str, Any]:
    """What went in, what was done, what came out; no times, no paths of the machine."""
    before = {name: digest for tally in read for name, digest in tally.tensors.items()}
    after = {name: digest for tally in written.values() for name, digest in tally.tensors.items()}
    changes = {change.site.weight.name: describe(change) for change in plan.changes}
    changed = {
        name: {
            **about,
            "largest_change": largest[name].hex(),
            "base_sha256": before[name],
            "sha256": after[name],
        }
        for name, about in changes.items()
    }
    return {
        "format": RECEIPT_FORMAT,
        "base": {"files": {f.path.name: t.whole.hexdigest() for f, t in zip(base.files, read, strict=True)}},
        "adapters": [
            {"sha256": dict(adapter.sha256), "weight": weight.hex()} for adapter, weight in adapters
        ],
        "options": {
            "arithmetic": "exact",
            "dtype": str(options.dtype).removeprefix("torch.") if options.dtype else None,
        },
        "changed": changed,
        "untouched": {name: digest for name, digest in after.items() if name not in changes},
        "files": {name: tally.whole.hexdigest() for name, tally in written.items()},
        "reversible": FOLDER if options.reversible else None,
        "notes": list(plan.notes),
        **beside,
        "tools": {
            "surgery": version("model-surgery"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
