"""Codec: how a weight is held as named tensors; and packed, the tensors that together hold one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """The plain tensors that hold one weight, by role, as a file lists them, and the format's settings."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = {}


class Codec(ABC):
    """Pure: decodes packed tensors to floats and encodes floats back."""

    name: ClassVar[str]

    @abstractmethod
    def claims(self, headers: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bool:
        """Whether these tensors (dtype and shape by role) are held this way."""

    @abstractmethod
    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """The stored weight in `dtype`, always in fresh memory."""

    @abstractmethod
    def encode(self, weight: Tensor, like: Packed) -> Packed:
        """`weight` held as `like` is; encode(decode(p), like=p) == p in bytes. Float64 is rounded once."""
