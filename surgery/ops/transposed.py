"""Transposed: what ops share whose weight is stored as [in, out]."""

from torch import Tensor

from surgery.core.op import Op, Tile


class Transposed(Op):
    """The layout alone; how it acts is for the op to say."""

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.T  # [in, out] -> [out, in]

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.T  # [out, in] -> [in, out]

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        return stored[1], stored[0]

    def tile(self, rows: slice) -> Tile:
        return slice(None), rows
