"""Wavelets: what one number of a matrix's wavelet transform is in the matrix, for filters that have a closed form.

Filters by Daubechies, Ten Lectures on Wavelets, 1992; symlets of 4 and 6 numbers are hers.
"""

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor


def _of_four() -> list[float]:
    root = sqrt(3)
    return [(1 + root) / 4, (3 + root) / 4, (3 - root) / 4, (1 - root) / 4]


def _of_six() -> list[float]:
    z = sqrt(10)
    w = sqrt(5 + 2 * z)
    whole = [1 + z + w, 5 + z + 3 * w, 10 - 2 * z + 2 * w, 10 - 2 * z - 2 * w, 5 + z - 3 * w, 1 + z - w]
    return [one / 16 for one in whole]


def _of_coiflet() -> list[float]:
    root = sqrt(7)
    whole = [1 - root, 5 + root, 14 + 2 * root, 14 - 2 * root, 1 - root, root - 3]
    return [one / 16 for one in whole]


FILTERS: Mapping[str, Sequence[float]] = {  # those that bring low frequencies back, times the root of 2
    "db1": [1.0, 1.0],
    "db2": _of_four(),
    "db3": _of_six(),
    "sym2": _of_four(),
    "sym3": _of_six(),
    "coif1": _of_coiflet(),
}


def brought_back(at: Tensor, shape: tuple[int, int], family: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and weights, [length^2 * count] each: where in a matrix of this shape numbers `at` [2, count] act.

    As PEFT, in a larger matrix whose quarters are low and high frequencies: with `length` of a filter, length - 2 more
    rows and columns, or one again, that both be even, and the numbers in its middle. What would lie outside has no
    weight, at row and column 0. Of low rows and high columns PEFT brings back the rows by the filter of high
    frequencies, and the columns by that of low ones; and the other way round.
    """
    low = FILTERS[family]
    length, device = len(low), at.device
    high = [value * (-1) ** k for k, value in enumerate(reversed(low))]
    filters = torch.tensor([low, high], dtype=torch.float64, device=device).T  # [length, 2]
    taps = torch.arange(length, device=device).unsqueeze(1)
    places, seconds = [], []
    for one, size in zip(at, shape, strict=True):
        half = (size + length - 1) // 2
        wide = one + (2 * half - size) // 2
        seconds.append((wide >= half).to(torch.int64))
        places.append(2 * (wide - half * seconds[-1]) + taps - (length - 2))  # [length, count]
    both = length, length, -1
    rows, columns = places[0].unsqueeze(1).expand(both), places[1].unsqueeze(0).expand(both)  # [length, length, count]
    weights = filters[:, seconds[1]].unsqueeze(1) * filters[:, seconds[0]].unsqueeze(0) / 2
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    found = [torch.where(inside, one, 0).flatten() for one in (rows, columns)]
    return found[0], found[1], torch.where(inside, weights, 0.0).flatten()
