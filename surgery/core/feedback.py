"""Feedback: rounding of a weight to a grid, where later columns make up for the errors of earlier ones.

As in GPTQ (https://arxiv.org/abs/2210.17323), the error E of a row is made small for the inputs that matter: E H E'
with H = I + (in / r) A' A, where the rows of A are an adapter's input directions, each of norm 1. That is of inputs
half of whose energy lies along these. H has a low rank beside I, and so has all that is kept of a row's errors: r
numbers. Every operation is one of elements, in a fixed order: the same bits for any tiles, threads and machines.
"""

from functools import cached_property

import torch
from torch import Tensor

from surgery.core.sums import sum_rows


class Feedback:
    """`directions` [r, in], such as LoRA's A; several adapters' one below another."""

    def __init__(self, directions: Tensor) -> None:
        wide = directions.to(torch.float64)
        norms = sum_rows(wide * wide).sqrt()
        wide = wide[norms > 0] / norms[norms > 0].unsqueeze(1)
        width = 1 << max(0, len(wide) - 1).bit_length()  # a power of two, for sums by halves
        weight = (wide.shape[1] / max(1, len(wide))) ** 0.5
        self.columns = torch.nn.functional.pad(wide.T * weight, (0, width - len(wide))).contiguous()  # [in, r]

    @cached_property
    def gains(self) -> Tensor:
        """[in, r]: how much of what a row's errors add up to along A each column takes off.

        What is best knows that the columns after it will take off what they can: they leave (I + A' A)^-1 of it.
        """
        left = torch.eye(self.columns.shape[1], dtype=torch.float64)
        found = torch.empty_like(self.columns)
        for index in range(len(self.columns) - 1, -1, -1):
            column = self.columns[index]
            seen = _total(left * column)  # [r]
            whole = 1 + _total(seen * column)
            found[index] = seen / whole
            left = left - seen.unsqueeze(1) * found[index]
        return found

    def choose(self, wanted: Tensor, held: Tensor, below: Tensor, above: Tensor) -> Tensor:
        """Of each element `held`, the nearest to what is wanted, or a neighbour of it; all [rows, in], float64.

        A row for which that turns out no better stays as it is held.
        """
        wanted, held, below, above = (one.T.contiguous() for one in (wanted, held, below, above))
        chosen = torch.empty_like(held)
        near, fed = (_Errors(wanted.shape[1], self.columns.shape[1]) for _ in range(2))
        for index, (column, gain) in enumerate(zip(self.columns, self.gains, strict=True)):
            target = wanted[index] - _total(fed.along * gain)
            options = below[index], held[index], above[index]
            best = options[1]
            for other in (options[0], options[2]):
                best = torch.where((other - target).abs() < (best - target).abs(), other, best)
            chosen[index] = best
            near.add(held[index] - wanted[index], column)
            fed.add(best - wanted[index], column)
        return torch.where(fed.measured < near.measured, chosen, held).T.contiguous()


class _Errors:
    """Of some rows: the sum of squares so far, and what they add up to along the directions."""

    def __init__(self, rows: int, r: int) -> None:
        self.squares, self.along = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, r, dtype=torch.float64)

    def add(self, error: Tensor, column: Tensor) -> None:
        self.squares = self.squares + error * error
        self.along = self.along + error.unsqueeze(1) * column

    @property
    def measured(self) -> Tensor:
        """E H E' of each row."""
        return self.squares + _total(self.along * self.along)


def _total(values: Tensor) -> Tensor:
    """Over the last axis, a power of two long, by halves."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]
