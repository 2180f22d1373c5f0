"""One rounding: float64 to a narrower dtype, to nearest and ties to even, and the steps of a dtype."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.core.arithmetic import power_of_two
from surgery.core.halves import with_low_half
from surgery.errors import ValueRangeError


def round_once(acc: Tensor, dtype: torch.dtype) -> Tensor:
    """`acc` (float64) rounded once to `dtype`, to nearest, ties to even."""
    return rounding(acc, dtype).values


class Rounding(NamedTuple):
    """Values rounded once; and of a half type, flat positions among which are all that float32 takes for ties."""

    values: Tensor
    near_ties: Tensor | None = None


def rounding(acc: Tensor, dtype: torch.dtype) -> Rounding:
    """As `round_once`.

    torch converts float64 to a half type by way of float32 and so rounds twice. That errs only where the
    float32 value is a tie of the half type; there it is moved one step towards `acc` before.
    """
    acc = acc.contiguous()  # below, bits are changed through views
    if dtype in (torch.float64, torch.float32):
        return Rounding(acc.to(dtype))
    if dtype not in _TIE:
        raise ValueRangeError(f"cannot round to {dtype}; float64, float32, bfloat16 and float16 can be merged")
    single = acc.to(torch.float32)
    bits = single.view(torch.int32).flatten()
    where = _suspects(bits, dtype)
    if where.numel():
        _nudge(bits, acc.flatten(), single.flatten(), where)
    return Rounding(single.to(dtype), where)


def _suspects(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Flat positions of the float32 `bits` that may be a tie of a half type."""
    mask, tie = _TIE[dtype]
    if mask == 0xFFFF and bits.device.type == "cpu":
        return with_low_half(bits, tie)
    values: Any = bits.numpy() if bits.device.type == "cpu" else bits  # numpy compares four times as fast as torch
    suspect = (values & mask) == tie
    if dtype == torch.float16:  # subnormal results have their ties elsewhere; a nudge is harmless there
        suspect |= (values & 0x7FFF_FFFF) < _SMALLEST_NORMAL
    found = suspect.nonzero()
    where = torch.from_numpy(found[0]) if isinstance(found, tuple) else found.squeeze(1)
    return where[(bits[where] & 1) == 0]


_TIE = {torch.bfloat16: (0xFFFF, 0x8000), torch.float16: (0x1FFF, 0x1000)}
_SMALLEST_NORMAL = 0x3880_0000  # of float16, as float32 bits: 2^-14


def _nudge(bits: Tensor, acc: Tensor, single: Tensor, where: Tensor) -> None:
    """Move `single` one float32 step towards `acc` where they differ; `bits` is its own memory."""
    exact, near = acc[where], single[where].to(torch.float64)
    step = torch.where(exact.abs() > near.abs(), 1, -1)
    step = torch.where((exact == near) | ~torch.isfinite(near), 0, step)
    bits[where] += step.to(torch.int32)


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at each of `values` (float64): the step to the next magnitude."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs()).exponent.to(torch.int64)
    bits = _PRECISION[dtype]
    lowest = torch.frexp(torch.tensor(info.tiny, dtype=torch.float64)).exponent.to(exponent)
    exponent = torch.where(values == 0, lowest, exponent)
    exponent = torch.maximum(exponent, lowest) - bits
    return power_of_two(torch.clamp(exponent, min=-1022))


_PRECISION = {torch.float64: 53, torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
