"""Reading: sha256 of what is read of one file, by tensor, and of the whole file."""

import hashlib
from threading import Lock
from typing import TYPE_CHECKING

from surgery.errors import InputError, printable
from surgery.io.header import Entry
from surgery.io.tensor_file import TensorFile

if TYPE_CHECKING:
    from hashlib import _Hash


class Reading:
    """Fed with what is read, by several readers at once; each tensor counts once, and in the order of its bytes."""

    def __init__(self, file: TensorFile) -> None:
        self.file = file
        self.tensors: dict[str, str] = {}  # those read whole
        self._lock = Lock()
        self._begun: dict[str, tuple[_Hash, int]] = {}  # and how far each has come
        self._whole, self._at = hashlib.sha256(file.header.raw), len(file.header.raw)

    def feed(self, entry: Entry, start: int, data: memoryview | bytearray) -> None:
        """Bytes of a tensor from `start` of the file; passed over where another reader has told of them."""
        name, end = entry.info.name, start + len(data)
        with self._lock:
            sha256, at = self._begun.get(name) or (hashlib.sha256(), entry.start)
            if name in self.tensors or start != at:
                return
            sha256.update(data)
            self._begun[name] = sha256, end
            if end == entry.start + entry.info.nbytes:
                self.tensors[name] = sha256.hexdigest()
                del self._begun[name]
            if start == self._at:
                self._whole.update(data)
                self._at = end

    def whole(self) -> str:
        """sha256 of the file. It is read again where it was not read from front to back."""
        if self._at != self.file.state.st_size:
            self.read_again()
        return self._whole.hexdigest()

    def complete(self) -> None:
        """Read the file again where a tensor of it has not been read."""
        if len(self.tensors) < len(self.file.header.entries):
            self.read_again()

    def read_again(self) -> None:
        """InputError if a tensor is not what it was when it was read before."""
        before, self.tensors = self.tensors, {}
        self._begun = {}
        self._whole, self._at = hashlib.sha256(self.file.header.raw), len(self.file.header.raw)
        for entry in self.file.header.entries:
            start = entry.start
            for chunk in self.file.chunks(entry):
                self.feed(entry, start, chunk)
                start += len(chunk)
        for name, digest in before.items():
            if self.tensors[name] != digest:
                raise InputError(f"{self.file.where}: {printable(name)} changed while it was read; run again")
