"""Op: how a weight acts on an input. A tile is a pair of slices of its matrix, (out, in)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

Tile = tuple[slice, slice]
WHOLE: Tile = (slice(None), slice(None))


class Op(ABC):
    """Frozen and without tensors. A stored weight and its matrix [out, in] are views of one memory."""

    name: ClassVar[str]

    @abstractmethod
    def matrix(self, stored: Tensor) -> Tensor:
        """The matrix [out, in] of a stored weight, a view."""

    @abstractmethod
    def stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`, a view."""

    @abstractmethod
    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """(out, in) of the matrix, from the stored shape."""

    @abstractmethod
    def tile(self, rows: slice) -> Tile:
        """What part of the matrix some rows of the stored weight are."""

    @abstractmethod
    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """What a layer with this matrix makes of `x`: [*batch, in] -> [*batch, out]."""

    @abstractmethod
    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        """A second matrix applied to the outcome of `apply`: [*batch, r] -> [*batch, out]."""

    def mix_onto(self, below: Tensor, h: Tensor, matrix: Tensor, scaling: float) -> Tensor:
        """below + scaling * mix(h, matrix)"""
        return torch.add(below, self.mix(h, matrix), alpha=scaling)

    def accepts_dropout(self) -> bool:
        """Whether the input is made of numbers that dropout may zero."""
        return True

    def settings(self) -> Mapping[str, Any]:
        """What differs between two ops of this name, for reports."""
        return {}
