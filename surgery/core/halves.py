"""Halves: what the bits of many 16-bit floats tell, on a CPU by numpy, which takes a part of torch's time there."""

import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def magnitude(values: Tensor) -> NDArray[np.int16]:
    """Of float16 or bfloat16: integers that rise with the absolute values; infinity is above them, NaN above that."""
    magnitudes: NDArray[np.int16] = values.view(torch.int16).numpy() & np.int16(0x7FFF)
    return magnitudes


def farthest_apart(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of two tensors of one half type, the elements with the largest |a - b|, and maybe some that are as good as it.

    Rounded to that type, a larger difference is never the smaller one.
    """
    apart = magnitude(a - b)
    where = torch.from_numpy(np.flatnonzero(apart == apart.max()))
    return a.reshape(-1).index_select(0, where), b.reshape(-1).index_select(0, where)


def with_low_half(bits: Tensor, wanted: int) -> Tensor:
    """Flat positions of the int32 `bits` whose lower 16 bits are `wanted`; few are expected."""
    found = places(bits.numpy().view(np.uint16) == wanted)
    return torch.from_numpy(found[found % 2 == _LOW] // 2)


_LOW = 0 if sys.byteorder == "little" else 1  # of the two halves of a number, which one is the lower


def places(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """np.flatnonzero, in half the time where one in some twenty is set: bytes of eight are looked at first."""
    packed = np.packbits(mask)
    some = np.flatnonzero(packed != 0)
    within = np.flatnonzero(np.unpackbits(packed[some]).view(np.bool_))
    found: NDArray[np.int64] = some[within >> 3] * 8 + (within & 7)
    return found
