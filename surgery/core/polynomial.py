"""polynomial: a sum of powers in a fixed order of operations, for series that have the same bits anywhere."""

from collections.abc import Sequence

import torch
from torch import Tensor


def polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """c[0] + c[1] x + c[2] x^2 + ... by Horner's rule; each product and each sum is an operation of its own."""
    total = torch.full_like(x, coefficients[-1])
    for one in coefficients[-2::-1]:
        total = total * x
        total = total + one
    return total
