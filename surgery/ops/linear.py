"""Linear, y = W x + b, in both layouts: torch keeps W as [out, in], HF's Conv1D as [in, out]."""

from dataclasses import dataclass

from torch import Tensor

from surgery.core.op import Factors, Tile
from surgery.ops.low_rank import LowRank, is_worth_one_step
from surgery.ops.multiplying import Multiplying
from surgery.ops.transposed import Transposed


@dataclass(frozen=True)
class Linear(Multiplying):
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

    def apply_with(self, x: Tensor, matrix: Tensor, bias: Tensor | None, factors: Factors) -> Tensor | None:
        if not is_worth_one_step(x, matrix, factors):
            return None
        found: Tensor = LowRank.apply(x, matrix, bias, *factors)  # type: ignore[no-untyped-call]
        return found


@dataclass(frozen=True)
class Conv1D(Multiplying, Transposed):
    """transformers' Conv1D (GPT-2): the same map, stored transposed."""

    name = "conv1d"


LAYOUTS = (Linear.name, Conv1D.name)  # of one map: what a matrix on files may be meant in
