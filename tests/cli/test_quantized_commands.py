"""Quantized bases on the command line: the same bytes as from Python, and the exit codes."""

from pathlib import Path

import pytest
import torch
from checkpoint_folders import file_hashes, write_adapter
from outcomes import Run, parsed, rows, told
from quantized_folders import SHAPES, SITES, quantized_base

import surgery


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return quantized_base(tmp_path / "base", "nf4")


def laid(folder: Path, size: float) -> Path:
    drawn, given = torch.Generator().manual_seed(0), {}
    for site in SITES:
        out, in_features = SHAPES[site.rpartition(".")[2]]
        given[f"{site}.lora_A.weight"] = torch.randn(4, in_features, generator=drawn)
        given[f"{site}.lora_B.weight"] = torch.randn(out, 4, generator=drawn) * size
    return write_adapter(folder, given)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([], {}),
        (["--into", "16bit", "--compute-dtype", "float16"], {"into": "16bit", "compute_dtype": "float16"}),
        (["--into", "keep"], {"into": "keep"}),
        (["--into", "int8"], {"into": "int8"}),
    ],
    ids=["default", "16bit", "keep", "int8"],
)
def test_the_options_of_a_merge_are_those_of_the_function(
    options: list[str], arguments: dict[str, str], base: Path, tmp_path: Path, run: Run
) -> None:
    adapter = laid(tmp_path / "a", 0.2)
    found = run("merge", base, adapter, tmp_path / "cli", *options)
    assert found.code == 0
    assert ("retained" in found.out) == bool({"keep", "int8"} & set(options))
    surgery.merge_checkpoint(base, adapter, tmp_path / "python", **arguments)
    assert file_hashes(tmp_path / "cli") == file_hashes(tmp_path / "python")
    judged = run("verify", base, adapter, tmp_path / "cli", *options[2:])
    assert (judged.code, "0 different" in judged.out) == (0, True)


@pytest.mark.parametrize("into", ["keep", "fp4", "int8"])
@pytest.mark.parametrize(
    ("size", "bounds", "loose"),
    [
        (0.0001, (), ("--min-retained", "0", "--max-noise", "99")),
        (0.2, ("--min-retained", "1.1"), ("--min-retained", "0.5")),
        (0.2, ("--max-noise", "0.001"), ("--max-noise", "1")),
    ],
    ids=["erased", "too little", "too much beside it"],
)
def test_a_lost_adapter_is_exit_code_4_and_names_the_way_out(
    into: str, size: float, bounds: tuple[str, ...], loose: tuple[str, ...], base: Path, tmp_path: Path, run: Run
) -> None:
    adapter = laid(tmp_path / "a", size)
    message = told(run("merge", base, adapter, tmp_path / "out", "--into", into, *bounds), 4)
    assert "--into 16bit keeps all of it" in message
    assert {"--min-retained", "--max-noise"} <= {*message.split()}
    assert not (tmp_path / "out").exists()
    assert run("merge", base, adapter, tmp_path / "out", "--into", into, *loose).code == 0
    assert run("merge", base, adapter, tmp_path / "plain", "--into", "16bit").code == 0


def test_the_plan_tells_what_each_weight_is_held_in(base: Path, tmp_path: Path, run: Run) -> None:
    adapter = laid(tmp_path / "a", 0.2)
    for options, word in (((), "from"), (("--into", "keep"), "in")):
        told_of = [row[-1] for row in rows(run("plan", base, adapter, *options))[: len(SITES)]]
        assert all(one.startswith(f"{word} bnb4, LoRA r=4 ") for one in told_of)
    assert {one["held"] for one in parsed(run("plan", base, adapter, "--json"))["changes"]} == {"bnb4"}


def test_options_that_mean_nothing_there_are_exit_code_2(base: Path, tmp_path: Path, run: Run) -> None:
    adapter = laid(tmp_path / "a", 0.2)
    assert run("merge", base, adapter, tmp_path / "out", "--base-as", "nf4").code == 2
    assert run("merge", base, adapter, tmp_path / "out", "--into", "nf5").code == 2
    assert run("verify", base, "--base-as", "nf4").code == 2
