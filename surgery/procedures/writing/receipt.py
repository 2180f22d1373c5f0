"""Receipt: what went into a merge, what was done, and what came out; no times, no paths of the machine."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from surgery.core.adapter import Adapter, Weighted
from surgery.core.arithmetic import largest_change
from surgery.core.survival import Survival, total
from surgery.errors import FormatError, InputError, printable
from surgery.hosts.change import Change, MergedTile
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.encoded import standing
from surgery.hosts.reading import Reading
from surgery.hosts.shards import Written
from surgery.io.fingerprint import fingerprint
from surgery.io.octets import sha256_of
from surgery.io.regular import contained
from surgery.io.strict_json import read_json
from surgery.procedures.planning.plan import Plan, describe
from surgery.procedures.planning.treatment import Treatment
from surgery.procedures.writing.small_files import RECEIPT, SmallFiles

FORMAT = 2
VERSION = version("model-surgery")  # read early: where memory is lacking, it says that there is no such package


class Receipt:
    """A watch of a merge, which keeps each tensor's largest change, and what survived; `finish` gives the receipt."""

    def __init__(self, base: Checkpoint, adapters: Sequence[Weighted], plan: Plan) -> None:
        self.base, self.adapters, self.plan = base, adapters, plan
        self.largest: dict[str, float] = {}
        self.survival: dict[str, Survival] = {}  # of weights whose format cannot hold all

    def __call__(self, tile: MergedTile) -> None:
        name = tile.change.site.weight.name
        change = largest_change(tile.merged, torch.zeros(1) if tile.original is None else tile.original)
        self.largest[name] = max(change, self.largest.get(name, 0.0))
        survival = tile.survival
        if survival is not None:
            self.survival[name] = self.survival.get(name, Survival()).plus(survival)

    def survived(self) -> Survival | None:
        """In all; None where every format holds all."""
        return total(self.survival) if self.survival else None

    def finish(
        self,
        readings: Sequence[Reading],
        written: Mapping[str, Written],
        files: SmallFiles,
        treatment: Treatment,
        undo_record: str | None,
    ) -> dict[str, Any]:
        """The receipt, from the hashes of all that was read and written, and of the undo record if there is one."""
        base_sha256 = base_fingerprint(self.base, readings)
        before = {name: digest for one in readings for name, digest in one.tensors.items()}
        after = {name: digest for one in written.values() for name, digest in one.tensors.items()}
        changed = {one.site.written: self._changed(one, before, after) for one in self.plan.changes}
        changed |= {
            info.name: {"beside": one.site.written, "sha256": after[info.name]}
            for one in self.plan.changes
            for info in (standing(one) if one.into else ())
            if info.name != one.site.written
        }
        named = zip(map(self.base.written_name, self.base.files), readings, strict=True)
        return {
            "format": FORMAT,
            "base": {
                **_origin(self.base),
                "files": {name: one.whole() for name, one in named},
                "fingerprint": base_sha256,
            },
            "adapters": [_told_of(*each) for each in zip(self.adapters, self.plan.laid, strict=True)],
            "options": treatment.to_json(),
            "changed": changed,
            "untouched": {name: digest for name, digest in after.items() if name not in changed},
            "files": {name: one.sha256 for name, one in written.items()},
            "carried": files.sha256,
            "left_out": files.left_out,
            "reversible": undo_record is not None,
            "undo_record": undo_record,
            "notes": list(self.plan.notes),
            **({} if (survived := self.survived()) is None else {"survived": survived.to_json()}),
            "tools": tools(),
        }

    def _changed(self, change: Change, before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
        name = change.site.weight.name
        hashes = {"base_sha256": self._origin_sha256(change, before), "sha256": after[change.site.written]}
        survived = self.survival[name].to_json() if name in self.survival else {}
        return {**describe(change), "largest_change": self.largest.get(name, 0.0).hex(), **hashes, **survived}

    def _origin_sha256(self, change: Change, before: Mapping[str, str]) -> str | dict[str, str] | None:
        """Of the base's weight; of each tensor that holds it, where there are several."""
        if change.origin is None:
            return None
        name = change.origin.weight.name
        return {one: before[one] for one in self.base.holding(name)} if name in self.base.packed else before[name]


def _origin(one: Checkpoint | Adapter) -> dict[str, Any]:
    """Repository and commit, of what came from the Hub."""
    return {} if one.hub_id is None else {"hub_id": one.hub_id, "commit": one.commit}


def _told_of(one: Weighted, laid: Weighted) -> dict[str, Any]:
    """Where an adapter came from, its hashes, and how it was read where there is a choice.

    `laid` is the adapter with what its files leave to be drawn.
    """
    adapter, weight = one
    drawn = {} if adapter.shared else {name: sha256_of(held) for name, held in laid.adapter.named_shared().items()}
    hashes = {"sha256": dict(adapter.sha256), "digest": adapter.digest}
    chosen = {} if adapter.mha_out_proj_scale is None else {"mha_out_proj_scale": adapter.mha_out_proj_scale}
    return {**_origin(adapter), **hashes, "weight": weight.hex(), **chosen, **({"drawn": drawn} if drawn else {})}


def base_fingerprint(base: Checkpoint, readings: Sequence[Reading]) -> str:
    """The fingerprint of all its tensors: equal for any sharding."""
    for reading in readings:
        reading.complete()
    return fingerprint((info, readings[base.file_of(info.name)].tensors[info.name]) for info in base.tensors())


def tools() -> dict[str, str]:
    """Versions; no comparison reads them."""
    return {"surgery": VERSION, "torch": torch.__version__, "python": platform.python_version()}


def read_receipt(folder: Path) -> dict[str, Any]:
    """The receipt in a merged folder. InputError if there is none."""
    path = folder / RECEIPT
    if not path.is_file():
        raise InputError(
            f"{printable(folder)}: no {RECEIPT} in it; give base and adapter too, and it is checked by deriving it anew"
        )
    receipt = read_json(contained(folder, RECEIPT))
    if receipt.get("format") != FORMAT or not _sound(receipt):
        raise FormatError(f"{printable(path)}: not a receipt of format {FORMAT}; was it edited?")
    return receipt


def _sound(receipt: Mapping[str, Any]) -> bool:
    """Are the hashes in it there, each by its name?"""
    tables = [receipt.get(name) for name in ("base", "changed", "files", "untouched", "carried")]
    if not all(isinstance(one, dict) for one in tables) or not isinstance(receipt.get("adapters"), list):
        return False
    changed = [one.get("sha256") if isinstance(one, dict) else None for one in receipt["changed"].values()]
    hashes = [held for name in ("files", "untouched", "carried") for held in receipt[name].values()]
    return all(isinstance(one, str) for one in (*changed, *hashes))
