"""Reading: sha256 of what is read of one file, by tensor, and of the whole file."""

import hashlib
from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING

from surgery.core.workers import Backlog
from surgery.errors import InputError, printable
from surgery.io.header import Entry
from surgery.io.tensor_file import CHUNK_BYTES, TensorFile

if TYPE_CHECKING:
    from hashlib import _Hash


class Reading:
    """Fed with what is read, by several readers at once; each tensor counts once, and in the order of its bytes.

    The hashing may lag behind the reading by `ahead` of the pieces.
    """

    def __init__(self, file: TensorFile, ahead: int = 0) -> None:
        self.file = file
        self._tensors: dict[str, str] = {}
        self._backlog = Backlog(ahead)
        self._lock = Lock()
        self._begun: dict[str, tuple[_Hash, int]] = {}  # and how far each has come
        self._whole = _Whole(file)

    @property
    def tensors(self) -> Mapping[str, str]:
        """sha256 of those that have been read whole."""
        self._backlog.catch_up()
        return self._tensors

    def feed(self, entry: Entry, start: int, data: memoryview | bytearray) -> None:
        """Bytes of a tensor from `start` of the file; passed over where another reader has told of them."""
        self._backlog(self._hash, entry, start, data)

    def _hash(self, entry: Entry, start: int, data: memoryview | bytearray) -> None:
        name, end = entry.info.name, start + len(data)
        with self._lock:
            sha256, at = self._begun.get(name) or (hashlib.sha256(), entry.start)
            if name in self._tensors or not start <= at <= end:
                return
            fresh = memoryview(data)[at - start :]  # what two tiles share is read twice
            sha256.update(fresh)
            self._begun[name] = sha256, end
            if end == entry.start + entry.info.nbytes:
                self._tensors[name] = sha256.hexdigest()
                del self._begun[name]
            self._whole.feed(at, fresh)

    def whole(self) -> str:
        """sha256 of the file. What was not read from front to back is read for it. InputError if it has changed."""
        self._backlog.catch_up()
        digest = self._whole.digest()
        self.file.check_unchanged()
        return digest

    def complete(self) -> None:
        """Read the file again where a tensor of it has not been read."""
        if len(self.tensors) < len(self.file.header.entries):
            self.read_again()

    def read_again(self) -> None:
        """InputError if a tensor is not what it was when it was read before."""
        before, self._tensors = self.tensors, {}
        self._begun = {}
        self._whole = _Whole(self.file)
        for entry in self.file.header.entries:
            start = entry.start
            for chunk in self.file.chunks(entry):
                self.feed(entry, start, chunk)
                start += len(chunk)
        self._backlog.catch_up()
        for name, digest in before.items():
            if self._tensors[name] != digest:
                raise InputError(f"{self.file.where}: {printable(name)} changed while it was read; run again")


class _Whole:
    """The sha256 of a file as far as it has come; what others leave out on the way it reads by itself.

    The codes of a quantized weight lie far from their scales, and one is read beside the other.
    """

    def __init__(self, file: TensorFile) -> None:
        self.file, self.sha256, self.at = file, hashlib.sha256(file.header.raw), len(file.header.raw)

    def feed(self, start: int, data: memoryview) -> None:
        if start + len(data) > self.at:
            self._reach(start)
            self.sha256.update(data[self.at - start :])
            self.at = start + len(data)

    def digest(self) -> str:
        self._reach(self.file.state.st_size)
        return self.sha256.hexdigest()

    def _reach(self, end: int) -> None:
        while self.at < end:
            chunk = self.file.read(self.at, min(CHUNK_BYTES, end - self.at))
            self.sha256.update(chunk)
            self.at += len(chunk)
