"""Linear, y = W x + b, in both layouts: torch keeps W as [out, in], HF's Conv1D as [in, out]."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from surgery.core.op import Op, Tile
from surgery.ops.transposed import Transposed


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
class Conv1D(Transposed):
    """transformers' Conv1D (GPT-2): the same map, stored transposed."""

    name = "conv1d"

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, matrix, bias)

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(h, matrix)


LAYOUTS = (Linear.name, Conv1D.name)  # of one map: what a matrix on files may be meant in
