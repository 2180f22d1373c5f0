"""Rotations: what skew matrices Q turn into, R = I + D, by Cayley's transform or a series for it; D is what is told.

Cayley: R = (I - Q) (I + Q)^-1. Neumann's series, as PEFT has it, is for the inverse of that rotation:
R = I + 2 Q + 2 Q^2 + ... + 2 Q^(n - 1) + Q^n, cut off, and so near a rotation only where Q is small.
"""

from collections.abc import Callable
from functools import partial
from math import isqrt

import torch
from torch import Tensor

from surgery.core.method import Product
from surgery.core.op import WHOLE

Multiply = Callable[[Tensor, Tensor], Tensor]  # [..., b, b] each
COPIES = 20  # of what `neumann` and `cayley` make: 13 at most are there at once, and malloc keeps others that are gone
SPLITS = 3  # the same of a factor of a fine product
FINE = 2.0**-42  # of a fine product of n terms, times n and the largest of each factor, see `exact_product`


def block_of(numbers: int) -> int:
    """b, of as many numbers as a skew [b, b] has above its diagonal."""
    return (1 + isqrt(1 + 8 * numbers)) // 2


def skew(numbers: Tensor) -> Tensor:
    """[blocks, b (b - 1) / 2], row by row above the diagonal, as [blocks, b, b]."""
    blocks, b = len(numbers), block_of(numbers.shape[1])
    rows, columns = torch.triu_indices(b, b, 1, device=numbers.device)
    upper = numbers.new_zeros(blocks, b * b).index_copy(1, rows * b + columns, numbers).view(blocks, b, b)
    return upper - upper.mT


def last_power(terms: int) -> int:
    """n of the series that PEFT makes of so many terms: of three as of four."""
    return terms - 1 if terms < 3 else max(terms - 1, 3)


def neumann(Q: Tensor, terms: int, multiply: Multiply) -> Tensor:
    """D [blocks, b, b], by the series."""
    last = last_power(terms)
    if last < 2:
        return 2 * Q * last
    square = multiply(Q, Q)
    pair, found = 2 * Q + 2 * square, Q if last % 2 else 2 * Q + square
    for _ in range((last - 1) // 2):  # two powers at a time
        found = pair + multiply(square, found)
    return found


def neumann_off(Q: Tensor, terms: int, unit: float, rough: float) -> Tensor:
    """[blocks, b, b]: what R may be off by, where an operation rounds by `unit` and Q is off by `rough` of itself.

    Each of up to n products sums b terms and is added to others; R is rounded once more.
    """
    last, b = last_power(terms), Q.shape[-1]
    sizes = neumann(Q.abs(), terms, torch.matmul)
    return last * ((b + 1) * unit + rough) * sizes + 2 * unit * (_eye(Q) + sizes)


def cayley(Q: Tensor, product: Product) -> Tensor:
    """D [blocks, b, b], -2 Q (I + Q)^-1, by products alone."""
    return -2 * times(product, Q, inverse(_eye(Q) + Q, product))


def cayley_solved(Q: Tensor) -> Tensor:
    """The same by torch's solver, whose last bits differ from device to device."""
    found: Tensor = torch.linalg.solve(_eye(Q) + Q, -2 * Q, left=False)
    return found


def cayley_off(Q: Tensor, D: Tensor, unit: float, rough: float) -> Tensor:
    """[blocks, b, b]: what R may be off by, where an operation rounds by `unit` and Q is off by `rough` of itself.

    Elimination gives R (I + Q + E) = I - Q, with |E| <= 3 b unit |L| |U|; and (I + Q)^-1 is I + D / 2. It needs no
    pivots, for the symmetric part of I + Q is I. R is rounded once more.
    """
    eye = _eye(Q)
    R, inverse = (eye + D).abs(), (eye + D / 2).abs()
    E = 3 * Q.shape[-1] * unit * (R @ _eliminated(eye + Q)) + rough * ((eye + R) @ Q.abs())
    return E @ inverse + 2 * unit * R


def _eliminated(A: Tensor) -> Tensor:
    """|L| |U| of A = L U."""
    total = torch.zeros_like(A)
    for k in range(A.shape[-1]):
        column, row, pivot = A[..., :, k : k + 1], A[..., k : k + 1, :], A[..., k : k + 1, k : k + 1]
        term = column / pivot * row
        A, total = A - term, total + term.abs()
    return total


def inverse(A: Tensor, product: Product) -> Tensor:
    """A^-1 of [..., n, n], by blocks: [[a, b], [c, d]] is left with d - c a^-1 b.

    Without pivots: the symmetric part of A is at least I, and so is that of each such rest, whose inverses are at
    most 1 then.
    """
    n = A.shape[-1]
    if n <= _SMALL:
        return _eliminated_wholly(A)
    half = n // 2
    a, b, c, d = A[..., :half, :half], A[..., :half, half:], A[..., half:, :half], A[..., half:, half:]
    a, by = inverse(a, product), partial(times, product)
    left, right = by(c, a), by(a, b)  # c a^-1, a^-1 b
    d = inverse(d - by(c, right), product)
    beside = by(right, d)  # a^-1 b d^-1
    top = torch.cat([a + by(beside, left), -beside], -1)
    return torch.cat([top, torch.cat([-by(d, left), d], -1)], -2)


def _eliminated_wholly(A: Tensor) -> Tensor:
    """A^-1 row by row, by elementwise operations alone: the same bits on any device."""
    n = A.shape[-1]
    rest = torch.cat([A, _eye(A).expand_as(A)], -1)  # [..., n, 2 n]
    rows = torch.arange(n, device=A.device).unsqueeze(1)
    for k in range(n):
        row = rest[..., k : k + 1, :] / rest[..., k : k + 1, k : k + 1]
        rest = torch.where(rows == k, row, rest - rest[..., :, k : k + 1] * row)
    return rest[..., n:]


_SMALL = 32  # rows, up to which that takes less time than products of blocks


def times(product: Product, A: Tensor, B: Tensor) -> Tensor:
    """A B, finely."""
    return product(A, B, WHOLE, 1.0, fine=True)


def by_blocks(rows: Tensor, D: Tensor, multiply: Multiply) -> Tensor:
    """[n, extent] -> [n, extent]: each block of a row by its block of D, or by the only one."""
    n, extent = rows.shape
    count, b = extent // D.shape[-1], D.shape[-1]
    D = D.expand(count, b, b)
    parts = rows.reshape(n, count, b).transpose(0, 1)  # [blocks, n, b]
    return multiply(parts, D).transpose(0, 1).reshape(n, extent)


def thinned(D: Tensor, dropout: float) -> Tensor:
    """D [blocks, b, b] of one step of training, without so many of its blocks; of one there is none to leave out."""
    count = int(dropout * len(D))
    if count == 0:
        return D
    left = torch.ones(len(D), device=D.device)
    left[torch.randperm(len(D), device=D.device)[:count]] = 0
    return D * left.view(-1, 1, 1)


def _eye(Q: Tensor) -> Tensor:
    return torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
