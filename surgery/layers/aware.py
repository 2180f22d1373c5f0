"""Quantization-aware: a weight as it will be held once it is merged, with the gradient that it has unheld."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from surgery.core.arithmetic import exact_product, float_product
from surgery.core.method import Dense, Product
from surgery.core.rounding import round_once


class Holding(Protocol):
    """In what format the merged weight of a layer will be held."""

    def begin(self, base_layer: nn.Module) -> Tensor:
        """The stored weight that the merge begins with, in float64."""
        ...

    def end(self, base_layer: nn.Module, laid: Tensor) -> Tensor:
        """The exact merge as the format has it, in the dtype that it is computed with."""
        ...


def held_merge(aware: Holding, base_layer: nn.Module, plain: Dense, merged: Callable[[Dense, Product], Dense]) -> Dense:
    """Weight and bias to the bits of the merge, with the gradients of the plain ones; `merged` lays the adapters."""
    bias = None if plain.bias is None else plain.bias.to(torch.float64)
    with torch.no_grad():
        exact = merged(Dense(aware.begin(base_layer), bias), exact_product)
        held = Dense(
            aware.end(base_layer, exact.weight.to(torch.float64)),
            None if exact.bias is None or plain.bias is None else round_once(exact.bias, plain.bias.dtype),
        )
    if not torch.is_grad_enabled():
        return held
    unheld = merged(plain, float_product)
    return Dense(
        straight_through(held.weight, unheld.weight),
        None if held.bias is None or unheld.bias is None else straight_through(held.bias, unheld.bias),
    )


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
