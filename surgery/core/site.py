"""Site: where weights live, as a module path with the tensors it plays on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from surgery.core.op import Op
from surgery.errors import FormatError, printable


@dataclass(frozen=True)
class RawDtype:
    """A number format that is carried as bytes and never computed with, as safetensors spells it."""

    spelling: str
    bits: int  # an element

    def __str__(self) -> str:
        return self.spelling


Dtype = torch.dtype | RawDtype
CODES = "codes"  # the role of the tensor that holds a weight's codes, where the outcome is written in its place


def bits_of(dtype: Dtype) -> int:
    """Of one element."""
    return dtype.bits if isinstance(dtype, RawDtype) else 8 * dtype.itemsize


class TensorInfo(NamedTuple):
    """A tensor's name in its host, dtype and stored shape."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbits(self) -> int:
        size = bits_of(self.dtype)
        for extent in self.shape:
            size *= extent
        return size

    @property
    def nbytes(self) -> int:
        return self.nbits // 8

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype to compute with. FormatError if torch has none."""
        if isinstance(self.dtype, RawDtype):
            raise FormatError(
                f"{printable(self.name)}: held as {self.dtype}, which is carried as bytes only; "
                "plain floats are wanted; dequantize it first"
            )
        return self.dtype

    def rows(self, rows: slice) -> "TensorInfo":
        """The same for some rows of the first axis."""
        return self._replace(shape=(rows.stop - rows.start, *self.shape[1:]))

    def part(self, rows: slice) -> tuple["TensorInfo", int]:
        """The same for some rows, all of a scalar; and the bytes that lie before them."""
        return (self.rows(rows), self.rows(slice(0, rows.start)).nbytes) if self.shape else (self, 0)


@dataclass(frozen=True)
class Site:
    """A module path, its tensors by role, its op (None: not one we act on), and other names of it."""

    name: str
    tensors: Mapping[str, TensorInfo]
    op: Op | None = None
    aliases: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()  # other sites that hold the very same weight memory
    together: int = 1  # rows of the stored weight that share no byte with those after them, and are read at once

    @property
    def weight(self) -> TensorInfo:
        return self.tensors["weight"]

    @property
    def written(self) -> str:
        """The tensor that its weight is written as."""
        return self.tensors.get(CODES, self.weight).name

    @property
    def acting(self) -> Op:
        """The op, where an adapter has already been joined to the site."""
        assert self.op is not None
        return self.op

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return self.acting.shape(self.weight.shape)

    def laid(self, info: TensorInfo) -> TensorInfo:
        """A tensor that is this weight, shaped so that tiles are its rows."""
        return info if self.op is None else info._replace(shape=self.op.laid(info.shape))

    def rows(self, rows: slice | None) -> slice:
        """`rows` of the stored weight, all if None; a scalar counts as one row."""
        shape = self.laid(self.weight).shape
        return slice(0, shape[0] if shape else 1) if rows is None else rows

    def with_op(self, op: Op) -> "Site":
        return replace(self, op=op)
