"""Spill: an adapter's tensors laid down on the disk as they are made, then written in the order of their names."""

from functools import partial
from tempfile import TemporaryFile
from types import TracebackType
from typing import Self

from torch import Tensor

from surgery.adapters.peft import TENSORS
from surgery.adapters.sorting import PREFIX
from surgery.core.site import TensorInfo
from surgery.io.durable import faults
from surgery.io.lazy import Lazy, write_tensors
from surgery.io.octets import octets, tensor_from
from surgery.io.staging import Staging


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
        laid = (self.laid[name] for name in sorted(self.laid))
        write_tensors(
            self.staging, TENSORS, {info.name: Lazy(info, partial(self._read, info, at)) for info, at in laid}
        )

    def _read(self, info: TensorInfo, start: int) -> Tensor:
        data = bytearray(info.nbytes)
        with faults(self.staging.out):
            self.scratch.seek(start)
            self.scratch.readinto(data)
        return tensor_from(data, info.torch_dtype, info.shape)
