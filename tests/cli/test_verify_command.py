"""surgery verify, in both forms: what it grades, and what it tells as a table and as JSON."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_folders import SITES, flip_byte, read_tensors, rewrite
from outcomes import Outcome, Run, parsed, rows, told

import surgery

TARGET = f"{SITES[1]}.weight"


@pytest.fixture
def merged(run: Run, base: Path, adapter: Path, tmp_path: Path) -> Path:
    assert run("merge", base, adapter, tmp_path / "out").code == 0
    return tmp_path / "out"


def test_a_merge_agrees_with_its_receipt(run: Run, merged: Path) -> None:
    assert run("verify", merged) == Outcome(0, "9 recorded, 0 different\n", "")
    assert parsed(run("verify", merged, "--json")) == surgery.verify_checkpoint(merged).to_json()


def test_both_spellings_derive_the_merge_anew(run: Run, base: Path, adapter: Path, merged: Path) -> None:
    inline = run("verify", base, adapter, merged)
    assert inline == Outcome(0, "4 bits, 5 untouched, 0 different\n", "")
    assert run("verify", merged, "--base", base, "--adapter", adapter) == inline
    data = parsed(run("verify", base, adapter, merged, "--json"))
    assert data == surgery.verify_checkpoint(base, adapter, merged).to_json()
    assert {name for name, one in data["tensors"].items() if one["grade"] == "bits"} == {f"{s}.weight" for s in SITES}


def test_weights_and_several_adapters_are_verified_in_both_spellings(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    twice = f"{adapter}=0.5", f"{adapter}=-2"
    assert run("merge", base, *twice, tmp_path / "out").code == 0
    assert run("verify", base, *twice, tmp_path / "out").code == 0
    options = [part for one in twice for part in ("--adapter", one)]
    assert run("verify", tmp_path / "out", "--base", base, *options).code == 0
    found = run("verify", base, adapter, tmp_path / "out")
    assert found.code == 4
    assert {cells[0]: cells[1] for cells in rows(found)[:-1]} == {f"{site}.weight": "different" for site in SITES}


@pytest.mark.parametrize("derived", [False, True])
def test_a_changed_tensor_is_named(derived: bool, run: Run, base: Path, adapter: Path, merged: Path) -> None:
    changed = read_tensors(merged)[TARGET]
    changed[-1, -1] += 64
    rewrite(merged / "model.safetensors", {TARGET: changed})
    given = (base, adapter, merged) if derived else (merged,)
    listed, data = run("verify", *given), parsed(run("verify", *given, "--json"))
    assert listed.code == 4
    different = {name for name, one in data["tensors"].items() if one["grade"] == "different"}
    assert different == ({TARGET} if derived else {TARGET, "model.safetensors"})
    assert {cells[0] for cells in rows(listed)[:-1]} == different
    assert data["ok"] is False


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_json_of_a_poisoned_merge_is_json(value: float, run: Run, base: Path, adapter: Path, merged: Path) -> None:
    poisoned = read_tensors(merged)[TARGET]
    poisoned[0, 0] = value
    rewrite(merged / "model.safetensors", {TARGET: poisoned})
    found = run("verify", base, adapter, merged, "--json")
    assert found.code == 4
    assert parsed(found)["tensors"][TARGET]["grade"] == "different"


def test_verify_writes_nothing_and_needs_a_receipt_or_the_base(run: Run, base: Path, merged: Path) -> None:
    flip_byte(merged / "model.safetensors")
    before = sorted(merged.parent.rglob("*"))
    assert run("verify", merged).code == 4
    assert "surgery.receipt.json" in told(run("verify", base), 3)
    assert sorted(merged.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (["--base-as", "nf4"], ["base_as nf4"]),
        (["--base-as", "nf4", "--compute-dtype", "float16"], ["base_as nf4", "compute_dtype float16"]),
        (["--arithmetic", "peft"], ["arithmetic peft"]),
        (["--op", "q_proj=linear"], ["ops q_proj=linear"]),
    ],
)
def test_what_a_receipt_tells_needs_not_be_given_again_and_the_report_says_so(
    made: list[str], told: list[str], run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out, notes = tmp_path / "out", [f"{one} as the receipt tells" for one in told]
    assert run("merge", base, adapter, out, *made).code == 0
    found = run("verify", base, adapter, out)
    assert found == Outcome(0, "; ".join(["4 bits, 5 untouched, 0 different", *notes]) + "\n", "")
    assert parsed(run("verify", base, adapter, out, "--json"))["notes"] == notes
    (out / "surgery.receipt.json").unlink()
    assert run("verify", base, adapter, out, *made) == Outcome(0, "4 bits, 5 untouched, 0 different\n", "")


@pytest.mark.parametrize(
    ("made", "given", "note"),
    [
        (["--base-as", "nf4"], ["--base-as", "int8"], "base_as int8 is given, and the receipt tells nf4"),
        ([], ["--base-as", "nf4"], "base_as nf4 is given, and the receipt tells none"),
        (["--arithmetic", "peft"], ["--arithmetic", "exact"], "arithmetic exact is given, and the receipt tells peft"),
    ],
)
def test_an_option_that_contradicts_the_receipt_is_told(
    made: list[str], given: list[str], note: str, run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("merge", base, adapter, out, *made).code == 0
    found = run("verify", base, adapter, out, *given)
    assert note in found.out
    assert found.code == (4 if "--base-as" in given else 0)


@pytest.mark.parametrize(
    "options",
    [
        {"base_as": "nf5"},
        {"base_as": 5},
        {"ops": {"q_proj": "conv2d"}},
        {"ops": {"q": 1}},
        {"ops": ["q_proj"]},
        {"rounding": "up"},
        {"rounding": ["feedback"]},
        {"compute_dtype": ["float32"]},
        {"base_as": "nf4", "arithmetic": "peft"},
    ],
)
def test_a_receipt_of_options_that_are_none_is_damaged(
    options: dict[str, object], run: Run, base: Path, adapter: Path, merged: Path
) -> None:
    path = merged / "surgery.receipt.json"
    receipt = json.loads(path.read_text())
    path.write_text(json.dumps(receipt | {"options": receipt["options"] | options}))
    assert told(run("verify", base, adapter, merged), 3).endswith("; was it edited?")


def test_an_option_that_cannot_stand_beside_a_recorded_one_is_told_so(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    assert run("merge", base, adapter, tmp_path / "out", "--base-as", "nf4").code == 0
    message = told(run("verify", base, adapter, tmp_path / "out", "--arithmetic", "peft"), 2)
    assert message.startswith("verify: beside what the receipt tells: --base-as is given, and --arithmetic peft;")


@pytest.mark.parametrize("scale", ["1", 3, [1], True])
def test_a_receipt_of_a_scale_that_is_none_is_damaged(
    scale: object, run: Run, base: Path, adapter: Path, merged: Path
) -> None:
    path = merged / "surgery.receipt.json"
    receipt = json.loads(path.read_text())
    receipt["adapters"][0]["mha_out_proj_scale"] = scale
    path.write_text(json.dumps(receipt))
    assert told(run("verify", base, adapter, merged), 3).endswith("; was it edited?")


def test_a_receipt_without_a_table_of_options_is_damaged(run: Run, base: Path, adapter: Path, merged: Path) -> None:
    path = merged / "surgery.receipt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"options": ["nf4"]}))
    assert told(run("verify", base, adapter, merged), 3).endswith("options is no table; was it edited?")


def test_outputs_are_refused_of_a_base_as_a_form_by_the_receipt_too(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    assert run("merge", base, adapter, tmp_path / "out", "--base-as", "nf4").code == 0
    assert "--base-as" in told(run("verify", base, adapter, tmp_path / "out", "--outputs"), 2)


def test_a_merge_as_peft_is_planned_made_and_verified_by_the_commands(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("plan", "--arithmetic", "peft-safe", base, adapter).code == 0
    assert run("merge", "--arithmetic", "peft-safe", base, adapter, out).code == 0
    assert "0 different" in run("verify", base, adapter, out).out
    assert "rounding" not in run("verify", base, adapter, out).out
    assert "rounding" in run("verify", "--arithmetic", "exact", base, adapter, out).out
    assert run("verify", "--arithmetic", "peft", out).code == 2
