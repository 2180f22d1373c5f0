"""surgery extract: its table and data, and its exit codes."""

from pathlib import Path

import torch
from outcomes import Run, parsed, rows, told
from quantized_folders import quantized_base

import surgery


def test_the_table_tells_rank_and_error_of_each_site(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    tuned = surgery.merge_checkpoint(base, adapter, tmp_path / "tuned").out
    found = run("extract", base, tuned, tmp_path / "out", "--rank", "4", "--report", tmp_path / "report.md")
    assert (found.code, found.err) == (0, "")
    assert all(float(cells[-1]) < 1 for cells in rows(found)[:-1])
    assert (tmp_path / "report.md").is_file()
    data = parsed(run("extract", base, tuned, tmp_path / "out", "--rank", "4", "--overwrite", "--json"))
    again = surgery.extract(base, tuned, tmp_path / "out", rank=4, overwrite=True)
    assert data == again.to_json()
    assert again.relative_error is not None
    assert again.relative_error <= torch.finfo(torch.bfloat16).eps  # half of it for weights twice the delta's size


def test_no_rank_is_code_2_equal_models_are_code_3_and_an_output_that_exists_is_code_6(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    assert "neither --rank nor --energy" in told(run("extract", base, base, tmp_path / "out"), 2)
    assert "every tensor is as in the base" in told(run("extract", base, base, tmp_path / "out", "--rank", "4"), 3)
    tuned = surgery.merge_checkpoint(base, adapter, tmp_path / "tuned").out
    told(run("extract", base, tuned, adapter, "--rank", "4"), 6)
    assert not (tmp_path / "out").exists()


def test_quantized_weights_are_code_3(run: Run, tmp_path: Path) -> None:
    base = quantized_base(tmp_path / "base", "nf4")
    assert "is quantized; plain weights are wanted" in told(
        run("extract", base, base, tmp_path / "o", "--rank", "2"), 3
    )
