"""TensorFile: one safetensors file, open for ranged reads."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import EnvironmentFault, FormatError, InputError, printable
from surgery.io.header import Entry, Header, header_length, parse_header

CHUNK_BYTES = 1 << 22


class TensorFile:
    """Reads with pread; refuses what is no regular file, and a file that changes while it is open."""

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, printable(path)
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise InputError(f"{self.where}: cannot be opened ({error.strerror}); check the path") from error
        self.state = os.fstat(self.descriptor)
        try:
            if not stat.S_ISREG(self.state.st_mode):
                raise FormatError(f"{self.where}: not a regular file; a safetensors file is wanted")
            self.header = self._header()
        except BaseException:
            self.close()
            raise
        self.entries = {entry.info.name: entry for entry in self.header.entries}

    def read(self, start: int, size: int) -> bytearray:
        """`size` bytes from `start` of the file."""
        buffer = bytearray(size)
        view, done = memoryview(buffer), 0
        while done < size:
            try:
                got = os.preadv(self.descriptor, [view[done:]], start + done)
            except OSError as error:
                raise EnvironmentFault(f"{self.where}: reading failed ({error.strerror}); check the disk") from error
            if got == 0:
                raise InputError(f"{self.where}: it became shorter while it was read; let no one write to it")
            done += got
        return buffer

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
        """InputError if the file is no longer what it was when it was opened."""
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (self.state.st_size, self.state.st_mtime_ns):
            raise InputError(f"{self.where}: it changed while it was read; let no one write to it, and run again")

    def close(self) -> None:
        os.close(self.descriptor)

    def _header(self) -> Header:
        size = self.state.st_size
        length = header_length(bytes(self.read(0, min(8, size))), size, self.where)
        return parse_header(bytes(self.read(0, length)), size, self.where)
