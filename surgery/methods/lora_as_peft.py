"""LoRA's delta as PEFT 0.21.2 computes it, each operation in its order and dtype."""

import torch
from torch import Tensor

from surgery.core.method import Params
from surgery.core.op import Op

_HALF = (torch.float16, torch.bfloat16)


def delta_as_peft(p: Params, op: Op, scaling: float) -> Tensor:
    """scaling * B A in the layout of the stored weight, in the factors' dtype."""
    A, B = p["A"], p["B"]
    half = B.device.type == "cpu" and B.dtype in _HALF  # there PEFT computes in float32, and rounds the outcome
    product = _product(B.float(), A.float(), op) if half else _product(B, A, op)
    delta = product * scaling
    return delta.to(B.dtype) if half else delta


def rounds_first(op: Op) -> bool:
    """Does PEFT round the delta to the weight's dtype over this op, even where its merge is not a safe one?"""
    return op.name == "embedding" or bool(op.roles)


def _product(B: Tensor, A: Tensor, op: Op) -> Tensor:
    if op.kernel and op.kernel != (1, 1):  # a convolution of A by B; in one place of two axes, a product as elsewhere
        return op.mix(A.transpose(0, 1), B.flatten(1)).transpose(0, 1)  # [out, channels, *kernel]
    return op.stored(B.flatten(1) @ A.flatten(1))
