"""surgery diff: what differs as a table, as JSON and as report files; exit code 4 only where it is asked for."""

import json
import xml.etree.ElementTree as Xml
from pathlib import Path

import pytest
import torch
from checkpoint_folders import base_tensors, file_hashes, rewrite, write_base
from outcomes import Outcome, Run, parsed, rows, told

import surgery
from surgery.api import checking

NAME = "model.layers.0.q_proj.weight"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkpoint of which one tensor has another value, one another dtype, and one is absent."""
    tensors = base_tensors(torch.bfloat16)
    tensors[NAME] = tensors[NAME].clone()
    tensors[NAME][0, 2] = 1.5  # it was 1
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    del tensors["model.scale"]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    return write_base(tmp_path / "other", tensors, shards=2, config=config)


@pytest.mark.parametrize("exit_code", [(), ("--exit-code",)])
def test_equal_models_are_code_0(exit_code: tuple[str, ...], run: Run, base: Path) -> None:
    assert run("diff", base, base / "model.safetensors", *exit_code) == Outcome(0, "9 equal\n", "")


def test_what_differs_is_listed_and_the_code_is_0(run: Run, base: Path, other: Path) -> None:
    found = run("diff", base, other)
    assert (found.code, found.err) == (0, "")
    listed = {cells[0]: cells[1:] for cells in rows(found)[:-1]}
    relative = f"{0.5 / float(base_tensors(torch.bfloat16)[NAME].double().norm()):.4g}"
    assert listed[NAME][:5] == ["values", "bfloat16 [6, 6]", "1 of 36", "0.5", "64"]
    assert listed[NAME][-1] == relative
    assert listed["model.norm.weight"][:3] == ["dtype", "bfloat16 [6] -> float32 [6]", "0 of 6"]
    assert listed["model.scale"] == ["only in a", "bfloat16 [] -> absent"]
    assert listed["config.json dtype"] == ["config", '"bfloat16" -> "float32"']
    assert len(listed) == 4
    summary = "6 equal, 1 of other values, 1 of another dtype, 1 only in A, 1 in config.json"
    assert found.out.splitlines()[-1] == summary


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_with_exit_code_a_difference_is_code_4(as_json: tuple[str, ...], run: Run, base: Path, other: Path) -> None:
    found = run("diff", base, other, "--exit-code", *as_json)
    assert f"{base}, {other}: 6 equal, 1 of other values" in told(found, 4)
    assert found.out == run("diff", base, other, *as_json).out


def test_json_is_what_the_function_gives(run: Run, base: Path, other: Path) -> None:
    data = parsed(run("diff", base, other, "--json"))
    assert data == surgery.diff(base, other).to_json()
    assert data["equal"] is False
    assert data["config"] == {"dtype": {"a": "bfloat16", "b": "float32"}}
    assert data["tensors"][NAME]["max_ulps"] == 64


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_json_of_what_is_not_finite_is_json(value: float, run: Run, base: Path, other: Path) -> None:
    poisoned = base_tensors(torch.bfloat16)[NAME].clone()
    poisoned[0, 0] = value
    write_base(other.parent / "poisoned", base_tensors(torch.bfloat16) | {NAME: poisoned})
    found = parsed(run("diff", base, other.parent / "poisoned", "--json"))["tensors"][NAME]
    assert (found["differing"], found["not_finite"], found["norm_difference"]) == (1, 1, None)


def test_reports_are_written_in_every_format_with_either_code(
    run: Run, base: Path, other: Path, tmp_path: Path
) -> None:
    before = file_hashes(base), file_hashes(other)
    options = [part for name in ("r.json", "r.md", "r.xml") for part in ("--report", tmp_path / name)]
    assert run("diff", base, other, *options).code == 0
    written = {name: (tmp_path / name).read_text() for name in ("r.json", "r.md", "r.xml")}
    assert run("diff", base, other, "--exit-code", *options).code == 4
    assert written == {name: (tmp_path / name).read_text() for name in written}
    assert written["r.json"] == run("diff", base, other, "--json").out
    suite = Xml.fromstring(written["r.xml"])
    failures = {test.get("name"): one.get("message") or "" for test in suite for one in test.iter("failure")}
    assert (suite.get("tests"), suite.get("failures")) == ("10", "4")
    assert failures[NAME].startswith("bfloat16 [6, 6]; differing 1 of 36; max abs error 0.5; max ulps 64; ")
    assert failures["config.json dtype"] == '"bfloat16" -> "float32"'
    assert f"| `{NAME}` | values | bfloat16 \\[6, 6\\] | 1 of 36 | 0.5 | 64 |" in written["r.md"]
    assert (file_hashes(base), file_hashes(other)) == before


def test_hostile_names_and_values_are_escaped(run: Run, base: Path, tmp_path: Path) -> None:
    name = "x\x1b[31m\r\n|\u202e"
    config = {name: f"{name}</testcase>"}
    hostile = write_base(tmp_path / "hostile", base_tensors(torch.bfloat16), config=config)
    rewrite(hostile / "model.safetensors", {name: torch.ones(2)})
    options = [part for ending in ("json", "md", "xml") for part in ("--report", tmp_path / f"r.{ending}")]
    found = run("diff", base, hostile, *options)
    assert all(line.isprintable() for line in found.out.split("\n"))
    assert all(line.isprintable() for line in (tmp_path / "r.md").read_text().split("\n"))
    assert Xml.parse(tmp_path / "r.xml").getroot().get("failures") == "5"
    assert name in json.loads((tmp_path / "r.json").read_text())["tensors"]


def test_a_missing_model_is_code_3_and_a_wrong_ending_is_code_2(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such file or folder" in told(run("diff", base, "missing"), 3)
    assert "no such file or folder" in told(run("diff", "missing", base), 3)
    monkeypatch.setattr(checking, "diff", lambda *_: pytest.fail("it was read"))
    told(run("diff", base, base, "--report", "r.html"), 2)
