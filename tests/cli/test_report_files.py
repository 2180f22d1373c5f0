"""--report: the same report as a file of JSON, Markdown or JUnit, whatever the verdict."""

import json
import xml.etree.ElementTree as Xml
from pathlib import Path

import pytest
import torch
from checkpoint_folders import flip_byte, read_tensors, rewrite
from outcomes import Run, told

from surgery.api import checking

NAMES = ("r.json", "deep/er/r.md", "r.XML")


@pytest.fixture
def merged(run: Run, base: Path, adapter: Path, tmp_path: Path) -> Path:
    assert run("merge", base, adapter, tmp_path / "out").code == 0
    return tmp_path / "out"


def _options(folder: Path) -> list[object]:
    return [part for name in NAMES for part in ("--report", folder / name)]


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("good", [False, True])
def test_every_report_is_written_for_either_verdict(
    good: bool, derived: bool, run: Run, base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    if not good:
        flip_byte(merged / "model.safetensors")
    call = ["verify", *([base, adapter] if derived else []), merged]
    found = run(*call, *_options(tmp_path))
    assert found.code == (0 if good else 4)
    assert found == run(*call)
    assert (tmp_path / "r.json").read_text() == run(*call, "--json").out
    data = json.loads((tmp_path / "r.json").read_text())
    suite = Xml.parse(tmp_path / "r.XML").getroot()
    assert {test.get("name"): test.get("classname") for test in suite} == {
        name: one["grade"] for name, one in data["tensors"].items()
    }
    assert suite.get("failures") == str(data["counts"]["different"]) == ("0" if good else "1" if derived else "2")
    assert found.out.splitlines()[-1] in (tmp_path / "deep/er/r.md").read_text().splitlines()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]


def test_a_name_with_control_characters_is_valid_in_every_format(
    run: Run, base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    rewrite(merged / "model.safetensors", {"x\x1b\x00\r\n|`\u202e</testcase>": torch.ones(2)})
    assert len(read_tensors(merged)) == 10
    assert run("verify", base, adapter, merged, *_options(tmp_path)).code == 4
    assert Xml.parse(tmp_path / "r.XML").getroot().get("failures") == "1"
    assert json.loads((tmp_path / "r.json").read_text())["counts"]["different"] == 1
    lines = (tmp_path / "deep/er/r.md").read_text().split("\n")
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("name", ["report", "report.txt", "report.json.gz", "json", ".xml", ""])
def test_another_ending_is_code_2_before_anything_is_read(
    name: str, run: Run, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "verify_checkpoint", lambda *_: pytest.fail("it was read"))
    message = told(run("verify", merged, "--report", tmp_path / "r.json", "--report", name), 2)
    assert ".json, .md, .xml" in message
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("good", [False, True])
@pytest.mark.parametrize("where", ["file/r.json", "folder.json", "/proc/self/r.xml", "n" * 300 + ".md"])
def test_a_report_that_cannot_be_written_is_code_5(
    where: str, good: bool, run: Run, merged: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder.json" / "full").mkdir(parents=True)
    if not good:
        flip_byte(merged / "model.safetensors")
    found = run("verify", merged, "--report", tmp_path / where)
    assert "writing failed" in told(found, 5)
    assert "different\n" in found.out


def test_a_report_replaces_an_older_one_whole(run: Run, merged: Path, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("old" * 10_000)
    assert run("verify", merged, "--report", tmp_path / "r.json").code == 0
    assert json.loads((tmp_path / "r.json").read_text())["ok"] is True
