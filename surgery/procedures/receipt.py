"""Receipt: what went into a merge, what was done, and what came out; no times, no paths of the machine."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from surgery.core.arithmetic import largest_change
from surgery.errors import FormatError, InputError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.views import MergedTile
from surgery.io.octets import Tally
from surgery.io.strict_json import read_json
from surgery.procedures.plan import Plan, Weighted, describe
from surgery.procedures.small_files import RECEIPT, SmallFiles

FORMAT = 1


class Receipt:
    """A watch of a merge, which keeps each tensor's largest change; `finish` gives the receipt."""

    def __init__(self, base: Checkpoint, adapters: Sequence[Weighted], plan: Plan) -> None:
        self.base, self.adapters, self.plan = base, adapters, plan
        self.largest: dict[str, float] = {}

    def __call__(self, tile: MergedTile) -> None:
        name = tile.change.site.weight.name
        self.largest[name] = max(largest_change(tile.merged, tile.original), self.largest.get(name, 0.0))

    def finish(
        self,
        read: Sequence[Tally],
        written: Mapping[str, Tally],
        files: SmallFiles,
        dtype: torch.dtype | None,
        reversible: bool,
    ) -> dict[str, Any]:
        """The receipt, from the hashes of all that was read and written."""
        before = {name: digest for tally in read for name, digest in tally.tensors.items()}
        after = {name: digest for tally in written.values() for name, digest in tally.tensors.items()}
        changed = {}
        for change in self.plan.changes:
            name = change.site.weight.name
            hashes = {"base_sha256": before[name], "sha256": after[name]}
            changed[name] = {**describe(change), "largest_change": self.largest[name].hex(), **hashes}
        base_files = {
            self.base.written_name(f): t.whole.hexdigest() for f, t in zip(self.base.files, read, strict=True)
        }
        return {
            "format": FORMAT,
            "base": {"files": base_files},
            "adapters": [{"sha256": dict(one.sha256), "weight": weight.hex()} for one, weight in self.adapters],
            "options": {"arithmetic": "exact", "dtype": None if dtype is None else str(dtype).removeprefix("torch.")},
            "changed": changed,
            "untouched": {name: digest for name, digest in after.items() if name not in changed},
            "files": {name: tally.whole.hexdigest() for name, tally in written.items()},
            "carried": sorted(files.carried),
            "left_out": files.left_out,
            "reversible": reversible,
            "notes": list(self.plan.notes),
            "tools": tools(),
        }


def tools() -> dict[str, str]:
    """Versions; no comparison reads them."""
    return {"surgery": version("model-surgery"), "torch": torch.__version__, "python": platform.python_version()}


def read_receipt(folder: Path) -> dict[str, Any]:
    """The receipt in a merged folder. InputError if there is none."""
    path = folder / RECEIPT
    if not path.is_file():
        raise InputError(
            f"{printable(folder)}: no {RECEIPT} in it; give base and adapter too, and it is checked by deriving it anew"
        )
    receipt = read_json(path)
    wanted = {"files": dict, "changed": dict, "untouched": dict}
    if receipt.get("format") != FORMAT or not all(isinstance(receipt.get(k), kind) for k, kind in wanted.items()):
        raise FormatError(f"{printable(path)}: not a receipt of format {FORMAT}; was it edited?")
    return receipt
