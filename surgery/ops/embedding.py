"""Embedding: a column of the matrix [out, in] for each index; stored as [in, out] = [vocabulary, width]."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from surgery.core.op import Op, Tile


@dataclass(frozen=True)
class Embedding(Op):
    """torch.nn.Embedding. Indices take no dropout."""

    name = "embedding"

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.T  # [in, out] -> [out, in]

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.T  # [out, in] -> [in, out]

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        return stored[1], stored[0]

    def tile(self, rows: slice) -> Tile:
        return slice(None), rows

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        found = F.embedding(x, matrix.T)  # [*batch, out]
        return found if bias is None else found + bias

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(h, matrix)

    def accepts_dropout(self) -> bool:
        return False
