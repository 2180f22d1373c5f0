"""How far two correct products of factors may lie apart."""

import torch
from torch import Tensor


def product_spread(B: Tensor, A: Tensor, unit: float, others: int = 0) -> Tensor:
    """[out, in]: how far an exact product of B [out, r] and A [r, in] and a plain one may lie apart.

    The grid's bound (see `exact_product`), and that of a sum of r products with each operation rounded by `unit`, and
    so many others.
    """
    B, A = B.abs(), A.abs()
    grid = len(A) * 2.0**-21 * B.amax(1, keepdim=True) * A.amax(0, keepdim=True)
    return grid + (len(A) + 1 + others) * unit * (B @ A)


def unit_of(*given: Tensor) -> float:
    """Half an eps of the coarsest of their dtypes: what an operation rounds by, in proportion."""
    return max(torch.finfo(values.dtype).eps / 2 for values in given)


def prime_factors(number: int) -> list[int]:
    """In order, each as often as it divides."""
    found, q = [], 2
    while number > 1:
        while number % q == 0:
            found.append(q)
            number //= q
        q += 1
    return found
