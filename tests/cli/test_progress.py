"""What is said while files are written: nothing at once, a line every few seconds, a bar on a terminal."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from outcomes import Run

import surgery
from surgery.cli.progress import EVERY_S, lines
from surgery.procedures.writing.filling import Progress


def test_a_line_is_printed_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    told = lines("merging", lambda: now)
    for share in range(0, 101, 10):
        told(Progress(share * 10_000_000, 1_000_000_000))
        now += EVERY_S / 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "merging: 200 of 1,000 MB, 20 %"
    assert [line.rpartition(", ")[2] for line in printed] == ["20 %", "40 %", "60 %", "80 %", "100 %"]


@pytest.mark.parametrize(
    ("done", "total", "line"),
    [
        (0, 0, "0 of 0 bytes, 0 %"),
        (40, 80, "40 of 80 bytes, 50 %"),
        (1_234, 99_999, "1,234 of 99,999 bytes, 1 %"),
        (40_000, 100_000, "40 of 100 kB, 40 %"),
        (1_500_000, 3_000_000, "1,500 of 3,000 kB, 50 %"),
        (1_500_000, 300_000_000, "2 of 300 MB, 0 %"),
        (16_000_000_000, 32_000_000_000, "16,000 of 32,000 MB, 50 %"),
        (16_000_000_000, 140_000_000_000, "16 of 140 GB, 11 %"),
    ],
)
def test_its_unit_fits_the_size(capsys: pytest.CaptureFixture[str], done: int, total: int, line: str) -> None:
    clock = iter((0.0, EVERY_S, EVERY_S))
    lines("exporting", lambda: next(clock))(Progress(done, total))
    assert capsys.readouterr().err == f"exporting: {line}\n"


def test_a_short_run_says_nothing(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("merge", base, adapter, tmp_path / "out").err == ""


def test_a_callback_sees_the_bytes_grow_to_all_of_them(base: Path, adapter: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    surgery.merge_checkpoint(base, adapter, tmp_path / "out", reversible=True, progress=seen.append)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    done = [one.done_bytes for one in seen]
    assert done == sorted(done)
    assert seen[-1] == Progress(size, size)
    seen.clear()
    surgery.unmerge_checkpoint(tmp_path / "out", tmp_path / "back", progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes


def test_a_bar_is_shown_on_a_terminal_and_taken_away(base: Path, adapter: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "surgery", "merge", str(base), str(adapter), str(tmp_path / "out")]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"}, check=True
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "merging" in shown
    assert "\x1b[2K" in shown  # the line is cleared at the end
    assert done.stdout.endswith(b"5 carried as bytes\n")
