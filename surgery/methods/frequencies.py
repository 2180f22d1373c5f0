"""Frequencies: real(ifft2(S)) of a matrix S with few numbers, as a product of thin matrices in place of a transform.

Its element [j, k], times out * in, is the sum over t of c[t] cos(2 pi (u[t] j / out + v[t] k / in)).
"""

import math

import torch
from torch import Tensor

from surgery.core.arithmetic import divided, exact_float64
from surgery.core.polynomial import polynomial
from surgery.methods.drawn_places import one_of_each

_TERMS = 9  # of a series, whose rest is below 2^-54 up to pi / 4


def factors(c: Tensor, at: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in] in float64, whose product is the matrix times out * in; `at` as `places` has them.

    Frequencies that differ by their sign alone along the shorter side share their waves there: r is at most that + 2.
    All is made of separate operations on elements, in the order of `at`, so that bits depend on no device.
    """
    if shape[0] > shape[1]:
        left, right = factors(c, at.flip(0), (shape[1], shape[0]))
        return right.T, left.T
    c, (out_features, in_features) = exact_float64(c), shape
    u, v = at.to(c.device).unbind()
    back = 2 * u > out_features
    held, group = torch.unique(torch.where(back, out_features - u, u), return_inverse=True)
    cosines, sines = waves(in_features, c.device)
    of_cosines = of_sines = c.new_zeros(len(held), in_features)
    for chosen in one_of_each(group):
        angles = _angles(v[chosen], in_features).T  # [some, in]
        each, below = c[chosen].unsqueeze(1), torch.where(back[chosen], -1.0, 1.0).unsqueeze(1)
        of_cosines = of_cosines.index_add(0, group[chosen], each * cosines[angles])
        of_sines = of_sines.index_add(0, group[chosen], each * below * sines[angles])
    angles = _angles(held, out_features)  # [out, r / 2]
    cosines, sines = waves(out_features, c.device)
    return torch.cat([cosines[angles], -sines[angles]], 1), torch.cat([of_cosines, of_sines])


def waves(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi k / count for each k below it, within 2^-51.

    An angle is 1/8 turn times a whole number and a rest that is exact, and is measured from the nearer axis: x, up to
    pi / 4, is off by three roundings, so by 3/4 * 2^-51 in proportion, and 2^-51.7 at most. Half an ulp of a series'
    last sum is 2^-54 to 2^-53, and all before it is as much again at most.
    """
    eighths = 8 * torch.arange(count, device=device)
    octant, rest = eighths // count, eighths % count
    x = divided(torch.where(octant % 2 == 1, count - rest, rest).to(torch.float64), count) * (math.pi / 4)
    cos, sin = _series(x * x, 0), x * _series(x * x, 1)
    crossed = (octant + 1) % 4 >= 2  # nearer to the axis of the sine
    cos, sin = torch.where(crossed, sin, cos), torch.where(crossed, cos, sin)
    left, low = (octant >= 2) & (octant < 6), octant >= 4
    return torch.where(left, -cos, cos), torch.where(low, -sin, sin)


def _series(y: Tensor, first: int) -> Tensor:
    """1 - y / ((first + 1) (first + 2)) + ..., Taylor's of the cosine (0), or of the sine over its angle (1)."""
    return polynomial(y, [(-1) ** k / math.factorial(2 * k + first) for k in range(_TERMS)])


def _angles(frequencies: Tensor, count: int) -> Tensor:
    """[count, frequencies]: which of so many parts of a turn each wave has come to, reduced as whole numbers."""
    return torch.arange(count, device=frequencies.device).unsqueeze(1) * frequencies % count
