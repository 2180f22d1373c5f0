"""Octets: tensors as bytes and bytes as tensors, without a copy, and their sha256."""

import ctypes
import hashlib
from typing import Any

import torch
from torch import Tensor

from surgery.core.sharded import whole


def octets(values: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which it keeps alive."""
    size = values.numel() * values.element_size()
    if size == 0:
        return memoryview(b"")
    memory: Any = (ctypes.c_ubyte * size).from_address(values.data_ptr())
    memory.owner = values
    return memoryview(memory).cast("B")


def tensor_from(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor over `data`, whose memory it shares."""
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)


def sha256_of(values: Tensor) -> str:
    """sha256 of the tensor's bytes, row-major."""
    flat = whole(values.detach()).cpu().contiguous()
    return hashlib.sha256(octets(flat)).hexdigest()


class Tally:
    """sha256 of a file and of each tensor in it, fed once and in the order of the bytes."""

    def __init__(self, header: bytes) -> None:
        self.whole = hashlib.sha256(header)
        self.tensors: dict[str, str] = {}
        self.current = hashlib.sha256()

    def feed(self, chunk: memoryview | bytearray) -> None:
        """More bytes of the tensor at hand."""
        self.whole.update(chunk)
        self.current.update(chunk)

    def end(self, name: str) -> None:
        """The tensor at hand was `name`, and is complete."""
        self.tensors[name] = self.current.hexdigest()
        self.current = hashlib.sha256()
