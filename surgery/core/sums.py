"""TreeSum: sums by a fixed tree of elementwise additions, the same bits however the terms come in; and exact sums."""

from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor

from surgery.core.arithmetic import all_finite

FAN = 64  # terms that are added by halves, and then count as one


class TreeSum:
    """Sums along the first axis of what it is fed, in order and in portions of any size."""

    def __init__(self) -> None:
        self._waiting: Tensor | None = None  # fewer than FAN
        self._above: TreeSum | None = None  # which adds the sums of FAN terms each

    def feed(self, terms: Tensor) -> None:
        """[n, ...]"""
        terms = terms if self._waiting is None else torch.cat([self._waiting, terms])
        whole = len(terms) // FAN * FAN
        self._waiting = terms[whole:].clone()  # not a view, which would keep all terms
        if whole:
            self._above = self._above or TreeSum()
            self._above.feed(_halved(terms[:whole].reshape(-1, FAN, *terms.shape[1:])))

    def total(self) -> Tensor:
        """[...], once all are fed; what is missing of the last FAN terms counts as zeros."""
        assert self._waiting is not None
        rest = self._waiting
        if self._above is None or len(rest):
            zeros = rest.new_zeros(FAN - len(rest), *rest.shape[1:])
            last = _halved(torch.cat([rest, zeros])[None])  # [1, ...]
            if self._above is None:
                return last[0]
            self._above.feed(last)
        return self._above.total()


def sum_rows(terms: Tensor) -> Tensor:
    """[out, n, ...] -> [out, ...], by the same tree."""
    tree = TreeSum()
    tree.feed(terms.transpose(0, 1))
    return tree.total()


def row_sums(terms: Tensor) -> Tensor:
    """[out, n] -> [out], each by halves of its row: as fast as one pass, and free of the other rows."""
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        sums = terms[:, :half] + terms[:, half : 2 * half]  # [out, half]
        if terms.shape[1] % 2:
            sums[:, 0] += terms[:, -1]
        terms = sums
    return terms.sum(1)  # of one number, or none


def added(terms: Iterable[Tensor]) -> Tensor:
    """Their sum, from the first on: each is there for no longer than it takes to add it."""
    terms = iter(terms)
    total = next(terms)
    for one in terms:
        total = total + one
    return total


def exact_sum(values: Tensor) -> Fraction | float:
    """Of flat float64 values, without a rounding, so that no order matters; a float where one of them is not finite."""
    if not all_finite(values):
        return float(values.sum())
    mantissa, exponent = torch.frexp(values.cpu())
    whole = (mantissa * 2.0**_BITS).to(torch.int64)
    exponents, at = torch.unique(exponent, return_inverse=True)
    low, high = (torch.zeros(len(exponents), dtype=torch.int64) for _ in range(2))
    low.index_add_(0, at, whole & (1 << _HALF) - 1)  # of halves, so that 2^36 of them leave room
    high.index_add_(0, at, whole >> _HALF)
    parts = zip(exponents.tolist(), low.tolist(), high.tolist(), strict=True)
    return sum((((h << _HALF) + part) * Fraction(2) ** (e - _BITS) for e, part, h in parts), Fraction())


_BITS, _HALF = 53, 27  # of a float64's mantissa


def _halved(terms: Tensor) -> Tensor:
    """[n, FAN, ...] -> [n, ...]"""
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        terms = terms[:, :half] + terms[:, half:]
    return terms[:, 0]
