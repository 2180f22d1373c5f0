"""Multiplying: what ops share that multiply the last axis of an input by their matrix."""

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.op import FEW, Op, onto


class Multiplying(Op):
    """How it acts alone; how it is stored is for the op to say."""

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, matrix, bias)

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(h, matrix)

    def mix_onto(self, below: Tensor, h: Tensor, matrix: Tensor, scaling: float) -> Tensor:
        """In one pass over many outputs: to read and write them is most of what it costs.

        Half types are left to two passes, which round as PEFT's do.
        """
        if below.numel() < FEW or not below.dtype == h.dtype == matrix.dtype or below.dtype.itemsize < 4:
            return onto(below, F.linear(h, matrix), scaling)
        flat = below.reshape(-1, below.shape[-1]), h.reshape(-1, h.shape[-1])  # [batch, out], [batch, r]
        return torch.addmm(*flat, matrix.T, alpha=scaling).view(below.shape)
