"""StagedFile: a file of an output that is being written."""

from pathlib import Path

from surgery.io import disk
from surgery.io.durable import faults

_BEGIN_BYTES = 16 << 20  # to the disk at a time


class StagedFile:
    """A file that is being written, from front to back. The disk is kept busy meanwhile: at the end little is left."""

    def __init__(self, descriptor: int, out: Path) -> None:
        self.descriptor, self.out = descriptor, out
        self.size = self.begun = 0  # bytes that are written, and that the disk has begun with

    def write(self, data: bytes | memoryview) -> None:
        """All of `data`."""
        with faults(self.out):
            disk.write_all(self.descriptor, data)
            self.size += len(data)
            if self.size - self.begun >= _BEGIN_BYTES:
                disk.begin_sync(self.descriptor, self.begun, self.size - self.begun)
                self.begun = self.size
