"""Every input of the zoo through `surgery merge`: refused at once in one line, or rightly merged; inputs untouched."""

import time
from pathlib import Path

import pytest
from merging import listing, merged, refuses
from zoo import ZOO

import surgery

SECONDS = 2.0


@pytest.mark.parametrize("name", [name for name, (_, code) in ZOO.items() if code == 3])
def test_a_bad_input_is_refused_in_one_line_and_in_time(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(folder)
    ZOO[name].damage(folder)
    assert listing(folder) != before
    start = time.process_time()
    line = refuses(folder, capsys)
    assert time.process_time() - start < SECONDS
    assert str(folder) in line or line.startswith(("surgery: 0", "surgery: 1")), "it names a file or a tensor"
    assert len(line) < 3 * len(str(folder)) + 900


@pytest.mark.parametrize("name", [name for name, (_, code) in ZOO.items() if code == 0])
def test_an_odd_input_is_rightly_merged(folder: Path, name: str) -> None:
    ZOO[name].damage(folder)
    before = listing(folder / "base") | listing(folder / "adapter")
    start = time.process_time()
    assert not merged(folder)
    assert time.process_time() - start < SECONDS
    assert listing(folder / "base") | listing(folder / "adapter") == before
    report = surgery.verify_checkpoint(folder / "base", folder / "adapter", folder / "out")
    assert {one.grade for one in report.tensors.values()} <= {"bits", "untouched"}
