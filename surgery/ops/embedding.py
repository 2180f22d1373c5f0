"""Embedding: a column of the matrix [out, in] for each index; stored as [in, out] = [vocabulary, width]."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from surgery.ops.transposed import Transposed


@dataclass(frozen=True)
class Embedding(Transposed):
    """torch.nn.Embedding. Indices take no dropout."""

    name = "embedding"

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        found = F.embedding(x, matrix.T)  # [*batch, out]
        return found if bias is None else found + bias

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(h, matrix)

    def accepts_dropout(self) -> bool:
        return False
