"""Lock: one run at a time for an output, held by a file beside it that bears the run's process id."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from surgery.errors import OutputExistsError, printable
from surgery.io import disk


class Lock:
    """Taken when made. OutputExistsError if another run holds it. The system lets go of it when a run dies."""

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(f".{out.name}.surgery-lock")
        self.descriptor = -1
        while self.descriptor < 0:
            self.descriptor = self._taken(out)

    def release(self) -> None:
        with suppress(OSError):  # a file that stays holds nobody off
            disk.remove(self.path)  # while it is held, so that nobody takes the lock of a file that is gone
        os.close(self.descriptor)

    def _taken(self, out: Path) -> int:
        """A descriptor that holds the lock; -1 where the file was removed meanwhile by a run that ended."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _hold_off(descriptor, out)
            if _same_file(descriptor, self.path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return -1


def _hold_off(descriptor: int, out: Path) -> None:
    """OutputExistsError if another run does so already."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        raise OutputExistsError(
            f"{printable(out)}: another run is writing it (process {printable(holder) or 'unknown'}); wait for that one"
        ) from error


def _same_file(descriptor: int, path: Path) -> bool:
    """Is the open file still the one of that name?"""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
