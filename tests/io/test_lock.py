"""The lock of an output: where the disk refuses it, nothing is left open."""

import errno
import os
from pathlib import Path

import pytest

from surgery.io.lock import Lock


def opened() -> set[str]:
    """What this process has open."""
    return {str(one.readlink()) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()}


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fstat"])
def test_a_lock_that_cannot_be_written_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(OSError, match="Input/output error"):
            Lock(tmp_path / "out")
    assert not [name for name in opened() if name.startswith(str(tmp_path))]
    lock = Lock(tmp_path / "out")  # and another run may have it
    assert [name for name in opened() if name.startswith(str(tmp_path))] == [str(lock.path)]
    lock.release()
    assert list(tmp_path.iterdir()) == []
