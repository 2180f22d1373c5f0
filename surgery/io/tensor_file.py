"""TensorFile: one safetensors file, open for ranged reads."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import EnvironmentFault, InputError, printable
from surgery.io.header import Entry, Header, header_length, parse_header
from surgery.io.regular import open_descriptor

CHUNK_BYTES = 1 << 22
TICKS = 10  # steps of the wait below
_COARSE_CLOCK = 5  # Linux stamps files by it, every 1 to 10 ms


class TensorFile:
    """Reads with pread; refuses what is no regular file, and a file that changes while it is open."""

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, printable(path)
        self.descriptor = open_descriptor(path, "a safetensors file")
        self.state = _settled(self.descriptor)
        try:
            self.header = self._header()
        except BaseException:
            self.close()
            raise
        self.entries = {entry.info.name: entry for entry in self.header.entries}

    def read(self, start: int, size: int) -> bytearray:
        """`size` bytes from `start` of the file."""
        return read_at(self.descriptor, start, size, self.where)

    def chunks(self, entry: Entry) -> Iterator[memoryview]:
        """The bytes of one tensor, at most CHUNK_BYTES at a time; an empty chunk for no bytes."""
        start, end = entry.start, entry.start + entry.info.nbytes
        while True:
            size = min(CHUNK_BYTES, end - start)
            yield memoryview(self.read(start, size))
            start += size
            if start == end:
                return

    def check_unchanged(self) -> None:
        """InputError if the file, or what lies at its path, is no longer what was opened."""
        try:
            now = (os.fstat(self.descriptor), os.stat(self.path))  # noqa: PTH116  # as the other
        except OSError as error:
            raise InputError(f"{self.where}: it went away while it was read ({error.strerror}); run again") from error
        if any(_mark(one) != _mark(self.state) for one in now):
            raise InputError(f"{self.where}: it changed while it was read; let no one write to it, and run again")

    def close(self) -> None:
        os.close(self.descriptor)

    def _header(self) -> Header:
        size = self.state.st_size
        length = header_length(bytes(self.read(0, min(8, size))), size, self.where)
        return parse_header(bytes(self.read(0, length)), size, self.where)


def read_at(descriptor: int, start: int, size: int, where: str) -> bytearray:
    """`size` bytes from `start` of an open file. InputError if it ends before, EnvironmentFault for the disk."""
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    while done < size:
        try:
            got = os.preadv(descriptor, [view[done:]], start + done)
        except OSError as error:
            raise EnvironmentFault(f"{where}: reading failed ({error.strerror}); check the disk") from error
        if got == 0:
            raise InputError(f"{where}: it became shorter while it was read; let no one write to it")
        done += got
    return buffer


def read_span(path: Path, start: int, size: int, what: str) -> bytearray:
    """`size` bytes from `start` of a file that is open for no longer; errors as `read_at`."""
    descriptor = open_descriptor(path, what)
    try:
        return read_at(descriptor, start, size, printable(path))
    finally:
        os.close(descriptor)


def _mark(state: os.stat_result) -> tuple[int, ...]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _settled(descriptor: int) -> os.stat_result:
    """The file's state, once its times are older than a tick of the clock that stamps them.

    A change within the same tick would leave them as they are, and go unseen.
    """
    wait_ns = 2e9 * (time.clock_getres(_COARSE_CLOCK) if sys.platform == "linux" else 0.01)
    for _ in range(TICKS):
        if abs(time.time_ns() - os.fstat(descriptor).st_ctime_ns) > wait_ns:
            break
        time.sleep(wait_ns / TICKS / 1e9)
    return os.fstat(descriptor)
