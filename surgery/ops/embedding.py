"""Embedding: a column of the matrix [out, in] for each index; stored as [in, out] = [vocabulary, width]."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from surgery.ops.transposed import Transposed


@dataclass(frozen=True)
class Embedding(Transposed):
    """torch.nn.Embedding, and such as multiply what they find by a number. Indices take no dropout."""

    name = "embedding"

    scale: float = 1.0

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        found = F.embedding(x, matrix.T)  # [*batch, out]
        found = found if self.scale == 1 else found * self.scale
        return found if bias is None else found + bias

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(h, matrix)

    def accepts_dropout(self) -> bool:
        return False

    def settings(self) -> Mapping[str, Any]:
        return {"scale": self.scale.hex()}
