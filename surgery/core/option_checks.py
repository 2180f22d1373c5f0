"""Checks of the numbers that options give. True and False are none, though Python counts with them."""

import sys
from typing import TypeGuard

from surgery.errors import UsageError, printable


def check_whole(option: str, value: object, lowest: int, most: int | None = None) -> int:
    """The value. UsageError for what is no whole number from `lowest` to `most`; without `most`, or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest or (most is not None and value > most):
        wanted = f"of {lowest} or more" if most is None else f"from {lowest} to {most}"
        told = "a number too large to print" if _is_huge(value) else printable(repr(value))
        raise UsageError(f"{option} is {told}; a whole number {wanted} is wanted")
    return value


def is_finite(value: object) -> TypeGuard[int | float]:
    """Is it a number, and no NaN or infinity?"""
    return is_number(value) and abs(value) <= sys.float_info.max


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_huge(value: object) -> bool:
    """Python writes no whole number of more than 4,300 digits."""
    return isinstance(value, int) and value.bit_length() > 1 << 10
