"""Feedback: rounding of a weight to a grid, where later columns make up for the errors of earlier ones.

As in GPTQ (https://arxiv.org/abs/2210.17323), the error E of a row is made small for the inputs that matter: E H E'
with H = D + C C'. C has few columns, so that all that is kept of a row's errors is a few numbers, and D is diagonal.
Every operation is one of elements, in a fixed order: the same bits for any tiles, threads and machines.
"""

from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.core.arithmetic import exact_product, power_of_two, tree_sum
from surgery.core.sums import sum_rows

Array = Any  # of numpy on a CPU, where its calls take less time than those of torch; of torch elsewhere
_REST = 0.01  # of the mean energy of an input, that any other may have besides
_TURN = Lock()  # steps from column to column are so short that threads would only take turns at them, one by one


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
        columns, alone = self.columns.numpy(), self.alone.numpy()
        left, found = np.eye(columns.shape[1]), np.empty_like(columns)
        for index in range(len(columns) - 1, -1, -1):
            seen = _total((left * columns[index]).T)  # [r]
            found[index] = seen / (alone[index] + _total(seen * columns[index]))
            left = left - seen[:, None] * found[index]
        return torch.from_numpy(found)

    def choose(self, wanted: Tensor, held: Tensor, below: Tensor, above: Tensor) -> Tensor:
        """Of each element `held`, the nearest to what is wanted, or a neighbour of it; all [rows, in], float64.

        A row for which that turns out no better stays as it is held.
        """
        options = _side_by_side(held, below, above)
        by = (one.to(held.device) for one in (self.columns.unsqueeze(2), self.gains.unsqueeze(2), self.alone))
        with _TURN:
            near, fed = _feed_back(*map(_array, (wanted.T.contiguous(), options, *by)))
        better = torch.as_tensor(fed < near)
        return torch.where(better, options[:, 1], options[:, 0]).T.contiguous()

    def inputs(self, white: Tensor, drawn: Tensor) -> Tensor:
        """Such inputs [in, n], of normal numbers [in, n] and [r, n]."""
        return white * self.alone.sqrt().unsqueeze(1) + exact_product(self.columns, drawn)


def _side_by_side(held: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """[in, 3, rows]: what each column has to choose from lies together."""
    found = held.new_empty(held.shape[1], 3, held.shape[0])
    for index, one in enumerate((held, below, above)):
        found[:, index] = one.T
    return found


def _unit(largest: Tensor) -> Tensor:
    """A power of two that makes this about 1, so that no square overflows; to multiply by it changes no bit."""
    return power_of_two((-torch.frexp(largest).exponent).clamp(-1022, 1022))


def _array(values: Tensor) -> Array:
    return values.numpy() if values.device.type == "cpu" else values


def _feed_back(wanted: Array, options: Array, columns: Array, gains: Array, alone: Array) -> Array:
    """Puts what is chosen in place of the second options; returns E H E' of the first and of these, [2, rows].

    By input: what is wanted [rows], the options [3, rows], its column of C and its gains [r, 1], and D [].
    """
    squares = 0 * options[0, :2]
    along = squares[:, None] * columns[0]  # [2, r, rows]
    for here, three, column, gain, energy in zip(wanted, options, columns, gains, alone, strict=True):
        three[1] = _nearest(three, here - _total(along[1] * gain))
        error = three[:2] - here
        squares += energy * (error * error)
        along += error[:, None] * column
    return squares + _total((along * along).swapaxes(0, 1))


def _nearest(three: Array, target: Array) -> Array:
    """Of three options [3, rows] the nearest; the first of those that are as near."""
    (first, second, third), (a, b, c), of = three, abs(three - target), torch if torch.is_tensor(three) else np
    return of.where(c < of.minimum(a, b), third, of.where(b < a, second, first))


def _total(values: Array) -> Array:
    """Over the first axis, a power of two long, by halves."""
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return values[0]
