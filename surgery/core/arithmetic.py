"""Exact products: the same bits for any tile, thread count or device.

A factor is put on a power-of-two grid of 22 bits (a column of A, a row of B), so a product has at most
44 bits and every float64 partial sum of up to 512 of them is exact, in whatever order it is taken.
"""

import math
from typing import NoReturn

import torch
from torch import Tensor

from surgery.core.halves import farthest_apart, magnitude
from surgery.core.op import WHOLE, Tile
from surgery.errors import ValueRangeError

GRID_BITS = 22
BLOCK = 512  # terms whose sum is exact: 2 * 22 bits + 9 bits = 53
EXPONENT_LIMIT = 450  # beyond it a product of two grid steps could leave float64's normal range


class Exact:
    """A tile of scaling * (B @ A) in float64, free of summation order; B is [out, r], A is [r, in], or stacks of such.

    The product differs from the ideal one by at most r * 2^-21 (if `fine` 2^-42) * max|A column| * max|B row|; scaling
    it is an operation of its own. Raises ValueRangeError where a factor is not finite or lies beyond 2^±450.
    """

    def __call__(self, B: Tensor, A: Tensor, tile: Tile = WHOLE, scaling: float = 1.0, *, fine: bool = False) -> Tensor:
        if fine:
            return _fine(B[..., tile[0], :], A[..., tile[1]]).mul_(scaling)
        if B.dim() > 2:
            return torch.stack([exact_product(b, a, tile, scaling) for b, a in zip(B, A, strict=True)])
        rows, columns = tile
        B, A = self._on_grid(B, along=1)[rows], self._on_grid(A, along=0)[:, columns]
        # By a power of two a factor may be scaled in place of the product: nothing is rounded, and it is smaller.
        return _sum(B * scaling, A) if _only_shifts(scaling) else _sum(B, A).mul_(scaling)

    def held(self, values: Tensor, role: str) -> Tensor:
        """In float64. ValueRangeError for what no merge can be made with."""
        require_finite(values, role)
        return exact_float64(values)

    def _on_grid(self, factor: Tensor, along: int) -> Tensor:
        return on_grid(factor, along)


class ExactProduct(Exact):
    """The same, which keeps the factors' grids for as long as the next call brings the same memory."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def _on_grid(self, factor: Tensor, along: int) -> Tensor:
        kept = self._kept.get(along)
        if kept is None or memory_of(kept[0]) != memory_of(factor):
            kept = self._kept[along] = factor, on_grid(factor, along)
        return kept[1]


class Plain:
    """The same in the factors' own dtype, differentiable."""

    def __call__(self, B: Tensor, A: Tensor, tile: Tile = WHOLE, scaling: float = 1.0, *, fine: bool = False) -> Tensor:  # noqa: ARG002  # one way
        rows, columns = tile
        return (B[..., rows, :] @ A[..., columns]).mul_(scaling)

    def held(self, values: Tensor, role: str) -> Tensor:  # noqa: ARG002  # of what is wrong the outputs tell
        return values


exact_product, float_product = Exact(), Plain()


def factor_bytes(shape: tuple[int, int], r: int) -> int:
    """What factors of a product of this shape, [out, in], take in float64, on their grids, and while they are made."""
    return 3 * 8 * r * sum(shape)


def memory_of(values: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same elements of the same memory, read in the same dtype."""
    return values.data_ptr(), values.shape, values.stride(), values.dtype


def _only_shifts(scaling: float) -> bool:
    """Is it a power of two, so near 1 that float64 holds all that it makes of a product of factors?

    A negative one would turn a sum that is zero to -0.0 as a product, and not as a factor.
    """
    mantissa, exponent = math.frexp(scaling)
    return mantissa == 0.5 and abs(exponent) <= _SHIFT_LIMIT


_SHIFT_LIMIT = 64  # 2 * (EXPONENT_LIMIT + GRID_BITS) + 64 is less than float64's smallest exponent, 1022


def _sum(B: Tensor, A: Tensor) -> Tensor:
    """B @ A of factors on their grids, in blocks whose sums are exact."""
    r = A.shape[-2]
    if r <= BLOCK:
        return B @ A  # [..., out, in]
    total = B[..., :BLOCK] @ A[..., :BLOCK, :]  # [..., out, in]
    for start in range(BLOCK, r, BLOCK):
        total = total + B[..., start : start + BLOCK] @ A[..., start : start + BLOCK, :]
    return total


def _fine(B: Tensor, A: Tensor) -> Tensor:
    """B @ A of factors in two parts each; that of the lower parts is left out."""
    (high_B, low_B), (high_A, low_A) = _parts(exact_float64(B), along=-1), _parts(exact_float64(A), along=-2)
    return _sum(high_B, high_A) + (_sum(high_B, low_A) + _sum(low_B, high_A))


def _parts(values: Tensor, along: int) -> tuple[Tensor, Tensor]:
    """Rounded to 22 bits, and what is left of them to 22 more."""
    shift = _shift(values, along)
    steps, unit = values * power_of_two(shift), power_of_two(-shift)
    high = steps.round()
    low = (steps - high).mul_(2.0**GRID_BITS).round_()
    return high * unit, low.mul_(unit * 2.0**-GRID_BITS)


def on_grid(factor: Tensor, along: int) -> Tensor:
    """`factor` in float64, each column (`along` 0) or row (`along` 1) rounded to 22 bits below its largest."""
    values = exact_float64(factor)
    return _rounded(values, _shift(values, along))


def _rounded(values: Tensor, shift: Tensor) -> Tensor:
    """To multiples of 2^-shift."""
    return (values * power_of_two(shift)).round_().mul_(power_of_two(-shift))


def _shift(values: Tensor, along: int) -> Tensor:
    """Which multiples of 2^-shift have 22 bits, as it broadcasts over the values."""
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=values.device)
    lowest, highest = values.amin(dim=along, keepdim=True), values.amax(dim=along, keepdim=True)
    largest = torch.maximum(highest, -lowest)  # half of what magnitudes, and the largest of them, take
    exponent = torch.frexp(largest).exponent.to(torch.int64)  # of zero it is 0
    if not bool(((largest < 2.0**EXPONENT_LIMIT) & (exponent >= -EXPONENT_LIMIT)).all()):  # one look at a device
        _refuse(largest)
    return GRID_BITS - exponent


def _refuse(largest: Tensor) -> NoReturn:
    if not bool(torch.isfinite(largest).all()):
        raise ValueRangeError("a factor holds NaN or infinity; finite numbers are wanted; train or save it again")
    raise ValueRangeError(
        f"a factor's largest magnitude is beyond 2^±{EXPONENT_LIMIT}; exact arithmetic needs it within; "
        "rescale the factor"
    )


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, by its bits: torch.pow and torch.ldexp may be an ulp off."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def divided(values: Tensor, number: float) -> Tensor:
    """values / number, rounded once: by a plain number torch divides on a GPU by multiplying with its reciprocal."""
    return values / torch.tensor(number, dtype=values.dtype, device=values.device)


def exact_float64(values: Tensor) -> Tensor:
    """`values` in float64, on the CPU where the device has none."""
    if values.device.type == "mps":
        values = values.cpu()
    return values.to(torch.float64)


def tree_sum(values: Tensor) -> float:
    """The sum of flat float64 values, by halves added elementwise: the same bits on any machine, by any threads."""
    while values.numel() > 1:
        half = values.numel() // 2
        odd = values[2 * half :]
        values = values[:half] + values[half : 2 * half]
        values = torch.cat([values, odd]) if odd.numel() else values
    return float(values.sum())


def all_finite(values: Tensor) -> bool:
    """Is every element a number? One pass, without a mask."""
    if values.numel() == 0:
        return True
    if values.dtype in _INFINITY and values.device.type == "cpu":
        return bool(magnitude(values).max() < _INFINITY[values.dtype])
    if not values.is_floating_point():
        return bool(torch.isfinite(values).all())
    if values.dtype.itemsize == 1:  # torch finds the largest of no float8
        values = values.to(torch.float32)
    lowest, largest = torch.aminmax(values)  # a NaN anywhere makes both NaN
    return bool(torch.isfinite(lowest) & torch.isfinite(largest))


def require_finite(values: Tensor, role: str) -> None:
    """ValueRangeError for a tensor that no merge can be made with."""
    if not all_finite(values.detach()):
        raise ValueRangeError(f"{role} holds NaN or infinity; finite numbers are wanted; train or save it again")


_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def largest_change(a: Tensor, b: Tensor) -> float:
    """max|a - b|, taken in float32 where both are of 16 bits, else in float64."""
    if a.numel() == 0:
        return 0.0
    if a.dtype == b.dtype and a.dtype in _INFINITY and a.device.type == "cpu" and a.shape == b.shape:
        a, b = farthest_apart(a, b)
    wide = torch.float32 if max(a.itemsize, b.itemsize) == 2 else torch.float64
    lowest, largest = torch.aminmax(a.to(wide, copy=True).sub_(b.to(wide)))
    return max(-float(lowest), float(largest))
