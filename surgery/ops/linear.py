"""Linear, y = W x + b, in both layouts: torch keeps W as [out, in], HF's Conv1D as [in, out]."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.op import FEW, Factors, Op, Tile, onto
from surgery.ops.low_rank import LowRank, is_worth_one_step
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

    def mix_onto(self, below: Tensor, h: Tensor, matrix: Tensor, scaling: float) -> Tensor:
        return _onto(below, h, matrix, scaling)

    def apply_with(self, x: Tensor, matrix: Tensor, bias: Tensor | None, factors: Factors) -> Tensor | None:
        if not is_worth_one_step(x, matrix, factors):
            return None
        found: Tensor = LowRank.apply(x, matrix, bias, *factors)  # type: ignore[no-untyped-call]
        return found


@dataclass(frozen=True)
class Conv1D(Transposed):
    """transformers' Conv1D (GPT-2): the same map, stored transposed."""

    name = "conv1d"

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, matrix, bias)

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(h, matrix)

    def mix_onto(self, below: Tensor, h: Tensor, matrix: Tensor, scaling: float) -> Tensor:
        return _onto(below, h, matrix, scaling)


LAYOUTS = (Linear.name, Conv1D.name)  # of one map: what a matrix on files may be meant in


def _onto(below: Tensor, h: Tensor, matrix: Tensor, scaling: float) -> Tensor:
    """below + scaling * matrix h, in one pass over many outputs: to read and write them is most of what it costs.

    Half types are left to two passes, which round as PEFT's do.
    """
    if below.numel() < FEW or not below.dtype == h.dtype == matrix.dtype or below.dtype.itemsize < 4:
        return onto(below, F.linear(h, matrix), scaling)
    flat = below.reshape(-1, below.shape[-1]), h.reshape(-1, h.shape[-1])  # [batch, out], [batch, r]
    return torch.addmm(*flat, matrix.T, alpha=scaling).view(below.shape)
