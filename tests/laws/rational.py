"""Reference: rounding and grids with Python's own integers and fractions, slow and plainly right."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """Bits of the mantissa with the hidden one, exponent of the smallest subnormal, and of the largest value."""

    precision: int
    lowest: int
    highest: int

    @property
    def largest(self) -> Fraction:
        return (2**self.precision - 1) * power(self.highest - self.precision + 1)


FORMATS = {
    torch.float64: Format(53, -1074, 1023),
    torch.float32: Format(24, -149, 127),
    torch.bfloat16: Format(8, -133, 127),
    torch.float16: Format(11, -24, 15),
}


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def exponent_of(value: Fraction) -> int:
    """e with 2^e <= |value| < 2^(e+1)."""
    e = abs(value.numerator).bit_length() - value.denominator.bit_length()
    return e if power(e) <= abs(value) else e - 1


def spacing(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The distance from `value` to the next magnitude that `dtype` has."""
    precision, lowest, _ = FORMATS[dtype]
    return power(lowest if value == 0 else max(exponent_of(value) - precision + 1, lowest))


def nearest_even(value: float, dtype: torch.dtype) -> float:
    """`value` rounded to `dtype`: to nearest, ties to even, beyond the largest to infinity, signs kept."""
    if not math.isfinite(value):
        return value
    step = spacing(Fraction(value), dtype)
    rounded = round(Fraction(value) / step) * step  # Fraction rounds ties to even
    if abs(rounded) > FORMATS[dtype].largest:
        return math.copysign(math.inf, value)
    return math.copysign(float(abs(rounded)), value)


def fractions(values: Tensor) -> list[list[Fraction]]:
    """The rows of a matrix."""
    return [[Fraction(value) for value in row] for row in values.to(torch.float64).tolist()]


def gridded(line: Sequence[Fraction], bits: int = 22) -> list[Fraction]:
    """Each of `line` rounded to a multiple of 2^-bits times the power of two above its largest."""
    largest = max((abs(value) for value in line), default=Fraction(0))
    if largest == 0:
        return list(line)
    step = power(exponent_of(largest) + 1 - bits)
    return [round(value / step) * step for value in line]


def transposed(rows: Sequence[Sequence[Fraction]]) -> list[list[Fraction]]:
    return [list(column) for column in zip(*rows, strict=True)]


def dot(row: Sequence[Fraction], column: Sequence[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(row, column, strict=True)), Fraction(0))


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether dtype, shape and every bit agree; unlike torch.equal it tells the two zeros apart."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    kind = kinds[left.dtype.itemsize]
    return torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))
