"""A linear map with a low-rank one added, as one step of autograd: no second tensor as large as input or output."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.one_step import may_be_one_step
from surgery.core.op import Factors, is_many

_MANY = 16  # columns of a product: as many float32 numbers as a processor takes at once


def is_worth_one_step(x: Tensor, weight: Tensor, factors: Factors) -> bool:
    """Is the input large, and is there nothing that looks for the separate operations?"""
    return is_many(x) and may_be_one_step(x, weight, factors.A, factors.B)


class LowRank(torch.autograd.Function):
    """x W^T + bias + scaling * x A^T B^T, for x of [*batch, in] to [*batch, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:  # noqa: PLR0913, PLR0917  # autograd passes no values but tensors and numbers
        out = F.linear(x, W, bias)
        h = _narrowed(_flat(x), A)  # [batch, r]
        out.view(-1, out.shape[-1]).addmm_(h, B.T, alpha=scaling)
        trains_base, trains_A, trains_B = (ctx.needs_input_grad[index] for index in (1, 3, 4))
        ctx.save_for_backward(x if trains_base or trains_A or trains_B else None, W, A, B, h if trains_B else None)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        of_x, of_W, of_bias, of_A, of_B, _ = ctx.needs_input_grad
        rows = _flat(grad)  # [batch, out]
        found: list[Tensor | None] = [None] * 6
        if of_x or of_A:
            through = _narrowed(rows, ctx.scaling * B.T)  # [batch, r]
        if of_x:
            found[0] = (rows @ W).addmm_(through, A).view(*grad.shape[:-1], -1)
        if of_W:
            found[1] = rows.T @ _flat(x)
        if of_bias:
            found[2] = rows.sum(0)
        if of_A:
            found[3] = _gathered(through, _flat(x))
        if of_B:
            if torch.is_grad_enabled():  # h as it was kept has no graph
                h = _narrowed(_flat(x), A)
            found[4] = (ctx.scaling * _gathered(h, rows)).T
        return tuple(found)


def _narrowed(rows: Tensor, factor: Tensor) -> Tensor:
    """rows factor^T, [batch, r]; few columns are held as rows, of which the product takes half the time."""
    if len(factor) >= _MANY:
        return rows @ factor.T
    parts = _parts(len(rows), rows)
    if parts == 1:
        return (factor @ rows.T).T
    blocks = rows.view(parts, -1, rows.shape[-1])
    return torch.bmm(factor.expand(parts, *factor.shape), blocks.mT).mT.reshape(len(rows), -1)


def _gathered(thin: Tensor, rows: Tensor) -> Tensor:
    """thin^T rows, [r, n], by blocks of columns."""
    parts = _parts(rows.shape[-1], rows)
    if parts == 1:
        return thin.T @ rows
    blocks = rows.view(len(rows), parts, -1).transpose(0, 1)
    return torch.bmm(thin.T.expand(parts, *thin.T.shape), blocks).transpose(0, 1).reshape(thin.shape[-1], -1)


def _parts(length: int, values: Tensor) -> int:
    """How many blocks to cut a thin product into: threads of a CPU do whole ones faster than shares of one."""
    parts = 2 * torch.get_num_threads()
    return parts if values.device.type == "cpu" and length % parts == 0 else 1


def _flat(values: Tensor) -> Tensor:
    """[*batch, n] -> [batch, n]"""
    return values.reshape(-1, values.shape[-1])
