"""What a merge into a format, and its check, have in memory of a weight: some rows of it, and its scales."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import file_hashes, write_adapter, write_base
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import surgery
from surgery.api import files
from surgery.core.source import TILE_ELEMENTS
from surgery.hosts.checkpoint import Checkpoint
from surgery.procedures.checking.verify import verify_checkpoint
from surgery.procedures.planning.treatment import HELD_IN, Treatment
from surgery.procedures.writing.filling import Pace
from surgery.procedures.writing.unmerge_checkpoint import unmerge_checkpoint

ANY: dict[str, Any] = {"min_retained": -math.inf, "max_noise": math.inf}
COLUMNS = 512
FEW, MANY = (TILE_ELEMENTS // COLUMNS // 8 * eighths for eighths in (9, 20))  # rows, of which a tile has less


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        found = [one.numel() for one in tree_leaves(made) if isinstance(one, Tensor) and not one.is_meta]
        self.elements = max(self.elements, *found, 0)
        return made


def largest(folder: Path, rows: int, options: dict[str, Any]) -> int:
    """While a weight of so many rows is merged and checked."""
    drawn = torch.Generator().manual_seed(0)
    site = "model.layers.0.q_proj"
    weight = torch.randn(rows, COLUMNS, generator=drawn).bfloat16()
    base = write_base(folder / "base", {f"{site}.weight": weight}, config={"model_type": "llama", "dtype": "bfloat16"})
    factors = {"A": torch.randn(4, COLUMNS, generator=drawn), "B": torch.randn(rows, 4, generator=drawn)}
    adapter = write_adapter(folder / "adapter", {f"{site}.lora_{role}.weight": one for role, one in factors.items()})
    with Largest() as seen:
        surgery.merge_checkpoint(base, adapter, folder / "out", **options, **(ANY if "into" in options else {}))
        treatment = Treatment.of(base_as=options.get("base_as"))
        with Checkpoint(base) as before, Checkpoint(folder / "out") as after:
            assert verify_checkpoint(before, files.weighted(adapter), after, treatment, workers=1).ok
    return seen.elements


def largest_undone(folder: Path, rows: int) -> int:
    """While a merge into a format is undone, whose record holds the weight itself."""
    weight = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()
    base = write_base(folder / "base", {"q_proj.weight": weight}, config={"model_type": "llama", "dtype": "bfloat16"})
    pair = {"q_proj.lora_A.weight": torch.ones(4, COLUMNS), "q_proj.lora_B.weight": torch.ones(rows, 4)}
    adapter = write_adapter(folder / "adapter", pair)
    surgery.merge_checkpoint(base, adapter, folder / "out", into="nf4", reversible=True, **ANY)
    with Largest() as seen:
        unmerge_checkpoint(folder / "out", folder / "back", pace=Pace(workers=1))
    assert file_hashes(folder / "back") == file_hashes(base)
    return seen.elements


def test_an_undo_holds_some_rows_of_a_weight_that_is_in_its_record(tmp_path: Path) -> None:
    few, many = largest_undone(tmp_path / "few", FEW), largest_undone(tmp_path / "many", MANY)
    assert few == many <= TILE_ELEMENTS


@pytest.mark.parametrize(
    "options",
    [*({"into": form} for form in HELD_IN if form != "mxfp4"), {"base_as": "nf4-double"}],
    ids=lambda options: "-".join(options.values()),
)
def test_no_tensor_grows_with_the_rows_of_the_weight(options: dict[str, Any], tmp_path: Path):
    assert largest(tmp_path / "few", FEW, options) == largest(tmp_path / "many", MANY, options)
