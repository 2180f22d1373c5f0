"""Disk: every system call that changes the disk, one function each, so that a test can fail, trace or stop at any.

Each raises OSError as the system gives it; who calls them says what was being written.
"""

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

_HERE = -100  # AT_FDCWD: paths are relative to the working folder
_NOREPLACE, _EXCHANGE = 1, 2
_BEGIN = 2  # SYNC_FILE_RANGE_WRITE: without waiting
_LACKING = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP})  # by the system, or by the file system


def make_folder(path: Path) -> None:
    """The folder and its parents; no error where it is there already."""
    path.mkdir(parents=True, exist_ok=True)


def create(path: Path) -> int:
    """A descriptor to write a file that was not there."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def allocate(descriptor: int, size: int) -> None:
    """Take the file's room on the disk now, so that a full disk shows before the work is done."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _LACKING:
                raise


def write(descriptor: int, data: memoryview) -> int:
    """Write some of `data`; returns how many bytes."""
    return os.write(descriptor, data)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """All of `data`, however often `write` stops short."""
    view = memoryview(data)
    while view:
        done = write(descriptor, view)
        if done == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view = view[done:]


def begin_sync(descriptor: int, start: int, size: int) -> None:
    """Let the disk begin with these bytes of the file, where the system can be told to; what fails shows in `sync`."""
    call = _call("sync_file_range")
    if call is not None:
        call(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), _BEGIN)


def sync(descriptor: int) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    os.fsync(descriptor)


def rename(old: Path, new: Path) -> None:
    """Give a file another name; a file of that name is replaced."""
    old.rename(new)


def place(old: Path, new: Path) -> None:
    """Give a folder another name. FileExistsError if there is something of that name."""
    if not _renameat2(old, new, _NOREPLACE):
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
        old.rename(new)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places at once; false where this system cannot."""
    return _renameat2(one, other, _EXCHANGE)


def remove(path: Path) -> None:
    """Remove a file or a link."""
    path.unlink()


def remove_folder(path: Path) -> None:
    """Remove an empty folder."""
    path.rmdir()


@cache
def _call(name: str) -> Any:
    """A function of the C library; None where it is missing."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def _renameat2(old: Path, new: Path, flag: int) -> bool:
    """Linux's renameat2; false where it is missing."""
    call = _call("renameat2")
    if call is None:
        return False
    if call(_HERE, os.fsencode(old), _HERE, os.fsencode(new), flag) == 0:
        return True
    found = ctypes.get_errno()
    if found in _LACKING:
        return False
    raise OSError(found, os.strerror(found), str(old), None, str(new))
