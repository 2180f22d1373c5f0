"""Op: how a weight acts on an input. A tile is a pair of slices of its matrix, (out, in)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

Tile = tuple[slice, slice]
WHOLE: Tile = (slice(None), slice(None))
FEW = 1 << 16  # numbers, for which one more call takes longer than one more pass over them


class Factors(NamedTuple):
    """scaling * B A, of [out, r] and [r, in]."""

    A: Tensor
    B: Tensor
    scaling: float


class Op(ABC):
    """Frozen and without tensors. A stored weight and its matrix [out, in] are views of one memory.

    `in` counts every number of the input that one output is made of: of a convolution, its channels in each
    place of the kernel.
    """

    name: ClassVar[str]
    kernel: tuple[int, ...] = ()  # the extents of what slides over the input, if something does
    groups: int = 1  # of outputs; each sees its own share of the channels
    roles: Mapping[str, str] = {}  # torch.compile takes an empty MappingProxyType for true
    """What the module calls its weight and bias, of one that reads them by itself."""
    alone: ClassVar[bool] = False  # does it stand for one parameter, and not for the module that holds it?
    stack: int = 0  # how many matrices lie one below another in it, each with its own share of r; 0: it is one
    swapped: ClassVar[bool] = False  # are its rows inputs, and its columns outputs?

    @abstractmethod
    def matrix(self, stored: Tensor) -> Tensor:
        """The matrix [out, in] of a stored weight, a view."""

    @abstractmethod
    def stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`, a view; also of one row or column, as what broadcasts over the stored weight."""

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
        """A second matrix applied to the outcome of `apply`: [*batch, r] -> [*batch, out].

        It is [out, r], or [out, r / groups]: each group has its own share of r.
        """

    def laid(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape as the one whose rows tiles are taken of."""
        return stored

    def over(self, stored: tuple[int, ...]) -> Self:  # noqa: ARG002  # for those that differ by it
        """The same op for a weight stored in this shape."""
        return self

    def channels(self, in_features: int) -> int:
        """How many numbers the whole input has in one place, where one output is made of `in_features`."""
        return in_features // math.prod(self.kernel) * self.groups

    def for_inputs(self, values: Tensor, shape: tuple[int, int]) -> Tensor:  # noqa: ARG002  # as above
        """A number for each channel, [channels], laid over the matrix of this shape: [1, in] or [out, in]."""
        return values.unsqueeze(0)

    def beside(self, values: Tensor) -> Tensor:
        """A number for each output, [out], as it broadcasts over what `apply` gives."""
        return values

    def mix_onto(self, below: Tensor, h: Tensor, matrix: Tensor, scaling: float) -> Tensor:
        """below + scaling * mix(h, matrix)"""
        return onto(below, self.mix(h, matrix), scaling)

    def apply_with(self, x: Tensor, matrix: Tensor, bias: Tensor | None, factors: Factors) -> Tensor | None:  # noqa: ARG002  # for those that can
        """apply(x, matrix, bias) + scaling * mix(apply(x, A), B) as one step of autograd; None where it is no gain."""
        return None

    def accepts_dropout(self) -> bool:
        """Whether the input is made of numbers that dropout may zero."""
        return True

    def settings(self) -> Mapping[str, Any]:
        """What differs between two ops of this name, for reports."""
        return {}


def is_many(x: Tensor) -> bool:
    """Does one more pass over them take longer than one more call? On a GPU it is calls that take the time."""
    return x.is_cpu and x.numel() >= FEW


def adds_up(x: Tensor, weight: Tensor, delta: Tensor) -> bool:
    """May the sum of both act on the input in place of each? In a half type it would lose small changes."""
    alike = x.dtype == weight.dtype == delta.dtype and x.dtype.itemsize >= 4
    return alike and not torch.is_autocast_enabled(x.device.type)


def in_dtype_of(factor: Tensor, x: Tensor) -> Tensor:
    """The input as a product with a factor takes it: in the factor's dtype, unless autocast chooses one."""
    if x.dtype == factor.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(factor.dtype)


def onto(below: Tensor, moved: Tensor, scaling: float) -> Tensor:
    """below + scaling * moved, in one pass."""
    if torch.compiler.is_compiling():  # torch's own compiler makes one product of both, and forgets an alpha
        return below + scaling * moved
    return torch.add(below, moved, alpha=scaling)
