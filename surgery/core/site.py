"""Site: where weights live, as a module path with the tensors it plays on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from surgery.core.op import Op


class TensorInfo(NamedTuple):
    """A tensor's name in its host, dtype and stored shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size

    def rows(self, rows: slice) -> "TensorInfo":
        """The same for some rows of the first axis."""
        return self._replace(shape=(rows.stop - rows.start, *self.shape[1:]))


@dataclass(frozen=True)
class Site:
    """A module path, its tensors by role, its op (None: not one we act on), and other names of it."""

    name: str
    tensors: Mapping[str, TensorInfo]
    op: Op | None = None
    aliases: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()  # other sites that hold the very same weight memory

    @property
    def weight(self) -> TensorInfo:
        return self.tensors["weight"]

    @property
    def acting(self) -> Op:
        """The op, where an adapter has already been joined to the site."""
        assert self.op is not None
        return self.op

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return self.acting.shape(self.weight.shape)

    def rows(self, rows: slice | None) -> slice:
        """`rows` of the stored weight, all if None; a scalar counts as one row."""
        return slice(0, self.weight.shape[0] if self.weight.shape else 1) if rows is None else rows

    def with_op(self, op: Op) -> "Site":
        return replace(self, op=op)
