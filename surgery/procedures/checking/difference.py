"""Difference: how two tensors of one shape differ, told a span at a time and added up in the order of the spans."""

import math
from collections.abc import Callable
from operator import add
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.arithmetic import all_finite, tree_sum
from surgery.core.rounding import ulp
from surgery.core.site import Dtype, bits_of
from surgery.core.undo import order
from surgery.io.octets import tensor_from

Number = TypeVar("Number", int, float)

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Difference(NamedTuple):
    """Of a span, or of several. None stands for what cannot be told: of integers, fp8 or bools all but the counts."""

    elements: int
    differing: int | None  # of other bytes; of another value, where the dtypes are two
    not_finite: int | None = None  # of those, where one of the two is NaN or infinity; the rest have an error
    max_abs_error: float | None = None
    max_ulps: float | None = None  # of the dtype with the larger ones
    squares_a: float | None = None  # sum of a^2
    squares_apart: float | None = None  # sum of (a - b)^2

    def plus(self, other: "Difference") -> "Difference":
        """Of the spans so far and of the next one."""
        return Difference(
            self.elements + other.elements,
            _join(add, self.differing, other.differing),
            _join(add, self.not_finite, other.not_finite),
            _join(max, self.max_abs_error, other.max_abs_error),
            _join(max, self.max_ulps, other.max_ulps),
            _join(add, self.squares_a, other.squares_a),
            _join(add, self.squares_apart, other.squares_apart),
        )

    @property
    def norm_a(self) -> float | None:
        """||a||"""
        return None if self.squares_a is None else math.sqrt(self.squares_a)

    @property
    def norm_apart(self) -> float | None:
        """||a - b||"""
        return None if self.squares_apart is None else math.sqrt(self.squares_apart)

    @property
    def relative(self) -> float | None:
        """||a - b|| / ||a||, which is 0 where nothing differs; None where that is no number."""
        if self.norm_a is None or self.norm_apart is None:
            return None
        if self.norm_apart == 0:
            return 0.0
        return self.norm_apart / self.norm_a if 0 < self.norm_a < math.inf else None

    def to_json(self) -> dict[str, Any]:
        """Its figures; one that is no number is null, for JSON has no NaN."""
        told = {
            "elements": self.elements,
            "differing": self.differing,
            "not_finite": self.not_finite,
            "max_abs_error": self.max_abs_error,
            "max_ulps": self.max_ulps,
            "norm_a": self.norm_a,
            "norm_difference": self.norm_apart,
            "relative": self.relative,
        }
        return {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in told.items()}


def difference(a: bytearray, b: bytearray, a_dtype: Dtype, b_dtype: Dtype) -> Difference:
    """Of the same elements of two tensors; formats that torch lacks are compared by the byte."""
    elements = 8 * len(a) // bits_of(a_dtype)
    if a_dtype in PLAIN_DTYPES and b_dtype in PLAIN_DTYPES:
        x = tensor_from(a, a_dtype, (elements,))
        return _equal(x) if a_dtype == b_dtype and a == b else _of_floats(x, tensor_from(b, b_dtype, (elements,)))
    if bits_of(a_dtype) != bits_of(b_dtype):
        return Difference(elements, None)
    integer = _INTEGER[max(1, bits_of(a_dtype) // 8)]
    shape = (len(a) // integer.itemsize,)
    apart = tensor_from(a, integer, shape) != tensor_from(b, integer, shape)
    return Difference(elements, int(apart.sum()))


def _join(of: Callable[[Number, Number], Number], a: Number | None, b: Number | None) -> Number | None:
    return None if a is None or b is None else of(a, b)


def _equal(values: Tensor) -> Difference:
    return Difference(values.numel(), 0, 0, 0.0, 0, _squares(values.to(torch.float64)), 0.0)


def _of_floats(a: Tensor, b: Tensor) -> Difference:
    wide, other = a.to(torch.float64), b.to(torch.float64)
    where = (_apart(a, b) if a.dtype == b.dtype else _values_apart(wide, other)).nonzero().squeeze(1)
    apart = (wide - other)[where]
    numbers, errors = where, apart
    if not all_finite(apart):
        finite = torch.isfinite(wide[where]) & torch.isfinite(other[where])
        numbers, errors = where[finite], apart[finite]
    return Difference(
        elements=a.numel(),
        differing=where.numel(),
        not_finite=where.numel() - numbers.numel(),
        max_abs_error=float(errors.abs().max()) if numbers.numel() else 0.0,
        max_ulps=_max_ulps(a[numbers], b[numbers]) if numbers.numel() else 0,
        squares_a=_squares(wide),
        squares_apart=_squares(apart),
    )


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Where the bytes of two tensors of one dtype differ."""
    return a.view(_INTEGER[a.itemsize]) != b.view(_INTEGER[b.itemsize])


def _values_apart(a: Tensor, b: Tensor) -> Tensor:
    """Where two float64 tensors differ, any NaN being like any other; -0 is not 0, as it is not by its bytes."""
    return _apart(a, b) & ~(a.isnan() & b.isnan())


def _max_ulps(a: Tensor, b: Tensor) -> float:
    """By their places in the order of all floats; of two dtypes, in the spacing of the one with fewer digits."""
    if a.dtype == b.dtype:
        one, other = order(a), order(b)
        apart = torch.maximum(one, other) - torch.minimum(one, other)  # modulo 2^64, for it may reach beyond 2^63
        return int((apart ^ torch.iinfo(torch.int64).min).max()) + (1 << 63)
    narrow = a if torch.finfo(a.dtype).eps > torch.finfo(b.dtype).eps else b
    error = (a.to(torch.float64) - b.to(torch.float64)).abs()
    return float((error / ulp(narrow.to(torch.float64), narrow.dtype)).max())


def _squares(values: Tensor) -> float:
    return tree_sum(values * values)
