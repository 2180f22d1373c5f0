"""Spill: an adapter's tensors laid down on the disk as they are made, then written in the order of their names."""

from collections.abc import Iterator
from tempfile import TemporaryFile
from types import TracebackType
from typing import Self

from torch import Tensor

from surgery.adapters.peft import TENSORS
from surgery.adapters.sorting import PREFIX
from surgery.core.site import TensorInfo
from surgery.io.durable import faults
from surgery.io.header import encode_header
from surgery.io.octets import octets
from surgery.io.staging import Staging

_CHUNK_BYTES = 1 << 20


class Spill:
    """The tensors of adapter_model.safetensors, of which memory holds one at a time. Use as a context.

    `write` gives the file that `adapter_bytes` would.
    """

    def __init__(self, staging: Staging) -> None:
        self.staging = staging
        self.laid: dict[str, tuple[TensorInfo, int]] = {}  # by name, and where it begins
        self.at = 0

    def __enter__(self) -> Self:
        with faults(self.staging.out):
            self.scratch = TemporaryFile(dir=self.staging.folder)  # it has no name, and ends with its descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.scratch.close()

    def add(self, name: str, values: Tensor) -> None:
        """A tensor, by its name in the base as PEFT ends it; another of the same name takes its place."""
        held = values.detach().cpu().contiguous()
        self.laid[name] = TensorInfo(PREFIX + name, held.dtype, tuple(held.shape)), self.at
        with faults(self.staging.out):
            self.at += self.scratch.write(octets(held))

    def write(self) -> None:
        """The file, under its name in the staging folder."""
        infos = [self.laid[name][0] for name in sorted(self.laid)]
        header = encode_header(infos, {"format": "pt"})
        with self.staging.file(TENSORS, len(header) + sum(info.nbytes for info in infos)) as file:
            file.write(header)
            for name in sorted(self.laid):
                for chunk in self._read(*self.laid[name]):
                    file.write(chunk)

    def _read(self, info: TensorInfo, start: int) -> Iterator[bytes]:
        for at in range(0, info.nbytes, _CHUNK_BYTES):
            with faults(self.staging.out):
                self.scratch.seek(start + at)
                chunk = self.scratch.read(min(_CHUNK_BYTES, info.nbytes - at))
            yield chunk
