"""A linear map whose weight has a sparse one added, as one step of autograd: no gradient as large as the weight."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_NUMBERS = 1 << 20  # of a gradient of some rows of the weight, from which a few are taken


def laid(W: Tensor | None, v: Tensor, flat: Tensor, shape: tuple[int, int]) -> Tensor:
    """W [out, in], or zeros of this shape, with v [numbers] added at flat positions."""
    held = v.new_zeros(shape[0] * shape[1]) if W is None else W.reshape(-1)
    return held.index_add(0, flat, v).view(shape)


class Sparse(torch.autograd.Function):
    """x (W + S)^T + bias, where S has v at the rows and columns `at` [2, numbers]; without W, x S^T."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917  # autograd passes no values but tensors and numbers
        ctx: Any, x: Tensor, W: Tensor | None, bias: Tensor | None, v: Tensor, at: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        of_W, of_v = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        ctx.save_for_backward(x if of_W or of_v else None, W, v, at)
        ctx.shape = shape
        return F.linear(x, laid(W, v, _flat(at, shape), shape), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, v, at = ctx.saved_tensors
        of_x, of_W, of_bias, of_v, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # [batch, out]
        found: list[Tensor | None] = [None] * 6
        if of_x:
            found[0] = grad @ laid(W, v, _flat(at, ctx.shape), ctx.shape)
        if of_W:
            found[1] = rows.T @ x.reshape(-1, x.shape[-1])
        if of_bias:
            found[2] = rows.sum(0)
        if of_v:
            found[3] = _sampled(rows, x.reshape(-1, x.shape[-1]), at)
        return tuple(found)


def _flat(at: Tensor, shape: tuple[int, int]) -> Tensor:
    rows, columns = at.to(torch.int64).unbind()
    return rows * shape[1] + columns


def _sampled(left: Tensor, right: Tensor, at: Tensor) -> Tensor:
    """Of left^T right [out, in] the numbers at `at`, by blocks of rows."""
    out_features, in_features = left.shape[1], right.shape[1]
    rows, columns = at.to(torch.int64).unbind()
    step = max(1, _NUMBERS // in_features)
    found = left.new_zeros(len(rows))
    for first in range(0, out_features, step):
        block: Tensor = left[:, first : first + step].T @ right  # [step, in]
        height = len(block)
        flat = (rows - first).clamp(0, height - 1) * in_features + columns
        inside = (rows >= first) & (rows < first + height)
        found = torch.where(inside, block.flatten().index_select(0, flat), found)
    return found
