"""A linear map whose weight has a sparse one added, as one step of autograd: no gradient as large as the weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.method import Run
from surgery.core.one_step import may_be_one_step
from surgery.core.op import Tile, in_dtype_of

# Of a weight [out, in]: v [numbers], and their flat positions, where those at one position add up.
Acting = Callable[[tuple[int, int]], tuple[Tensor, Tensor]]

_MANY = 1 << 12  # numbers of an input, with which one product of W + S takes less than one of each
_NUMBERS = 1 << 20  # of a gradient of some rows of the weight, from which a few are taken


def laid(W: Tensor | None, v: Tensor, flat: Tensor, shape: tuple[int, int]) -> Tensor:
    """W [out, in], or zeros of this shape, with v [numbers] added at flat positions."""
    held = v.new_zeros(shape[0] * shape[1]) if W is None else W.reshape(-1)
    return held.index_add(0, flat, v).view(shape)


def laid_in(tile: Tile, v: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tile of zeros of this shape with v [numbers] at these rows and columns."""
    firsts, lasts, _ = zip(*(part.indices(size) for part, size in zip(tile, shape, strict=True)), strict=True)
    height, width = lasts[0] - firsts[0], lasts[1] - firsts[1]
    row, column = rows - firsts[0], columns - firsts[1]
    if (height, width) != tuple(shape):
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        here = inside.nonzero().squeeze(1)
        v, row, column = (one.index_select(0, here) for one in (v, row, column))
    return laid(None, v, row * width + column, (height, width))


def with_sparse(x: Tensor, run: Run, acting: Acting) -> Tensor:
    """The layer below with numbers added to its weight."""
    plain = run.plain() if x.numel() >= _MANY else None
    if plain is not None:
        v, flat = acting((plain.weight.shape[0], plain.weight.shape[1]))
        if may_be_one_step(x, plain.weight, v):
            out: Tensor = Sparse.apply(x, *plain, v, flat, plain.weight.shape)  # type: ignore[no-untyped-call]
            return out
    below = run(x)
    shape = below.shape[-1], x.shape[-1]
    v, flat = acting(shape)
    x = in_dtype_of(v, x)
    if may_be_one_step(x, v):
        moved: Tensor = Sparse.apply(x, None, None, v, flat, shape)  # type: ignore[no-untyped-call]
        return below + moved
    return below + F.linear(x, laid(None, v, flat, shape))


class Sparse(torch.autograd.Function):
    """x (W + S)^T + bias, where S has v [numbers] at flat positions; without W, x S^T."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917  # autograd passes no values but tensors and numbers
        ctx: Any, x: Tensor, W: Tensor | None, bias: Tensor | None, v: Tensor, flat: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        of_W, of_v = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        ctx.save_for_backward(x if of_W or of_v else None, W, v, flat)
        ctx.shape = shape
        return F.linear(x, laid(W, v, flat, shape), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, v, flat = ctx.saved_tensors
        of_x, of_W, of_bias, of_v, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # [batch, out]
        found: list[Tensor | None] = [None] * 6
        if of_x:
            found[0] = grad @ laid(W, v, flat, ctx.shape)
        if of_W:
            found[1] = rows.T @ x.reshape(-1, x.shape[-1])
        if of_bias:
            found[2] = rows.sum(0)
        if of_v:
            found[3] = _sampled(rows, x.reshape(-1, x.shape[-1]), flat)
        return tuple(found)


def _sampled(left: Tensor, right: Tensor, flat: Tensor) -> Tensor:
    """Of left^T right [out, in] the numbers at flat positions, by blocks of rows."""
    out_features, in_features = left.shape[1], right.shape[1]
    step = max(1, _NUMBERS // in_features)
    if step >= out_features:
        return (left.T @ right).flatten().index_select(0, flat)
    found = left.new_zeros(len(flat))
    for first in range(0, out_features, step):
        block: Tensor = (left[:, first : first + step].T @ right).flatten()  # [step * in]
        here = flat - first * in_features
        inside = (here >= 0) & (here < len(block))
        found = torch.where(inside, block.index_select(0, here.clamp(0, len(block) - 1)), found)
    return found
