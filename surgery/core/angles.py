"""Sine and cosine in float64 by a fixed order of operations: the same bits on any machine, where torch's are not.

Each is within 2^-50 of the true one. An angle is k pi / 2 + r, |r| <= pi / 4, where pi / 2 is held in three parts of 33
bits: k has 20, so that products with k are exact; two differences are rounded, by 2^-54 each. The series that follow
are cut off below 2^-58 and rounded, in all, by less than 2^-51: the terms behind the first come to 1/3 at most.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from surgery.core.arithmetic import exact_float64
from surgery.core.polynomial import polynomial
from surgery.errors import ValueRangeError

OFF = 2.0**-50
_LARGEST = 2.0**20
_QUARTER = Fraction("1.5707963267948966192313216916397514420985846996875529")  # pi / 2
_BITS = 33
_TERMS = 9


def cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Of angles in radians, in float64. ValueRangeError for those that are not within 2^20, as NaN is not."""
    angles = exact_float64(angles)
    if not bool((angles.abs() <= _LARGEST).all()):
        raise ValueRangeError(
            "an angle is NaN, or beyond 2^20 radians; smaller ones are wanted; train or save it again"
        )
    k = (angles * (2 / math.pi)).round()
    r = angles
    for part in _PARTS:
        r = r - k * part
    square = r * r
    cos, sin = 1 + square * polynomial(square, _COS), r + r * (square * polynomial(square, _SIN))
    turn = k.to(torch.int64) & 3  # quarters
    odd = (turn & 1) == 1
    cos, sin = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    return torch.where((turn == 1) | (turn == 2), -cos, cos), torch.where(turn >= 2, -sin, sin)


def _parts() -> tuple[float, float, float]:
    """pi / 2 as a sum of floats, of which the first two have so many bits."""
    first = Fraction(math.floor(_QUARTER * 2 ** (_BITS - 1)), 2 ** (_BITS - 1))
    second = Fraction(math.floor((_QUARTER - first) * 2 ** (2 * _BITS - 1)), 2 ** (2 * _BITS - 1))
    third = Fraction(math.floor((_QUARTER - first - second) * 2 ** (3 * _BITS - 1)), 2 ** (3 * _BITS - 1))
    return float(first), float(second), float(third)


_PARTS = _parts()
_SIN = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(1, _TERMS))  # from r^3 to r^17
_COS = tuple((-1) ** n / math.factorial(2 * n) for n in range(1, _TERMS))  # from r^2 to r^16
