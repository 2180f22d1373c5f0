"""Linear, y = W x + b, in both layouts: torch keeps W as [out, in], HF's Conv1D as [in, out]."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from surgery.core.op import Op, Tile


@dataclass(frozen=True)
class Linear(Op):
    """torch.nn.Linear."""

    name = "linear"

    def matrix(self, stored: Tensor) -> Tensor:
        return stored

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        return stored[0], stored[1]

    def tile(self, rows: slice) -> Tile:
        return rows, slice(None)

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, matrix, bias)

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(h, matrix)


@dataclass(frozen=True)
class Conv1D(Linear):
    """transformers' Conv1D (GPT-2): the same map, stored transposed."""

    name = "conv1d"

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.T  # [in, out] -> [out, in]

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.T  # [out, in] -> [in, out]

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        return stored[1], stored[0]

    def tile(self, rows: slice) -> Tile:
        return slice(None), rows
