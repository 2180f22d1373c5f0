"""Quantization-aware: a weight as it will be held once it is merged, with the gradient that it has unheld."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Holding(Protocol):
    """In what format the merged weight of a layer will be held."""

    def begin(self, base_layer: nn.Module) -> Tensor:
        """The stored weight that the merge begins with, in float64."""
        ...

    def end(self, base_layer: nn.Module, laid: Tensor) -> Tensor:
        """The exact merge as the format has it, in the dtype that it is computed with."""
        ...


def straight_through(held: Tensor, unheld: Tensor) -> Tensor:
    """`held` to the bit; its gradient goes to `unheld` as it is."""
    found: Tensor = _StraightThrough.apply(unheld, held)  # type: ignore[no-untyped-call]
    return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unheld: Tensor, held: Tensor) -> Tensor:
        ctx.dtype = unheld.dtype
        return held.view_as(held)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
