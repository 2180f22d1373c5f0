"""Feedback: rounding of a weight to a grid, where later columns make up for the errors of earlier ones.

As in GPTQ (https://arxiv.org/abs/2210.17323), the error E of a row is made small for the inputs that matter: E H E'
with H = D + C C'. C has few columns, so that all that is kept of a row's errors is a few numbers, and D is diagonal.
Every operation is one of elements, in a fixed order: the same bits for any tiles, threads and machines.
"""

from functools import cached_property

import torch
from torch import Tensor

from surgery.core.arithmetic import power_of_two, tree_sum
from surgery.core.sums import sum_rows

_REST = 0.01  # of the mean energy of an input, that any other may have besides


class Feedback:
    """`columns` C [in, r] and `alone` D [in], which is above zero."""

    def __init__(self, columns: Tensor, alone: Tensor) -> None:
        width = 1 << max(0, columns.shape[1] - 1).bit_length()  # a power of two, for sums by halves
        self.columns = torch.nn.functional.pad(columns, (0, width - columns.shape[1])).contiguous()
        self.alone = alone

    @classmethod
    def along(cls, directions: Tensor) -> "Feedback":
        """`directions` [r, in], such as LoRA's A: H of inputs half of whose energy lies along these, all alike."""
        wide = directions.to("cpu", torch.float64)  # what is found here is small, and found step by step
        norms = sum_rows(wide * wide).sqrt()
        wide = wide[norms > 0] / norms[norms > 0].unsqueeze(1)
        weight = (wide.shape[1] / max(1, len(wide))) ** 0.5
        return cls(wide.T * weight, torch.ones(wide.shape[1], dtype=torch.float64))

    @classmethod
    def of_inputs(cls, inputs: Tensor, rest: Tensor | None = None) -> "Feedback":
        """`inputs` [n, in] and, of what is not in them, the mean square of each, [in]; their unit does not matter."""
        wide = inputs.to(torch.float64)
        alone = torch.zeros(wide.shape[1], dtype=torch.float64) if rest is None else rest.to(torch.float64)
        unit = _unit(torch.maximum(wide.abs().max(), alone.max().sqrt()))
        wide, alone = wide * unit, alone * unit * unit
        squares = sum_rows((wide * wide).T) / len(wide) + alone
        floor = _REST * tree_sum(squares) / len(squares)
        return cls(wide.T / len(wide) ** 0.5, alone + (floor or 1.0))

    @cached_property
    def gains(self) -> Tensor:
        """[in, r]: how much of what a row's errors add up to along C each column takes off.

        What is best knows that the columns after it will take off what they can: they leave (I + C' C / D)^-1 of it.
        """
        left = torch.eye(self.columns.shape[1], dtype=torch.float64)
        found = torch.empty_like(self.columns)
        for index in range(len(self.columns) - 1, -1, -1):
            column = self.columns[index]
            seen = _total(left * column)  # [r]
            whole = self.alone[index] + _total(seen * column)
            found[index] = seen / whole
            left = left - seen.unsqueeze(1) * found[index]
        return found

    def choose(self, wanted: Tensor, held: Tensor, below: Tensor, above: Tensor) -> Tensor:
        """Of each element `held`, the nearest to what is wanted, or a neighbour of it; all [rows, in], float64.

        A row for which that turns out no better stays as it is held.
        """
        wanted, held, below, above = (one.T.contiguous() for one in (wanted, held, below, above))
        chosen = torch.empty_like(held)
        columns, gains, alone = (one.to(held.device) for one in (self.columns, self.gains, self.alone))
        near, fed = (_Errors(held, columns.shape[1]) for _ in range(2))
        for index, (column, gain) in enumerate(zip(columns, gains, strict=True)):
            target = wanted[index] - _total(fed.along * gain)
            options = below[index], held[index], above[index]
            best = options[1]
            for other in (options[0], options[2]):
                best = torch.where((other - target).abs() < (best - target).abs(), other, best)
            chosen[index] = best
            near.add(held[index] - wanted[index], column, alone[index])
            fed.add(best - wanted[index], column, alone[index])
        return torch.where(fed.measured < near.measured, chosen, held).T.contiguous()

    def inputs(self, white: Tensor, drawn: Tensor) -> Tensor:
        """Such inputs [in, n], of normal numbers [in, n] and [r, n]."""
        return white * self.alone.sqrt().unsqueeze(1) + self.columns @ drawn


class _Errors:
    """Of some rows: the sum of squares so far, and what they add up to along the directions."""

    def __init__(self, held: Tensor, r: int) -> None:
        """`held` is [in, rows]."""
        self.squares, self.along = held.new_zeros(held.shape[1]), held.new_zeros(held.shape[1], r)

    def add(self, error: Tensor, column: Tensor, alone: Tensor) -> None:
        self.squares = self.squares + alone * (error * error)
        self.along = self.along + error.unsqueeze(1) * column

    @property
    def measured(self) -> Tensor:
        """E H E' of each row."""
        return self.squares + _total(self.along * self.along)


def _unit(largest: Tensor) -> Tensor:
    """A power of two that makes this about 1, so that no square overflows; to multiply by it changes no bit."""
    return power_of_two((-torch.frexp(largest).exponent).clamp(-1022, 1022))


def _total(values: Tensor) -> Tensor:
    """Over the last axis, a power of two long, by halves."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]
