"""Convolution, over one, two or three axes: a linear map in each place, of what the kernel covers there.

Stored as [out, channels / groups, *kernel]; the matrix is [out, channels / groups * kernel].
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from torch import Tensor
from torch.nn import functional as F

from surgery.core.op import Op, Tile

_CONVOLVE: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Convolution(Op):
    """torch.nn.Conv1d, Conv2d and Conv3d. A checkpoint tells the kernel alone, which is all that a merge needs."""

    name = "convolution"

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = field(default=1, compare=False)  # on files, what one adapter's shapes tell and another's do not
    padding_mode: str = "zeros"

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)  # [out, channels / groups, *kernel] -> [out, in]

    def stored(self, matrix: Tensor) -> Tensor:
        rows, in_features = matrix.shape
        kernel = self._point if in_features == 1 else self.kernel  # a column may be one that broadcasts
        return matrix.view(rows, in_features // max(1, math.prod(kernel)), *kernel)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        return stored[0], math.prod(stored[1:])

    def tile(self, rows: slice) -> Tile:
        return rows, slice(None)

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """x is [batch, channels, *places], or without the batch; so is the outcome."""
        weight = self.stored(matrix)
        if self.padding_mode == "zeros":
            return self._convolve(x, weight, bias, self.stride, self.padding, self.dilation)
        padded = F.pad(x, self._pads(), mode=self.padding_mode)
        return self._convolve(padded, weight, bias, self.stride, 0, self.dilation)

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return self._convolve(h, matrix.view(*matrix.shape, *self._point))

    def over(self, stored: tuple[int, ...]) -> Self:
        return replace(self, kernel=stored[2:])

    def for_inputs(self, values: Tensor, shape: tuple[int, int]) -> Tensor:
        out_features, in_features = shape
        places = math.prod(self.kernel)
        grouped = values.view(-1, in_features // places).repeat_interleave(places, 1)  # [groups, in]
        if len(grouped) == 1:
            return grouped
        return grouped.repeat_interleave(out_features // len(grouped), 0)  # [out, in]

    def beside(self, values: Tensor) -> Tensor:
        return values.view(-1, *self._point)

    def settings(self) -> Mapping[str, Any]:
        return asdict(self)

    @property
    def _point(self) -> tuple[int, ...]:
        """The kernel of one place."""
        return (1,) * len(self.kernel)

    def _convolve(self, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        """In as many groups as the channels of `x` are more than those that `weight` takes."""
        axes = len(self.kernel)
        return _CONVOLVE[axes](x, weight, *rest, groups=x.shape[-1 - axes] // weight.shape[1])

    def _pads(self) -> list[int]:
        """Before and after, the last axis first, as F.pad takes it."""
        if not isinstance(self.padding, str):
            sides = [(one, one) for one in self.padding]
        elif self.padding == "valid":
            sides = [(0, 0) for _ in self.kernel]
        else:  # "same"
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        return [side for pair in reversed(sides) for side in pair]
