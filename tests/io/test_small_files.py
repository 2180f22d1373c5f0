"""Files that are written whole or not at all, removed, and read, and what is told where the disk refuses."""

import errno
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest

from surgery.errors import AbsentError, EnvironmentFault
from surgery.io import disk
from surgery.io.durable import faults, remove_other, write_file
from surgery.io.regular import file_sha256
from surgery.io.staging import Staging


def test_processes_that_write_one_file_at_once_leave_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of DDP save one adapter: another writes all of it while this one is about to give it its name."""
    path, sync, data = tmp_path / "a", disk.sync, b"the same in both"
    code = f"from surgery.io.durable import Path, write_file; write_file(Path({str(path)!r}), {data!r})"

    def beside(descriptor: int) -> None:
        monkeypatch.setattr(disk, "sync", sync)
        subprocess.run([sys.executable, "-c", code], check=True)
        assert path.read_bytes() == data
        sync(descriptor)

    monkeypatch.setattr(disk, "sync", beside)
    write_file(path, data)
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_goes_only_where_it_holds_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    remove_other(path, b"x")  # of none nothing is to be removed
    path.write_bytes(b"x")
    remove_other(path, b"x")
    assert path.exists()
    remove_other(path, b"y")
    assert not path.exists()


def test_what_is_absent_stays_so_among_the_faults_of_a_disk(tmp_path: Path) -> None:
    with pytest.raises(AbsentError), faults(tmp_path):
        raise AbsentError("x: not there")
    with pytest.raises(EnvironmentFault, match="No such file"), faults(tmp_path):
        (tmp_path / "x").read_bytes()


class Broken(BytesIO):
    """A file that a disk gives the first part of."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


def test_a_disk_that_stops_reading_is_told_of_the_file_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "notes.txt"
    monkeypatch.setattr("surgery.io.regular.open_regular", lambda *_: Broken(b"x" * (1 << 21)))
    with pytest.raises(EnvironmentFault, match=r"notes\.txt: reading failed"):
        file_sha256(source)
    with pytest.raises(EnvironmentFault, match=r"notes\.txt: reading failed"), Staging(tmp_path / "out") as staging:
        staging.carry(source, "notes.txt")
    assert list(tmp_path.iterdir()) == []
