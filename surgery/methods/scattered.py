"""Scattered: W + scaling * S, where S is zero but for a few numbers, no two of them in one place."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.method import Params, Run
from surgery.core.one_step import may_be_one_step
from surgery.core.op import Tile, in_dtype_of
from surgery.methods.placed import Placed
from surgery.methods.sparse import Sparse, laid

# Of a weight [out, in]: v, scaled, and its rows and columns [2, numbers], where such in one place add up.
Acting = Callable[[tuple[int, int]], tuple[Tensor, Tensor]]

_MANY = 1 << 12  # numbers of an input, with which one product of W + S takes less than one of each


@dataclass(frozen=True)
class Scattered(Placed):
    """Its `matrices` give v, rows and columns, [numbers] each, and a frame [out, in, 0] of the weight's shape."""

    def numbers(self, p: Params, tile: Tile) -> Tensor:
        v, frame = p["v"], p["frame"]
        height, width, _ = frame[tile].shape
        row, column = p["rows"] - _start(tile[0]), p["columns"] - _start(tile[1])
        if (height, width) != frame.shape[:2]:
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            here = inside.nonzero().squeeze(1)
            v, row, column = (one.index_select(0, here) for one in (v, row, column))
        return laid(None, v, row * width + column, (height, width))

    def added(self, x: Tensor, run: Run, acting: Acting) -> Tensor:
        """The adapted output; `acting` says what acts where in a weight of this shape."""
        plain = run.plain() if x.numel() >= _MANY else None
        if plain is not None:
            v, at = acting((plain.weight.shape[0], plain.weight.shape[1]))
            if may_be_one_step(x, plain.weight, v):
                out: Tensor = Sparse.apply(x, *plain, v, at, plain.weight.shape)  # type: ignore[no-untyped-call]
                return out
        below = run(x)
        shape = below.shape[-1], x.shape[-1]
        v, at = acting(shape)
        x = in_dtype_of(v, x)
        if may_be_one_step(x, v):
            moved: Tensor = Sparse.apply(x, None, None, v, at, shape)  # type: ignore[no-untyped-call]
            return below + moved
        rows, columns = at.to(torch.int64).unbind()
        return below + F.linear(x, laid(None, v, rows * shape[1] + columns, shape))


def _start(part: slice) -> int:
    return part.start or 0
